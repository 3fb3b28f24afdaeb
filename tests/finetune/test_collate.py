from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.collate import CHUNK, IGNORE, PAD_MULTIPLE, StepCollator, StepSampler, pack, pad
from llava_app.prompts import Encoded

PAD, IMAGE = 99, 98


def example(ids: list[int], supervised: list[int], images: int = 0) -> Encoded:
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[supervised] = True
    return Encoded(torch.tensor(ids), mask, torch.full((images, 3, 2, 2), float(ids[0])) if images else None)


def sampler(lengths: list[int], images: list[bool] | None = None, **settings: int) -> StepSampler:
    settings = {"global_batch": 4, "total": 100, "grouped": True} | settings
    return StepSampler(lengths, images or [True] * len(lengths), **settings)


def test_labels_are_the_supervised_tokens_and_nothing_else() -> None:
    batch = pad([example([5, 6, 7, 8], [2, 3]), example([9, 10], [1])], PAD)
    assert batch.input_ids[:, :4].tolist() == [[5, 6, 7, 8], [9, 10, PAD, PAD]]
    assert batch.labels[:, :4].tolist() == [[IGNORE, IGNORE, 7, 8], [IGNORE, 10, IGNORE, IGNORE]]
    assert (batch.input_ids[:, 4:] == PAD).all()
    assert (batch.labels[:, 4:] == IGNORE).all()
    assert (batch.supervised, batch.tokens) == (3, 6)


@pytest.mark.parametrize("length", [1, 7, 8, 9])
def test_widths_are_whole_multiples(length: int) -> None:
    width = pad([example(list(range(length)), [])], PAD).input_ids.shape[1]
    assert width % PAD_MULTIPLE == 0
    assert 0 <= width - length < PAD_MULTIPLE


def test_packed_examples_follow_each_other_and_their_positions_start_anew() -> None:
    batch = pack([example([5, 6, 7], [0, 2], images=1), example([9, 10], [0, 1], images=2)], IMAGE)
    assert batch.input_ids.tolist() == [[5, 6, 7, 9, 10]]
    assert batch.labels.tolist() == [[IGNORE, IGNORE, 7, IGNORE, 10]]
    assert batch.positions is not None
    assert batch.pixel_values is not None
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [5, 9, 9]
    assert (batch.lengths.tolist(), batch.supervised, batch.tokens) == ([3, 2], 2, 5)


def test_a_packed_row_has_what_all_begin_with_once() -> None:
    one, other = example([1, 2, 3, IMAGE, 5, 6], [5], images=1), example([1, 2, 3, IMAGE, 7], [4], images=1)
    batch = pack([one, other, one], IMAGE)
    assert batch.parts is not None
    assert batch.positions is not None
    assert batch.parts.tolist() == [3, 3, 2, 3]
    assert batch.input_ids.tolist() == [[1, 2, 3, IMAGE, 5, 6, IMAGE, 7, IMAGE, 5, 6]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 3, 4, 5]]
    assert (batch.tokens, batch.supervised) == (17, 3)


@st.composite
def alike(draw: st.DrawFn) -> list[Encoded]:
    """Examples that may begin alike, with what is learned anywhere."""
    ids = draw(st.lists(st.lists(st.sampled_from([1, 2, IMAGE]), min_size=1, max_size=8), min_size=1, max_size=4))
    return [example(some, draw(st.lists(st.integers(0, len(some) - 1), max_size=3))) for some in ids]


