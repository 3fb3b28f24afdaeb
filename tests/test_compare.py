from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from llava_app.checkpoints import Card, write_card
from llava_app.conversation import Conversation
from llava_app.engine import Piece, Sampling
from llava_app.errors import ModelError
from llava_app.limits import LOCAL, Gate
from llava_app.ui import compare as tab
from llava_app.ui.compare import Compare, Match
from llava_app.ui.models import Models, Ready
from llava_app.ui.votes import VERDICTS, Vote, Votes
from tests.disks import room_for

PATIENCE = 30  # s
SETTINGS = (0.0, 16.0)  # temperature, longest answer


class Parrot:
    """An engine that says its name and how many questions it has heard; one named Broken breaks off."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.closed = False

    def answer(self, conversation: Conversation, sampling: Sampling) -> Iterator[Piece]:
        yield Piece(f"{self.card.name} ", tokens=1)
        if self.card.name == "Broken":
            raise ModelError("It broke.")
        yield Piece(f"heard {len(conversation.turns)}", "stop", tokens=3)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was shown in a corner of the page."""
    told: list[str] = []
    for kind in ("Warning", "Info"):
        monkeypatch.setattr(gr, kind, lambda text, **_: told.append(text))
    return told


@pytest.fixture
def opened() -> list[tuple[Parrot, str]]:
    return []


@pytest.fixture
def models(tmp_path: Path, opened: list[tuple[Parrot, str]]) -> Models:
    """Four trained models, of which one was trained from another; every loading is noted in `opened`."""
    for name, base in (("One", None), ("Two", "One"), ("Three", None), ("Broken", None)):
        (tmp_path / name).mkdir()
        write_card(tmp_path / name, Card(name, name, "run", "instruct", "vicuna_v1", "pad", base=base))

    def load(card: Card, share: str = "whole") -> Ready:
        opened.append((Parrot(card), share))
        return Ready(opened[-1][0], "")

    models = Models(
        load, lambda: (models.cards()["run/One"], ""), runs=tmp_path, load_half=lambda card: load(card, "half")
    )
    models.start()
    with models.lend(models.card(models.first.result(PATIENCE))) as ready:
        wait([ready], PATIENCE)
    return models


@pytest.fixture
def handlers(models: Models, tmp_path: Path, told: list[str]) -> Compare:
    return Compare(models, Votes(tmp_path / "votes" / "compare.jsonl"))


def send(handlers: Compare, match: Match, left: Any, right: Any, *, text: str = "Hi?", blind: bool = False) -> Match:
    updates = list(handlers.send({"text": text}, match, left, right, blind, *SETTINGS))
    return updates[-1][0]


def answers(match: Match) -> list[str | None]:
    return [talk.conversation.turns[-1].answer for talk in match.talks]


def test_two_models_answer_the_same_conversation(handlers: Compare, told: list[str]) -> None:
    match = send(handlers, Match(), "run/One", "run/Two")
    assert answers(match) == ["One heard 1", "Two heard 1"]
    match = send(handlers, match, "run/One", "run/Two")
    assert answers(match) == ["One heard 2", "Two heard 2"]
    assert not told


def test_both_stream_at_the_same_time(handlers: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tab, "REDRAW", 0)
    updates = handlers.send({"text": "Hi?"}, Match(), "run/One", "run/Two", False, *SETTINGS)
    shown = [answers(match) for match, *_ in updates if isinstance(match, Match)]
    assert ["One ", "Two "] in shown


def test_another_model_or_a_vote_begins_anew(handlers: Compare) -> None:
    match = send(handlers, Match(), "run/One", "run/Two")
    assert answers(send(handlers, match, "run/One", "run/Three")) == ["One heard 1", "Three heard 1"]
    voted, *_ = handlers.vote(match, "left")
    assert answers(send(handlers, voted, "run/One", "run/Two")) == ["One heard 1", "Two heard 1"]


def test_one_side_that_breaks_does_not_take_the_other_along(handlers: Compare, told: list[str]) -> None:
    match = send(handlers, Match(), "run/Broken", "run/Two")
    assert answers(match) == ["Broken ", "Two heard 1"]
    assert match.talks[0].conversation.turns[-1].finish == "failed"
    assert told == ["It broke."]
    assert answers(send(handlers, match, "run/Broken", "run/Two"))[1] == "Two heard 2"


@pytest.mark.parametrize(
    ("left", "right", "text", "message"),
    [
        ("run/One", "run/One", "Hi?", "Choose two different models"),
        (None, "run/One", "Hi?", "Choose two different models"),
        ("run/One", "run/Gone", "Hi?", "not in the list any more"),
        ("run/One", "run/Two", "a" * 20_001, "The question has 20,001 characters"),
        ("run/One", "run/Two", " ", "Type a question"),
    ],
)
def test_what_cannot_be_compared_is_told_and_nothing_is_lost(
    handlers: Compare, told: list[str], left: Any, right: Any, text: str, message: str
) -> None:
    before = send(handlers, Match(), "run/One", "run/Two")
    *_, (match, _, _, box, _) = handlers.send({"text": text}, before, left, right, False, *SETTINGS)
    assert message in told[-1]
    if text.strip():
        assert match == before
        assert box["value"]["text"] == text


