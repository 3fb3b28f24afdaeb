"""Conversations grow, shrink and are kept; impossible ones cannot be written."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_app.conversation import Conversation, Turn, from_record, to_record
from llava_app.errors import DataError
from llava_app.images import Picture

RED, BLUE = (Picture(Image.new("RGB", (2, 2), colour), colour, f"{colour}.png") for colour in ("red", "blue"))
TALK = Conversation().ask("What is it?", [RED]).answer("A cat.").ask("And this?", [BLUE]).answer("A dog.")

marks = ("<image>", "<image>\n", "<\u2060image>", "<\u2060\u2060image>", "<", "image>", "\n", " ")
texts = st.lists(st.sampled_from(marks) | st.text(max_size=6), max_size=5).map("".join)
turns = st.builds(
    Turn, texts, st.lists(st.sampled_from([RED, BLUE]), max_size=3).map(tuple), texts, finish=st.just("stop")
)
finished = st.builds(Conversation, st.lists(turns, min_size=1, max_size=4).map(tuple), st.none() | texts)


def record(*values: str, **changes: Any) -> dict[str, Any]:
    """A record whose messages come from human and gpt in turn."""
    messages = [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]
    return {"id": "1", "conversations": messages} | changes


class TestTurns:
    def test_asking_and_answering_leaves_the_conversation_before_as_it_was(self) -> None:
        empty = Conversation()
        asked = empty.ask("Hi")
        answered = asked.answer("Hello", "length")
        assert (empty.turns, empty.is_open) == ((), False)
        assert (asked.turns, asked.is_open) == ((Turn("Hi"),), True)
        assert (answered.turns, answered.is_open) == ((Turn("Hi", (), "Hello", "length"),), False)

    def test_pictures_come_in_the_order_of_their_turns(self) -> None:
        assert TALK.pictures == (RED, BLUE)

    def test_retry_opens_the_last_turn_again(self) -> None:
        assert TALK.retry().turns == (TALK.turns[0], Turn("And this?", (BLUE,)))
        assert TALK.retry().retry() == TALK.retry()

    def test_resume_opens_the_last_answer_where_it_stopped(self) -> None:
        cut = TALK.retry().answer("A d", "length")
        assert cut.resume().is_open
        assert cut.resume().answer("A dog.") == TALK.retry().answer("A dog.")
        assert cut.resume().turns[-1].answer == "A d"

    def test_undo_removes_the_last_turn(self) -> None:
        assert TALK.undo().turns == TALK.turns[:1]
        assert TALK.ask("Why?").undo() == TALK

    def test_edit_asks_anew_with_the_same_pictures_and_drops_what_came_after(self) -> None:
        assert TALK.edit(0, "Where is it?").turns == (Turn("Where is it?", (RED,)),)
        assert TALK.edit(1, "And that?").turns == (TALK.turns[0], Turn("And that?", (BLUE,)))

    def test_the_system_prompt_stays(self) -> None:
        talk = Conversation(system="Be brief.").ask("Hi").answer("Hello").ask("Why?").undo().retry().edit(0, "Ho")
        assert talk.system == "Be brief."

    def test_what_cannot_be_done_says_why(self) -> None:
        empty, waiting = Conversation(), TALK.ask("Why?")
        for attempt, reason in (
            (lambda: waiting.ask("Hello?"), "last question has no answer yet; answer it or undo it"),
            (lambda: TALK.answer("No."), "no open question to answer; ask one first"),
            (lambda: empty.answer("No."), "no open question to answer; ask one first"),
            (empty.resume, "no answer to continue"),
            (TALK.retry().resume, "no answer to continue"),
            (lambda: to_record(TALK.resume(), "1", ["a", "b"]), "a record needs"),
            (empty.retry, "nothing to retry; the conversation has no turns"),
            (empty.undo, "nothing to undo; the conversation has no turns"),
            (lambda: TALK.edit(2, "?"), "no turn 2 to edit; the conversation has 2, counted from 0"),
            (lambda: TALK.edit(-1, "?"), "no turn -1 to edit"),
            (lambda: empty.edit(0, "?"), "no turn 0 to edit; the conversation has 0"),
        ):
            with pytest.raises(ValueError, match=reason):
                attempt()

    def test_impossible_turns_cannot_be_written(self) -> None:
        with pytest.raises(ValueError, match="finish is 'done'; it must be one of stop, length"):
            Turn("Hi", answer="Hello", finish="done")
        with pytest.raises(ValueError, match="there is no answer that could have ended"):
            Turn("Hi", finish="stop")
        with pytest.raises(ValueError, match="turn 1 of 2 has no answer"):
            Conversation((Turn("Hi"), Turn("Ho")))

    def test_half_a_surrogate_pair_becomes_the_replacement_character(self) -> None:
        talk = Conversation(system="\ud800").ask("a\ud83d").answer("\ude00b")
        assert (talk.system, talk.turns[0].question, talk.turns[0].answer) == ("\ufffd", "a\ufffd", "\ufffdb")
        assert Turn("😀").question == "😀"


class TestRecords:
    def test_a_record_is_what_llava_trains_on(self) -> None:
        assert to_record(TALK, "17", ["red.png", "blue.png"]) == {
            "id": "17",
            "image": ["red.png", "blue.png"],
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A cat."},
                {"from": "human", "value": "<image>\nAnd this?"},
                {"from": "gpt", "value": "A dog."},
            ],
        }

    def test_one_picture_is_a_name_and_none_is_left_out(self) -> None:
        assert to_record(TALK.undo(), "1", ["red.png"])["image"] == "red.png"
        assert "image" not in to_record(Conversation().ask("Hi").answer("Hello"), "1")

    @settings(max_examples=200, deadline=None)
    @given(conversation=finished)
    def test_a_conversation_comes_back_from_its_record(self, conversation: Conversation) -> None:
        names = [picture.name for picture in conversation.pictures]
        written = json.dumps(to_record(conversation, "1", names), ensure_ascii=False).encode()
        assert from_record(json.loads(written), conversation.pictures) == conversation

    @settings(max_examples=100, deadline=None)
    @given(conversation=finished)
    def test_every_mark_in_a_record_stands_for_a_picture(self, conversation: Conversation) -> None:
        names = [picture.name for picture in conversation.pictures]
        values = [turn["value"] for turn in to_record(conversation, "1", names)["conversations"]]
        assert sum(value.count("<image>") for value in values) == len(conversation.pictures)

    @pytest.mark.parametrize(
        ("value", "question", "count"),
        [
            ("<image>\nWhat is it?", "What is it?", 1),
            ("What is it?\n<image>", "What is it?", 1),
            ("<image>", "", 1),
            ("<image>\n<image>\nCompare.", "Compare.", 2),
            ("<image><image> Compare.", "Compare.", 2),
            ("What is it?", "What is it?", 0),
        ],
    )
    def test_pictures_may_stand_anywhere_in_a_question(self, value: str, question: str, count: int) -> None:
        assert from_record(record(value, "A cat."), [RED] * count).turns == (
            Turn(question, (RED,) * count, "A cat.", "stop"),
        )

    def test_a_first_message_from_the_system_is_the_system_prompt(self) -> None:
        messages = [{"from": "system", "value": "Be brief."}, *record("Hi", "Ho")["conversations"]]
        assert from_record({"conversations": messages}).system == "Be brief."

    @pytest.mark.parametrize(
        ("broken", "reason"),
        [
            ({}, 'no "conversations"'),
            ({"conversations": []}, 'no "conversations"'),
            ({"conversations": "Hi"}, 'no "conversations"'),
            ({"conversations": ["Hi"]}, 'message 1 has no text in "value"'),
            ({"conversations": [{"from": "human", "value": None}]}, 'message 1 has no text in "value"'),
            (record("Hi"), r'question 1 has no answer; the last message must be from "gpt"'),
            (record("Hi", "Ho", "Why?"), "question 2 has no answer"),
            ({"conversations": [{"from": "gpt", "value": "Hi"}]}, 'message 1 is from "gpt"; it must be from "human"'),
            ({"conversations": [{"value": "Hi"}]}, 'message 1 is from "None"; it must be from "human"'),
            ({"conversations": [{"from": "system", "value": "Hi"}]}, "question 1 has no answer"),
            (
                {"conversations": [{"from": role, "value": ""} for role in ("system", "human", "user")]},
                'message 3 is from "user"; it must be from "gpt"',
            ),
            (record("<image>\nHi", "Ho"), "hold 1 <image> but there are 0 pictures"),
            (record("Hi", "Ho <image>"), "answer 1 holds an <image>; only questions may show pictures"),
        ],
    )
    def test_a_broken_record_is_refused_by_what_is_wrong(self, broken: dict[str, Any], reason: str) -> None:
        with pytest.raises(DataError, match=reason):
            from_record(broken)

    def test_a_picture_too_many_is_refused(self) -> None:
        with pytest.raises(DataError, match="hold 1 <image> but there are 2 pictures"):
            from_record(record("<image>\nHi", "Ho"), [RED, BLUE])

    def test_only_finished_conversations_with_all_their_names_are_written(self) -> None:
        for conversation, names in ((TALK.retry(), ["a", "b"]), (Conversation(), []), (TALK, ["a"])):
            with pytest.raises(ValueError, match=r"record needs|1 image names for 2 pictures"):
                to_record(conversation, "1", names)
