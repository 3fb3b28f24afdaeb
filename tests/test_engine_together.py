"""Several people at one engine: answers in a batch, what is reused, and what a fault of one does to the others."""

import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_app.conversation import Conversation
from llava_app.engine import Sampling
from llava_app.engine import worker as worker_module
from llava_app.engine.decoder import Span
from llava_app.engine.local import LocalEngine
from llava_app.errors import BusyError, ModelError
from llava_app.images import Picture
from llava_app.loading import Loaded

GREEDY = Sampling(temperature=0, max_new_tokens=24)
NOISE = [
    Picture(Image.frombytes("RGB", (40, 30), random.Random(seed).randbytes(3600)), f"noise {seed}") for seed in range(4)
]
EIGHT = [Conversation().ask(f"What is {'very ' * number}funny?", [NOISE[number % 4]]) for number in range(8)]


@pytest.fixture
def engine(tiny_loaded: Loaded) -> Iterator[LocalEngine]:
    engine = LocalEngine(tiny_loaded)
    yield engine
    engine.close()


def text_of(engine: LocalEngine, conversation: Conversation, sampling: Sampling = GREEDY) -> str:
    return "".join(piece.text for piece in engine.answer(conversation, sampling))


def alone(loaded: Loaded, conversation: Conversation, sampling: Sampling = GREEDY) -> str:
    """The answer of an engine that has never seen anything."""
    engine = LocalEngine(loaded, plan=replace(loaded.plan, rows=1))
    text = text_of(engine, conversation, sampling)
    engine.close()
    return text


def together(engine: LocalEngine, conversations: Sequence[Conversation], sampling: Sampling = GREEDY) -> list[str]:
    with ThreadPoolExecutor(len(conversations)) as people:
        return list(people.map(lambda asked: text_of(engine, asked, sampling), conversations))