@given(alike())
def test_a_packed_row_has_every_example_whole(examples: list[Encoded]) -> None:
    batch, lone = pack(examples, IMAGE), [pack([some], IMAGE) for some in examples]
    assert batch.parts is not None
    shared, *own = (
        part for tensor in (batch.input_ids, batch.labels) for part in tensor[0].split(batch.parts.tolist())
    )
    ids, begun, labels = own[: len(examples)], own[len(examples)], own[len(examples) + 1 :]
    assert (begun == IGNORE).all()
    assert IMAGE not in shared.tolist()
    for some, its_ids, its_labels in zip(lone, ids, labels, strict=True):
        assert torch.equal(torch.cat((shared, its_ids))[None], some.input_ids)
        assert torch.equal(torch.cat((begun, its_labels))[None], some.labels)
        assert its_labels[0] == IGNORE or len(examples) == 1
    assert batch.supervised == sum(some.supervised for some in lone)


def test_a_packed_step_has_one_row_per_micro_batch() -> None:
    batches = StepCollator(PAD, IMAGE, 2, packing=True)([example([n, n], []) for n in range(5)])
    assert [batch.input_ids.shape for batch in batches] == [(1, 4), (1, 4), (1, 2)]


def test_pictures_keep_the_order_of_their_rows() -> None:
    batch = pad([example([1], [], images=2), example([2], [], images=1)], PAD)
    assert batch.pixel_values is not None
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [1, 1, 2]


def test_a_first_token_is_never_counted_since_nothing_predicts_it() -> None:
    assert pad([example([1, 2], [0, 1])], PAD).supervised == 1


def test_a_step_is_cut_into_micro_batches() -> None:
    batches = StepCollator(PAD, IMAGE, 2, packing=False)([example([n], []) for n in range(5)])
    assert [len(batch.input_ids) for batch in batches] == [2, 2, 1]


def test_every_example_comes_once_per_epoch() -> None:
    steps = sampler([3] * 11, total=6)
    assert steps.steps_per_epoch == 3
    epochs = list(steps)
    for start in (0, 3):
        seen = [index for step in epochs[start : start + 3] for index in step]
        assert sorted(seen) == list(range(11))
    assert epochs[:3] != epochs[3:]


def test_packed_steps_mix_pictures_and_texts_and_are_as_few_as_can_be() -> None:
    steps = sampler([1] * 50, [number % 3 > 0 for number in range(50)], total=13, grouped=False)
    assert steps.steps_per_epoch == 13
    assert sorted(index for step in steps for index in step) == list(range(50))
    assert any(len({index % 3 > 0 for index in step}) == 2 for step in steps)


def test_pictures_and_texts_never_share_a_step() -> None:
    images = [number % 3 > 0 for number in range(50)]
    for step in sampler([1] * 50, images, total=13):
        assert len({images[index] for index in step}) == 1


def test_order_follows_from_the_seed() -> None:
    lengths = list(range(40))
    assert list(sampler(lengths, seed=1, total=20)) == list(sampler(lengths, seed=1, total=20))
    assert list(sampler(lengths, seed=1, total=20)) != list(sampler(lengths, seed=2, total=20))


@pytest.mark.parametrize("start", [0, 1, 9, 10, 11, 29])
def test_a_later_start_continues_the_same_order(start: int) -> None:
    lengths = [number * 7 % 13 for number in range(40)]
    assert list(sampler(lengths, total=30, start=start)) == list(sampler(lengths, total=30))[start:]


def test_steps_hold_examples_of_similar_length() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 1000, (4 * CHUNK * 3,), generator=generator).tolist()
    steps = list(sampler(lengths, total=CHUNK * 3))
    padding = sum(max(lengths[i] for i in step) * len(step) - sum(lengths[i] for i in step) for step in steps)
    assert padding < 0.1 * sum(lengths)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_each_step_without_repeating_anything(processes: int) -> None:
    shares = [list(sampler([1] * 11, total=3, process=p, processes=processes)) for p in range(processes)]
    for whole, *parts in zip(sampler([1] * 11, total=3), *shares, strict=True):
        assert Counter(index for part in parts for index in part) == Counter(whole)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_process_without_an_example_takes_the_first_again() -> None:
    shares = [list(sampler([1], total=1, process=p, processes=2)) for p in range(2)]
    assert shares == [[[0]], [[0]]]