def test_comparing_counts_as_asking(models: Models, tmp_path: Path, told: list[str]) -> None:
    handlers = Compare(models, Votes(tmp_path / "votes.jsonl"), Gate(replace(LOCAL, questions=1)))
    match = send(handlers, Match(), "run/One", "run/Two")
    asked = {"text": "And?", "files": ["nowhere.png"]}  # which is not looked for
    *_, (kept, _, _, box, _) = handlers.send(asked, match, "run/One", "run/Two", False, *SETTINGS)
    assert "1 questions within a minute" in told[-1]
    assert (kept, box["value"]) == (match, asked)


def test_blind_names_stay_hidden_until_the_vote(handlers: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tab.secrets, "choice", lambda options: True)
    *_, (match, left, right, _, _) = handlers.send({"text": "Hi?"}, Match(), "run/One", "run/Two", True, *SETTINGS)
    assert match.models == ("run/Two", "run/One")
    assert (left["label"], right["label"]) == ("Model A", "Model B")
    assert "Two" not in handlers.line(match)
    _, left, right, line = handlers.vote(match, "left")
    assert (left["label"], right["label"]) == ("Two", "One")
    assert line == "<p><b>Two</b> 1 · <b>One</b> 0 · equally good 0 · neither 0</p>"
    assert send(handlers, match, "run/One", "run/Two", blind=True).models == match.models  # goes on, not swapped anew


def test_a_vote_counts_once_and_only_after_an_answer(handlers: Compare, told: list[str], tmp_path: Path) -> None:
    handlers.vote(Match(), "left")
    assert told == ["Ask both models something first."]
    voted, *_ = handlers.vote(send(handlers, Match(), "run/One", "run/Two"), "tie")
    handlers.vote(voted, "tie")
    assert told[1:] == ["You have voted. Ask something new."]
    assert len((tmp_path / "votes" / "compare.jsonl").read_text().splitlines()) == 1


def test_one_click_chooses_a_model_and_its_base(handlers: Compare) -> None:
    for chosen in ("run/Two", None, "run/Gone"):
        left, right = handlers.base_against_tuned(chosen)
        if chosen == "run/Two":
            assert (left["value"], right["value"]) == ("run/One", "run/Two")
        assert left["value"] != right["value"]
    names = {update["value"] for update in handlers.base_against_tuned("built-in/memeworld")}
    assert names == {"built-in/memeworld-base", "built-in/memeworld"}


def test_two_big_models_share_the_memory_and_stay_while_both_are_asked(
    models: Models, opened: list[tuple[Parrot, str]]
) -> None:
    one, two, three = (models.card(f"run/{name}") for name in ("One", "Two", "Three"))
    for _ in range(2):
        with models.lend_two(one, two) as ready:
            wait(ready, PATIENCE)
            assert not any(future.result().engine.closed for future in ready)  # type: ignore[attr-defined]
    loaded = [(parrot.card.name, share, parrot.closed) for parrot, share in opened]
    assert loaded == [("One", "whole", True), ("One", "half", False), ("Two", "whole", False)]
    with models.lend(three) as third:
        wait([third], PATIENCE)
    assert [parrot.card.name for parrot, _ in opened if not parrot.closed] == ["Three"]


def test_a_model_that_does_not_fit_beside_the_other_says_so(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(card: Card) -> Ready:
        raise ModelError(f"{card.name} needs 9.0 GB. Choose a smaller model.")

    one, three = models.card("run/One"), models.card("run/Three")
    monkeypatch.setattr(models, "_load", refuse)
    with models.lend_two(one, three) as ready:
        wait(ready, PATIENCE)
        assert str(ready[1].exception()) == (
            "Two models at once share the memory. Three needs 9.0 GB. Choose a smaller model."
        )
    with models.lend(three) as alone:
        assert str(alone.exception(PATIENCE)).startswith("Three needs")


def test_votes_are_summed_whichever_side_a_model_stood_on(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "runs" / "compare.jsonl")
    assert not votes.tally("a", "b")
    for left, right, verdict in (("a", "b", "left"), ("b", "a", "right"), ("b", "a", "left"), ("a", "b", "tie")):
        votes.add(Vote(left, right, verdict, blind=True))
    votes.add(Vote("a", "c", "neither", blind=False))
    assert votes.tally("a", "b") == {"left": 2, "right": 1, "tie": 1}
    assert votes.tally("c", "a") == {"neither": 1}


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "compare.jsonl"
    votes = Votes(path)
    votes.add(Vote("a", "b", "left", blind=True))
    path.write_bytes(path.read_bytes() + b'{"at": "2026-')
    votes.add(Vote("a", "b", "right", blind=True))
    assert votes.tally("a", "b") == {"left": 1, "right": 1}
    assert len(path.read_bytes().splitlines()) == 3


def test_a_vote_for_which_the_disk_has_no_room_leaves_nothing(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "compare.jsonl")
    votes.add(Vote("a", "b", "left", blind=True))
    with room_for(tmp_path / "compare.jsonl", 20), pytest.raises(OSError, match="No space"):
        votes.add(Vote("a", "b", "left", blind=True))
    votes.add(Vote("a", "b", "right", blind=True))
    assert votes.tally("a", "b") == {"left": 1, "right": 1}
    assert len((tmp_path / "compare.jsonl").read_bytes().splitlines()) == 2


def test_a_verdict_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=", ".join(VERDICTS)):
        Vote("a", "b", "up", blind=False)
