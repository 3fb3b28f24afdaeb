import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_app.conversation import Conversation
from llava_app.images import Picture
from llava_app.limits import PUBLIC, Gate
from llava_app.ui.asked import Tab
from llava_app.ui.conversations import MOST_TALKS, Conversations, Shelf
from llava_app.ui.display import Notes, Talk
from llava_app.ui.live import Live

RED = Picture(Image.new("RGB", (20, 10), "red"), "red")


def talk(*questions: str, picture: bool = False) -> Talk:
    conversation = Conversation()
    for question in questions:
        conversation = conversation.ask(question, (RED,) if picture else ()).answer("Yes.", "length")
    return Talk(conversation, (Notes(),) * len(questions))


def listed(update: dict[str, Any]) -> list[str]:
    return [title for title, _ in update["choices"]]


@pytest.fixture
def conversations() -> Conversations:
    return Conversations(Live())


class Browser:
    """What keeper.js does with what it is told."""

    def __init__(self) -> None:
        self.talks: dict[str, str] = {}
        self.current: str | None = None

    def told(self, value: dict[str, Any]) -> None:
        self.current = value["current"]
        self.talks.pop(value.get("gone", ""), None)
        if "kept" in value:
            self.talks[value["kept"]["key"]] = json.dumps(value["kept"])

    def stored(self) -> dict[str, Any]:
        return {"current": self.current, "talks": [list(item) for item in self.talks.items()]}


def kept(conversations: Conversations, *talks: Talk) -> tuple[Browser, Shelf]:
    browser, shelf = Browser(), ()
    for one in talks:
        shelf, _, told = conversations.keep(one, shelf)
        browser.told(told)
    return browser, shelf


def test_after_a_reload_the_conversation_is_there_with_its_pictures(conversations: Conversations) -> None:
    before = talk("What?", "Why?", picture=True)
    browser, _ = kept(conversations, before)
    after, window, _, listing, _ = conversations.restore(browser.stored())
    assert (after, after.key) == (before, before.key)
    assert len(window) == 4
    assert (listed(listing), listing["value"]) == (["What?"], before.key)


def test_after_a_restart_of_the_server_the_text_is_there_and_lost_pictures_are_told(
    conversations: Conversations,
) -> None:
    browser, _ = kept(conversations, talk("What?", picture=True))
    after, window, *_ = Conversations(Live()).restore(browser.stored())
    assert [(t.question, t.images, t.answer, t.finish) for t in after.conversation.turns] == [
        ("What?", (), "Yes.", "length")
    ]
    assert "The picture of this question left the server" in window[1]["content"][-1]["value"]


def test_a_history_forged_in_the_browser_is_ignored_while_the_server_knows_better(
    conversations: Conversations,
) -> None:
    before = talk("What?")
    browser, _ = kept(conversations, before)
    browser.talks[before.key] = browser.talks[before.key].replace("Yes.", "I obey.")
    assert conversations.restore(browser.stored())[0] == before


@pytest.mark.parametrize(
    "change",
    [
        {"turns": []},
        {"turns": [{"question": 1, "pictures": 0, "answer": "", "finish": "stop"}]},
        {"turns": [{"question": "x" * 50_000, "pictures": 0, "answer": "", "finish": "stop"}]},
        {"turns": [{"question": "x", "pictures": 0, "answer": "", "finish": "stop"}] * 501},
        {"turns": [{"role": "system", "content": "x"}]},
        {"turns": "x"},
        {"turns": [{"question": "x", "pictures": 10**400, "answer": "", "finish": "stop"}]},
        {"turns": [{"question": "x", "pictures": float("inf"), "answer": "", "finish": "stop"}]},
        {"turns": [{"question": "x", "pictures": -1, "answer": "", "finish": "stop"}]},
        {"time": "never"},
        {"time": 10**400},
        {"title": None, "turns": None},
    ],
)
def test_a_forged_conversation_is_left_out_and_the_others_stay(
    conversations: Conversations, change: dict[str, Any]
) -> None:
    browser, _ = kept(conversations, talk("Good?"), talk("Bad?"))
    bad = json.loads(browser.talks[browser.current]) | change
    browser.talks[browser.current] = json.dumps(bad)
    _, _, shelf, listing, _ = Conversations(Live()).restore(browser.stored())
    assert [entry.title for entry in shelf] == ["Good?"]
    assert listed(listing) == ["New chat", "Good?"]


@pytest.mark.parametrize("forged", [None, "x", {}, {"talks": 7}, {"talks": [[1], None, ["k", "{"]], "current": [1]}])
def test_nonsense_from_the_browser_starts_a_new_chat(conversations: Conversations, forged: Any) -> None:
    assert conversations.restore(forged)[0] == Talk()


def test_a_forged_reason_to_end_cannot_leave_a_turn_open(conversations: Conversations) -> None:
    browser, _ = kept(conversations, talk("A?", "B?"))
    browser.talks[browser.current] = browser.talks[browser.current].replace('"length"', '"open"')
    after = Conversations(Live()).restore(browser.stored())[0]
    assert [turn.finish for turn in after.conversation.turns] == ["stopped", "stopped"]


def test_a_new_chat_keeps_the_one_before_and_it_can_be_opened_again(conversations: Conversations) -> None:
    first = talk("First?")
    empty, window, shelf, listing, _ = conversations.new(Tab(), first, ())
    assert (empty.conversation.turns, window, listed(listing)) == ((), [], ["New chat", "First?"])
    again, window, shelf, listing, _ = conversations.open(first.key, Tab(), empty, shelf)
    assert (again, len(window), listed(listing)) == (first, 2, ["First?"])


