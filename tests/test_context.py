import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaProcessor

from llava_app.conversation import Conversation, Turn
from llava_app.engine.context import fit
from llava_app.errors import ContextError
from llava_app.images import Picture
from llava_app.prompts import tokenise

PICTURE, SYSTEM = 10, 5  # what they take in the prompts that `count` counts
PICTURES = [Picture(Image.new("RGB", (2, 2)), str(number)) for number in range(8)]


def count(conversation: Conversation) -> int:
    system = SYSTEM if conversation.system is None else len(conversation.system.split())
    texts = [text for turn in conversation.turns for text in (turn.question, turn.answer or "")]
    return system + sum(len(text.split()) for text in texts) + PICTURE * len(conversation.pictures)


def turn(question: int, answer: int | None = None, pictures: slice = slice(0)) -> Turn:
    words = None if answer is None else "a " * answer
    return Turn("q " * question, tuple(PICTURES[pictures]), words)


def turns_of(size: int, most: int) -> st.SearchStrategy[list[Turn]]:
    """Answered turns; each of up to two pictures and of up to `size` words in question and in answer."""
    words, pictures = st.integers(0, size), st.integers(0, 2).map(slice)
    return st.lists(st.builds(turn, words, words, pictures), max_size=most)


CONVERSATIONS = st.builds(
    lambda answered, last: Conversation((*answered, last)),
    turns_of(20, 12),
    st.builds(turn, st.integers(0, 60), st.none(), st.integers(0, 4).map(slice)),
)


@given(CONVERSATIONS, st.integers(1, 25))
def test_what_is_kept_fits_and_ends_as_the_conversation_does(conversation: Conversation, room: int) -> None:
    try:
        kept, left_out = fit(conversation, count, limit=100, room=room)
    except ContextError:
        assert count(Conversation(conversation.turns[-1:])) >= 100
        return
    number = len(kept.turns)
    assert count(kept) + room <= 100 or (number == 1 and count(kept) < 100)
    assert kept.turns[1:] == conversation.turns[len(conversation.turns) - number + 1 :]
    assert kept.turns[-1].question == conversation.turns[-1].question
    assert len(kept.pictures) >= len(conversation.turns[-1].images)
    assert conversation.pictures[len(conversation.pictures) - len(kept.pictures) :] == kept.pictures
    assert kept.system == conversation.system
    assert (left_out is None) == (kept == conversation)


def test_what_fits_is_left_as_it_is() -> None:
    conversation = Conversation((turn(10, 20, slice(2)), turn(5)))
    assert count(conversation) == 60
    assert fit(conversation, count, limit=70, room=10) == (conversation, None)


def test_the_oldest_turns_go_first_and_their_pictures_stay_in_order() -> None:
    answered = (turn(1, 20, slice(0, 1)), turn(2, 20, slice(1, 2)), turn(3, 10, slice(2, 3)))
    kept, left_out = fit(Conversation((*answered, turn(4))), count, limit=100, room=20)
    assert kept.turns == (turn(3, 10, slice(3)), turn(4))
    assert left_out == "The model reads 100 tokens at most and no longer sees the first 2 questions."


def test_then_the_oldest_pictures_go() -> None:
    conversation = Conversation((turn(1, 20, slice(4)), turn(30, pictures=slice(4, 8))))
    kept, left_out = fit(conversation, count, limit=100, room=5)
    assert kept.turns == (turn(30, pictures=slice(2, 8)),)
    assert left_out == "The model reads 100 tokens at most and no longer sees the first question and 2 of the pictures."


@given(st.integers(1, 25), st.integers(0, 30))
def test_pictures_of_earlier_turns_go_before_the_room_for_an_answer_does(room: int, words: int) -> None:
    conversation = Conversation((turn(1, 1, slice(8)), turn(words)))
    kept, _ = fit(conversation, count, limit=100, room=room)
    assert count(kept) + room <= 100


@pytest.mark.parametrize("earlier", [(), (turn(1, 1, slice(1)),)])
def test_a_message_that_cannot_fit_is_refused_with_both_numbers(earlier: tuple[Turn, ...]) -> None:
    conversation = Conversation((*earlier, turn(1985, pictures=slice(1))))
    with pytest.raises(ContextError, match=r"has 2,000 tokens.* at most 2,000.*Shorten the question"):
        fit(conversation, count, limit=2000, room=500)
    assert fit(conversation, count, limit=2001, room=500)[0].turns[-1].images[-1:] == tuple(PICTURES[:1])


def first_turns(turns: list[Turn], limit: int, room: int) -> list[int]:
    """Which turn was the first that the model saw at each of the questions of a growing conversation."""
    firsts = []
    for number, asked in enumerate(turns):
        open_turn = Turn(asked.question, asked.images)
        kept, _ = fit(Conversation((*turns[:number], open_turn)), count, limit=limit, room=room)
        firsts.append(number + 1 - len(kept.turns))
    return firsts


@given(st.lists(st.builds(turn, st.integers(1, 10), st.integers(0, 20)), max_size=20))
@settings(max_examples=30, deadline=None)
def test_a_growing_conversation_keeps_its_beginning_from_one_question_to_the_next(turns: list[Turn]) -> None:
    """No turn takes more than an eighth of the context, so at least three fit into the half that was emptied."""
    firsts = first_turns(turns, limit=240 + SYSTEM + 30, room=30)
    cuts = [number for number, (before, after) in enumerate(pairwise(firsts)) if after != before]
    assert firsts == sorted(firsts)
    assert all(after - before > 2 for before, after in pairwise(cuts))


def test_the_conversation_fits_the_tokens_that_a_processor_makes(processor: LlavaProcessor) -> None:
    def tokens(of: Conversation) -> int:
        sizes = [4] * len(of.pictures)
        return len(tokenise(of, processor, picture_tokens=sizes, open_answer=of.is_open)[0])

    conversation, texts = Conversation(), []
    for number in range(12):
        conversation = conversation.ask(f"What is funny? {number}", PICTURES[number : number + 1])
        kept, left_out = fit(conversation, tokens, limit=200, room=20)
        assert tokens(kept) + 20 <= 200
        assert kept.pictures == conversation.pictures
        texts.append(left_out)
        conversation = conversation.answer("A joke, and polite answers to the user.")
    gone = [int(re.findall(r"first (\d+) q", text)[0]) for text in texts if text and "first question" not in text]
    assert texts[0] is None
    assert gone == sorted(gone)
    assert 1 < len(set(gone)) < len(gone)