class Steps:
    """Looks on, or interferes, while the engine's decoder works."""

    def __init__(self, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spans: list[list[Span]] = []
        self.fails = lambda spans: None  # may raise
        self._step = engine._worker._decoder.step
        monkeypatch.setattr(engine._worker._decoder, "step", self.step)

    def step(self, embeds: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        self.spans.append(list(spans))
        self.fails(spans)
        return self._step(embeds, spans)


# In a batch


def test_eight_greedy_answers_at_once_equal_those_alone(
    engine: LocalEngine, tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [alone(tiny_loaded, conversation) for conversation in EIGHT]
    steps = Steps(engine, monkeypatch)
    assert together(engine, EIGHT) == expected
    assert max(len(spans) for spans in steps.spans) > 1
    assert len(set(expected)) == 8


def test_a_seed_gives_the_same_answer_alone_and_among_others(engine: LocalEngine, tiny_loaded: Loaded) -> None:
    sampling = Sampling(temperature=1, top_p=0.9, top_k=40, seed=3, max_new_tokens=24)
    assert together(engine, EIGHT, sampling) == [alone(tiny_loaded, talk, sampling) for talk in EIGHT]


def test_a_long_prompt_does_not_stall_the_others(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "CHUNK", 16)
    steps = Steps(engine, monkeypatch)
    running = engine.answer(EIGHT[0], replace(GREEDY, max_new_tokens=400))
    while not next(running).text:
        pass
    long = Conversation().ask("very " * 50, NOISE)
    text_of(engine, long, replace(GREEDY, max_new_tokens=1))
    reading = [spans for spans in steps.spans if len(spans) == 2 and max(span.length for span in spans) > 1]
    assert len(reading) > 5
    assert all(max(span.length for span in spans) <= 16 for spans in reading)


def test_a_stop_text_ends_the_answer_before_it(engine: LocalEngine) -> None:
    whole = text_of(engine, EIGHT[0])
    stop = whole[5:8]
    pieces = list(engine.answer(EIGHT[0], replace(GREEDY, stop=(stop,))))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish == "stop"


# Nothing twice


def test_the_next_turn_reads_only_what_is_new(engine: LocalEngine) -> None:
    answer = text_of(engine, EIGHT[0])
    first = engine.snapshot()
    text_of(engine, EIGHT[0].answer(answer).ask("Why?"))
    second = engine.snapshot()
    assert second.tokens_reused >= first.tokens_read
    assert second.tokens_read - first.tokens_read < first.tokens_read / 2  # its random bytes are read again as U+FFFD
    assert (first.pictures_seen, second.pictures_seen) == (1, 1)


def test_a_retry_reads_one_token(engine: LocalEngine) -> None:
    text_of(engine, EIGHT[0])
    before = engine.snapshot().tokens_read
    text_of(engine, EIGHT[0])
    assert engine.snapshot().tokens_read == before + 1


def test_a_picture_in_another_conversation_is_not_seen_again(engine: LocalEngine) -> None:
    text_of(engine, EIGHT[0])
    text_of(engine, Conversation().ask("Quite different:").answer("Yes.").ask("This?", NOISE[:1]))
    snapshot = engine.snapshot()
    assert (snapshot.pictures_seen, snapshot.pictures_reused) == (1, 1)


def test_two_pictures_of_the_same_size_are_not_confused(engine: LocalEngine, tiny_loaded: Loaded) -> None:
    asked = [Conversation().ask("What is funny?", [picture]) for picture in NOISE[:2]]
    assert [text_of(engine, talk) for talk in asked] == [alone(tiny_loaded, talk) for talk in asked]
    assert engine.snapshot().pictures_seen == 2


MOVES = st.lists(
    st.tuples(st.sampled_from(("ask", "retry", "undo", "edit", "other", "new")), st.integers(0, 5)), max_size=8
)


def moved(talks: list[Conversation], move: str, number: int) -> list[Conversation]:
    """The talks after somebody did something in the first of them."""
    first, *rest = talks
    if move == "ask":
        return [first.ask(f"Why {number}?", NOISE[number : number + 1]), *rest]
    if move == "retry" and first.turns:
        return [first.retry(), *rest]
    if move == "undo" and len(first.turns) > 1:
        return [first.undo().retry(), *rest]
    if move == "edit" and first.turns:
        return [first.edit(number % len(first.turns), f"What {number}?"), *rest]
    if move == "other":
        return [*rest, first]
    return [Conversation().ask("Hm.", NOISE[number % 2 : number % 2 + 1]), *rest]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=MOVES, rows=st.integers(1, 3))
def test_reused_equals_read_anew_whatever_people_do(
    tiny_loaded: Loaded, moves: list[tuple[str, int]], rows: int
) -> None:
    engine = LocalEngine(tiny_loaded, plan=replace(tiny_loaded.plan, rows=rows))
    talks = [Conversation(), Conversation()]
    short = replace(GREEDY, max_new_tokens=6)
    for move, number in moves:
        talks = moved(talks, move, number)
        if talks[0].is_open:
            answer = text_of(engine, talks[0], short)
            assert answer == alone(tiny_loaded, talks[0], short)
            talks = [talks[0].answer(answer), *talks[1:]]
    engine.close()


# Faults


def test_a_fault_of_one_request_leaves_the_others_as_they_are(
    engine: LocalEngine, tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(spans: Sequence[Span]) -> None:
        if any(span.length == 1 and span.start == poisoned for span in spans):
            raise RuntimeError("poisoned")

    poisoned = (
        len(engine._compose(EIGHT[7], GREEDY)[0].ids) + 3
    )  # the longest prompt: only it has so many tokens so soon
    expected = [alone(tiny_loaded, talk, replace(GREEDY, max_new_tokens=3)) for talk in EIGHT[:7]]
    steps = Steps(engine, monkeypatch)
    steps.fails = fail
    with ThreadPoolExecutor(8) as people:
        bad = people.submit(text_of, engine, EIGHT[7])
        good = [people.submit(text_of, engine, talk, replace(GREEDY, max_new_tokens=3)) for talk in EIGHT[:7]]
    with pytest.raises(RuntimeError, match="poisoned"):
        bad.result()
    assert [talk.result() for talk in good] == expected
    steps.fails = lambda spans: None
    assert text_of(engine, EIGHT[7]) == alone(tiny_loaded, EIGHT[7])


def test_out_of_memory_once_is_not_noticed(
    engine: LocalEngine, tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(spans: Sequence[Span]) -> None:
        if sum(span.length for span in spans) > worker_module.CHUNK // 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(worker_module, "CHUNK", 100)
    Steps(engine, monkeypatch).fails = fail
    assert text_of(engine, EIGHT[0]) == alone(tiny_loaded, EIGHT[0])
    assert engine._worker.features.bytes == 0


def test_out_of_memory_for_good_is_a_named_error_for_that_request_only(
    engine: LocalEngine, tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(spans: Sequence[Span]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    steps = Steps(engine, monkeypatch)
    steps.fails = fail
    with pytest.raises(ModelError, match=r"too little free memory.*smaller model"):
        text_of(engine, EIGHT[0])
    steps.fails = lambda spans: None
    assert text_of(engine, EIGHT[0]) == alone(tiny_loaded, EIGHT[0])


def test_out_of_memory_in_the_vision_tower_is_tried_once_more(
    engine: LocalEngine, tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(tiny_loaded, EIGHT[0])
    see = engine._worker._prompts._see
    calls = iter([torch.OutOfMemoryError("CUDA out of memory.")])

    def fail_once(*arguments: object) -> torch.Tensor:
        for error in calls:
            raise error
        return see(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._worker._prompts, "_see", fail_once)
    assert text_of(engine, EIGHT[0]) == expected


def test_a_stop_while_the_prompt_is_read_ends_the_reading(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "CHUNK", 8)
    reached, go_on = threading.Event(), threading.Event()

    def wait(spans: Sequence[Span]) -> None:
        reached.set()
        assert go_on.wait(30)

    steps = Steps(engine, monkeypatch)
    steps.fails = wait
    answer = engine.answer(EIGHT[0], GREEDY)
    next(answer)
    assert reached.wait(30)
    answer.close()
    go_on.set()
    text_of(engine, Conversation().ask("Hello"), replace(GREEDY, max_new_tokens=1))
    assert sum(spans[0].row == steps.spans[0][0].row and spans[0].start < 40 for spans in steps.spans) < 12
    assert engine.snapshot().answering == 0


def test_closing_with_eight_answers_running_ends_them_all_at_once(tiny_loaded: Loaded) -> None:
    engine = LocalEngine(tiny_loaded)
    running = [engine.answer(talk, replace(GREEDY, max_new_tokens=400)) for talk in EIGHT]
    for answer in running:
        while not next(answer).text:
            pass
    threading.Thread(target=engine.close).start()
    finishes = set()
    for answer in running:
        finishes |= {piece.finish for piece in answer if piece.finish}
    assert finishes <= {"stopped", "stop", "length"}
    assert "stopped" in finishes
    with pytest.raises(BusyError):
        text_of(engine, EIGHT[0])


def test_a_thousand_requests_with_random_stops_leak_nothing_and_change_nothing(tiny_loaded: Loaded) -> None:
    short = replace(GREEDY, max_new_tokens=5)
    expected = {talk: alone(tiny_loaded, talk, short) for talk in EIGHT}
    threads = threading.active_count()
    engine = LocalEngine(tiny_loaded, plan=replace(tiny_loaded.plan, rows=4))

    def ask(number: int) -> bool:
        rng = random.Random(number)
        talk, stop_after = rng.choice(EIGHT), rng.choice((0, 1, 2, None, None))
        answer = engine.answer(talk, short)
        pieces = list(islice(answer, stop_after))
        answer.close()
        return stop_after is not None or "".join(piece.text for piece in pieces) == expected[talk]

    with ThreadPoolExecutor(8) as people:
        assert all(people.map(ask, range(1000)))
    text_of(engine, EIGHT[0], short)  # behind it, everything given up has been dropped
    snapshot = engine.snapshot()
    assert (snapshot.queued, snapshot.answering, engine._worker.slots.busy) == (0, 0, 0)
    assert snapshot.tokens_held <= 4 * tiny_loaded.plan.length
    assert snapshot.pictures_seen <= 4 * 8  # at most once for each, by whoever asks while it is being seen
    engine.close()
    assert threading.active_count() == threads