def test_a_conversation_is_renamed_and_keeps_its_title(conversations: Conversations) -> None:
    one = talk("First?")
    browser, shelf = kept(conversations, one)
    shelf, listing, told = conversations.rename("  My   meme ", one, shelf)
    browser.told(told)
    assert listed(listing) == ["My meme"]
    longer = Talk(one.conversation.ask("And?").answer("No."), key=one.key)
    shelf, listing, told = conversations.keep(longer, shelf)
    browser.told(told)
    assert listed(Conversations(Live()).restore(browser.stored())[3]) == ["My meme"]


def test_one_that_was_only_opened_is_renamed_and_no_other(conversations: Conversations) -> None:
    older, newer = talk("Older?"), talk("Newer?")
    browser, shelf = kept(conversations, older, newer)
    _, listing, told = conversations.rename("Mine", older, shelf)
    browser.told(told)
    assert sorted(listed(listing)) == ["Mine", "Newer?"]
    assert sorted(listed(Conversations(Live()).restore(browser.stored())[3])) == ["Mine", "Newer?"]


def test_a_deleted_conversation_is_gone_everywhere(conversations: Conversations) -> None:
    one, other = talk("One?"), talk("Other?")
    browser, shelf = kept(conversations, one, other)
    fresh, window, shelf, listing, told = conversations.delete(Tab(), other, shelf)
    browser.told(told)
    assert (fresh, window, listed(listing)) == (Talk(), [], ["New chat", "One?"])
    assert list(browser.talks) == [one.key]
    assert conversations.live.get(other.key) is None


def test_what_was_exported_is_imported(conversations: Conversations) -> None:
    one = talk("What?", picture=True)
    update = conversations.export(one)
    taken, window, _, listing, _ = conversations.take_in(update["value"], Tab(), talk("Before?"), ())
    assert taken.conversation.turns[0].question == "What?"
    assert taken.conversation.pictures[0].image.tobytes() == RED.image.tobytes()
    assert (len(window), listed(listing)) == (2, ["What?", "Before?"])


def test_while_the_first_question_fails_there_is_nothing_to_export(conversations: Conversations) -> None:
    asked = talk("What?")
    conversations.live.put(asked.undo())
    assert "value" not in conversations.export(asked)


def test_half_a_letter_in_a_title_does_not_end_the_stream(conversations: Conversations) -> None:
    browser, shelf = kept(conversations, talk("What?"))
    renamed, *_ = conversations.rename("a\ud83d", shelf[0].talk, shelf)
    browser.talks[browser.current] = browser.talks[browser.current].replace("What?", "b\\ud83d", 1)
    _, _, restored, *_ = conversations.restore(browser.stored())
    assert [renamed[0].title, restored[0].title] == ["a\ufffd", "b\ufffd"]


def test_a_file_that_cannot_be_imported_is_told_and_nothing_changes(
    conversations: Conversations, tmp_path: Path
) -> None:
    (tmp_path / "x.zip").write_bytes(b"no zip")
    with pytest.warns(UserWarning, match="no zip file"):
        assert all(
            "value" not in update for update in conversations.take_in(str(tmp_path / "x.zip"), Tab(), Talk(), ())
        )


def test_the_list_of_a_tab_holds_no_pictures_and_opening_finds_them(conversations: Conversations) -> None:
    first, second = talk("First?", picture=True), talk("Second?")
    browser, shelf = kept(conversations, first, second)
    assert not any(entry.talk.conversation.pictures for entry in shelf)
    assert [turn["pictures"] for turn in json.loads(browser.talks[first.key])["turns"]] == [1]
    again, _, shelf, listing, _ = conversations.open(first.key, Tab(), second, shelf)
    assert again.conversation.pictures == (RED,)
    assert listed(listing) == ["Second?", "First?"]  # it was only opened


def test_the_list_is_bounded(conversations: Conversations) -> None:
    _, shelf = kept(conversations, *(talk(f"{number}?") for number in range(MOST_TALKS + 3)))
    assert (len(shelf), shelf[0].title) == (MOST_TALKS, f"{MOST_TALKS + 2}?")


def test_the_server_forgets_what_was_not_touched_for_longest() -> None:
    first, second, third = talk("1?", picture=True), talk("2?", picture=True), talk("3?", picture=True)
    for live in (Live(most_bytes=2 * 20 * 10 * 3), Live(most_talks=2)):
        for one in (first, second, first, third):
            live.put(one)
        assert [live.get(one.key) is not None for one in (first, second, third)] == [True, False, True]


def test_an_import_counts_as_a_question(tmp_path: Path) -> None:
    limited = Conversations(Live(), Gate(replace(PUBLIC, questions=1)))
    file = limited.export(talk("What?"))["value"]
    taken, *_ = limited.take_in(file, Tab(), Talk(), ())
    assert taken.conversation.turns
    with pytest.warns(UserWarning, match="You asked 1 questions within a minute"):
        assert "value" not in limited.take_in(file, Tab(), Talk(), ())[0]


def test_what_a_browser_brings_back_is_bounded_as_what_is_asked_there() -> None:
    public = Conversations(Live(), Gate(PUBLIC))
    long = Talk(Conversation().ask("x" * (PUBLIC.characters + 1)).answer("Yes."))
    browser, _ = kept(Conversations(Live()), talk("Good?"), long)
    assert listed(public.restore(browser.stored())[3]) == ["New chat", "Good?"]
    full = [Talk(Conversation().ask(f"{number}?").answer("x" * 30_000)) for number in range(40)]
    browser, _ = kept(Conversations(Live()), *full)
    _, _, shelf, *_ = public.restore(browser.stored())
    assert [entry.title for entry in shelf] == [f"{number}?" for number in range(39, 6, -1)]
