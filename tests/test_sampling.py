import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava_app.conversation import Conversation
from llava_app.engine import Sampling
from llava_app.engine.local import LocalEngine
from llava_app.engine.sampling import CANDIDATES, choose
from llava_app.images import Picture
from llava_app.loading import Loaded

PROBABILITIES = [0.5, 0.3, 0.15, 0.05]
VOCABULARY = 2 * CANDIDATES


def drawn(probabilities: list[float], sampling: Sampling, *, count: int = 3000) -> list[float]:
    """How often each token was chosen."""
    logits = torch.tensor(probabilities).log().expand(count, -1).clone()
    generator = torch.Generator().manual_seed(0)
    tokens = choose(logits, [sampling] * count, read=[[]] * count, generators=[generator] * count)
    return (torch.bincount(torch.tensor(tokens), minlength=len(probabilities)) / count).tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=0), [1, 0, 0, 0]),
        (Sampling(temperature=1, top_p=1), PROBABILITIES),
        (Sampling(temperature=0.5, top_p=1), [p**2 / 0.365 for p in PROBABILITIES]),
        (Sampling(temperature=1e-40, top_p=1), [1, 0, 0, 0]),
        (Sampling(temperature=1, top_p=0.7), [5 / 8, 3 / 8, 0, 0]),
        (Sampling(temperature=1, top_p=0.05), [1, 0, 0, 0]),
        (Sampling(temperature=1, top_p=1, top_k=3), [10 / 19, 6 / 19, 3 / 19, 0]),
        (Sampling(temperature=1, top_p=0.84, top_k=3), [5 / 8, 3 / 8, 0, 0]),  # of the three, they have 16 / 19
        (Sampling(temperature=1, top_p=0.85, top_k=3), [10 / 19, 6 / 19, 3 / 19, 0]),
        (Sampling(temperature=2, top_p=1, top_k=1), [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_by_probability(sampling: Sampling, expected: list[float]) -> None:
    frequencies = drawn(PROBABILITIES, sampling)
    assert frequencies == pytest.approx(expected, abs=0.04)
    assert [frequency > 0 for frequency in frequencies] == [probability > 0 for probability in expected]


def test_every_token_can_be_drawn_where_all_are_alike() -> None:
    frequencies = drawn([1 / VOCABULARY] * VOCABULARY, Sampling(temperature=1, top_p=1), count=12 * VOCABULARY)
    assert min(frequencies) > 0


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 50, CANDIDATES + 50]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
)
SEEDS = st.integers(0, 2**32 - 1)
READ = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20)


def random_logits(seed: int, spread: float) -> torch.Tensor:
    """(1, V), all different."""
    return spread * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def chosen(logits_1V: torch.Tensor, sampling: Sampling, *, read: list[int], seed: int) -> int:
    generator = torch.Generator().manual_seed(seed)
    return choose(logits_1V.clone(), [sampling], read=[read], generators=[generator])[0]


def chosen_by_transformers(logits_1V: torch.Tensor, sampling: Sampling, *, read: list[int], seed: int) -> set[int]:
    """The token whose part of the probability, likeliest first, holds the uniform number; two where it is a close
    thing."""
    steps = [
        RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        TemperatureLogitsWarper(sampling.temperature),
    ]
    steps += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [TopPLogitsWarper(sampling.top_p)]
    for step in steps:
        logits_1V = step(torch.tensor([read]), logits_1V)
    probability_V, tokens_V = logits_1V[0].double().softmax(dim=-1).sort(descending=True)
    uniform = torch.rand(1, generator=torch.Generator().manual_seed(seed)).double()
    kept = int((probability_V > 0).sum())
    ends = probability_V[:kept].cumsum(dim=-1)
    near = [min(int((ends <= uniform + slack).sum()), kept - 1) for slack in (-1e-5, 1e-5)]
    return {int(tokens_V[index]) for index in near}


@given(SEEDS, st.sampled_from([0.3, 2, 6]), SAMPLINGS, READ)
@settings(deadline=None)
def test_the_choice_is_what_transformers_leaves_to_choose_from(
    seed: int, spread: float, sampling: Sampling, read: list[int]
) -> None:
    assume(sampling.temperature > 0)
    logits_1V = random_logits(seed, spread)
    token = chosen(logits_1V, sampling, read=read, seed=seed)
    assert token in chosen_by_transformers(logits_1V, sampling, read=read, seed=seed)


@given(SEEDS, READ, st.sampled_from([0.5, 1.0, 1.3]))
def test_the_best_token_is_the_best_after_the_penalty(seed: int, read: list[int], penalty: float) -> None:
    logits_1V = random_logits(seed, 2)
    best = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([read]), logits_1V).argmax()
    assert chosen(logits_1V, Sampling(temperature=0, repetition_penalty=penalty), read=read, seed=0) == best


ROWS = st.lists(st.tuples(SEEDS, st.sampled_from([0, 0.3, 6]), SAMPLINGS, READ), min_size=2, max_size=5)


@given(ROWS)
@settings(deadline=None)
def test_a_choice_does_not_depend_on_the_rows_beside_it(rows: list[tuple[int, float, Sampling, list[int]]]) -> None:
    """Nor where many tokens are equally likely, as in bfloat16: spread 0 makes all so."""
    alone = [chosen(random_logits(seed, spread), s, read=read, seed=seed) for seed, spread, s, read in rows]
    together = choose(
        torch.cat([random_logits(seed, spread) for seed, spread, *_ in rows]),
        [sampling for _, _, sampling, _ in rows],
        read=[read for *_, read in rows],
        generators=[torch.Generator().manual_seed(seed) for seed, *_ in rows],
    )
    assert together == alone


def test_the_penalty_is_for_tokens_and_not_for_pictures(tiny_loaded: Loaded, pictures: list[Picture]) -> None:
    engine = LocalEngine(tiny_loaded)
    sampling = Sampling(temperature=0, max_new_tokens=3, repetition_penalty=1.3)
    pieces = list(engine.answer(Conversation().ask("What is funny?", pictures[:1]), sampling))
    engine.close()
    assert pieces[-1].finish in ("length", "stop")


@pytest.mark.parametrize("values", [{"top_k": -1}, {"top_k": 1001}, {"repetition_penalty": 0.4}, {"temperature": 2.1}])
def test_a_setting_outside_its_bounds_is_refused_with_the_bounds(values: dict[str, float]) -> None:
    (name,) = values
    with pytest.raises(ValueError, match=f"{name} is .*; it must lie between"):
        Sampling(**values)  # type: ignore[arg-type]


def test_a_stop_text_may_not_be_empty() -> None:
    assert Sampling(stop=("USER:", "\n")).stop == ("USER:", "\n")
    with pytest.raises(ValueError, match="empty text"):
        Sampling(stop=("USER:", ""))
