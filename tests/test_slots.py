from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_app.conversation import Conversation
from llava_app.engine import Sampling
from llava_app.engine.local import LocalEngine
from llava_app.engine.slots import Place, Slots
from llava_app.loading import Loaded

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=10)  # so few kinds that many begin alike
ASKED = st.lists(st.tuples(TOKENS, TOKENS, st.integers(0, 20), st.booleans()), max_size=12)


def common(one: list[int], other: list[int]) -> int:
    differ = (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(differ, min(len(one), len(other)))


@given(st.integers(1, 4), ASKED)
def test_what_is_reused_is_in_the_cache_and_as_much_as_any_row_has(
    rows: int, asked: list[tuple[list[int], list[int], int, bool]]
) -> None:
    slots, caches, busy = Slots(rows), [[] for _ in range(rows)], []
    for prompt, answer, read, stays in asked:
        if not slots.free:
            slots.release(busy.pop(0))
        before = caches[:]
        place = slots.take(prompt)
        assert place.row not in busy
        assert caches[place.source][: place.length] == prompt[: place.length]
        assert place.length == min(max(common(cache, prompt) for cache in caches), len(prompt) - 1)
        assert place.row == place.source or caches[place.source] == before[place.source]
        caches[place.row] = (prompt + answer)[: max(place.length, read)]
        slots.extend(place.row, caches[place.row][place.length :])
        if stays:
            busy.append(place.row)
        else:
            slots.release(place.row)
        assert (slots.busy, slots.tokens) == (len(busy), sum(map(len, caches)))
        assert slots.free == (len(busy) < rows)


def held(slots: Slots, tokens: list[int], *, busy: bool = False) -> int:
    """The row that a conversation was read into, all of it."""
    place = slots.take(tokens)
    slots.extend(place.row, tokens[place.length :])
    if not busy:
        slots.release(place.row)
    return place.row


TALK = [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("prompt", "length"),
    [
        pytest.param([*TALK, 9, 10], 8, id="next turn"),
        pytest.param(TALK, 7, id="the same again"),
        pytest.param(TALK[:6], 5, id="retry"),
        pytest.param([*TALK[:5], 9, 9, 9], 5, id="edit"),
    ],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_conversation_goes_on_in_its_row_unless_more_would_be_lost_and_another_is_empty(
    rows: int, prompt: list[int], length: int
) -> None:
    slots = Slots(rows)
    row = held(slots, TALK)
    place = slots.take(prompt)
    assert (place.source, place.length) == (row, length)
    assert (place.row == row) == (rows == 1 or length == len(TALK))


def test_a_row_of_which_only_the_beginning_is_shared_keeps_what_it_has() -> None:
    slots = Slots(2)
    first = held(slots, TALK)
    place = slots.take([1, 2, 3, 9, 9])
    assert place == Place(1 - first, first, 3)
    slots.release(place.row)
    assert slots.take([*TALK, 9]) == Place(first, first, 8)


def test_the_only_row_is_cut_to_the_beginning_that_is_shared() -> None:
    slots = Slots(1)
    held(slots, TALK)
    assert slots.take([1, 2, 3, 9, 9]) == Place(0, 0, 3)
    assert slots.tokens == 3


def test_a_busy_row_is_copied_from_and_never_given_away() -> None:
    slots = Slots(2)
    first = held(slots, TALK, busy=True)
    assert slots.take([*TALK, 9]) == Place(1 - first, first, 8)
    assert not slots.free
    with pytest.raises(IndexError):
        slots.take(TALK)


def test_empty_rows_are_taken_first_and_then_those_that_rest_longest() -> None:
    slots = Slots(3)
    rows = [held(slots, [number, number]) for number in range(3)]
    assert sorted(rows) == [0, 1, 2]
    held(slots, [0, 0, 0])  # goes on, so that the second now rests longest
    assert slots.take([9]).row == rows[1]


def test_a_row_does_not_pretend_to_hold_what_could_not_be_copied(
    tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def text_of(conversation: Conversation) -> str:
        return "".join(piece.text for piece in engine.answer(conversation, Sampling(temperature=0, max_new_tokens=20)))

    def fail(*numbers: int) -> None:
        monkeypatch.setattr(decoder, "copy", copy)
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = LocalEngine(tiny_loaded, plan=replace(tiny_loaded.plan, rows=2))
    decoder, copy = engine._worker._decoder, engine._worker._decoder.copy
    beginning = Conversation(system="Answer").ask("very " * 10)
    text_of(Conversation(system="Other").ask("other " * 20))
    expected = text_of(beginning)
    text_of(Conversation(system="Answer").ask("very " * 10 + "funny " * 30))
    monkeypatch.setattr(decoder, "copy", fail)
    assert text_of(beginning) == expected
    engine.close()
