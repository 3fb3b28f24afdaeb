import io
import logging
import math
import shutil
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from llava_app import loading
from llava_app.checkpoints import Card, read_card
from llava_app.conversation import Conversation
from llava_app.engine import Piece, Sampling
from llava_app.engine.local import LocalEngine
from llava_app.limits import LOCAL, PUBLIC, Gate
from llava_app.ui import handlers as page
from llava_app.ui.asked import Tab
from llava_app.ui.conversations import Conversations
from llava_app.ui.display import Talk, messages
from llava_app.ui.examples import WORLD, Example, read_examples
from llava_app.ui.handlers import MAX_CHARACTERS, Handlers
from llava_app.ui.models import Models, Ready
from llava_app.ui.picker import Picker
from tests.fixtures_model import write_tiny_model
from tests.test_video import film

SHORT = (0.0, 1.0, 12, "")  # temperature, top-p, longest answer, seed


class Faulty:
    """An engine that writes two words and then breaks in a way that nobody foresaw."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def answer(self, conversation: Conversation, sampling: Sampling) -> Iterator[Piece]:
        yield Piece("Two words", tokens=2)
        raise RuntimeError("/srv/secret/path exploded")

    def close(self) -> None:
        pass


def load(card: Card) -> Ready:
    return Ready(Faulty(card), "") if card.name == "Faulty" else Ready(LocalEngine(loading.load(card, "float32")), "")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    write_tiny_model(runs / "tiny")
    for copy in ("Faulty", "Vanished"):
        shutil.copytree(runs / "tiny", runs / copy)
        text = (runs / copy / "card.json").read_text(encoding="utf-8")
        (runs / copy / "card.json").write_text(text.replace('"Tiny"', f'"{copy}"'), encoding="utf-8")
    return runs


@pytest.fixture(scope="module")
def handlers(runs: Path) -> Handlers:
    meme = runs / "meme.png"
    Image.new("RGB", (32, 24), "orange").save(meme)
    models = Models(load, lambda: (models.cards()["run/tiny"], "The only one."), runs=runs)
    models.start()
    return Handlers(models, [Example(meme, "What is the joke?")])


@pytest.fixture
def meme(tmp_path: Path) -> str:
    path = tmp_path / "meme.png"
    Image.new("RGB", (40, 30), "purple").save(path)
    return str(path)


def last(handlers: Handlers, event: str, *inputs: Any) -> tuple[Talk, list[dict], Any]:
    """The talk, what is shown of it, and the box after an event of the page and those that follow it."""
    place = next(index for index, value in enumerate(inputs) if isinstance(value, Talk))
    tab, talk, shown, box = Tab(), inputs[place], [], None
    updates = [getattr(handlers, event)(*inputs[:place], tab, *inputs[place:])]
    talk = updates[0][0] if isinstance(updates[0][0], Talk) else talk
    updates += [(talk, window, gr.skip()) for window in handlers.stream(tab, talk)]
    updates.append(handlers.settle(tab, talk))
    for update in updates:
        talk = update[0] if isinstance(update[0], Talk) else talk
        shown = update[1] if isinstance(update[1], list) else shown
        box = update[2] if "value" in update[2] else box
    assert (updates[-1][2]["submit_btn"], updates[-1][2]["stop_btn"]) == (True, False)
    return talk, shown, box


def message(text: str, *files: str) -> dict[str, Any]:
    return {"text": text, "files": list(files)}


def asked(handlers: Handlers, *questions: str) -> Talk:
    talk = Talk()
    for question in questions:
        talk, _, _ = last(handlers, "send", message(question), talk, "run/tiny", *SHORT)
    return talk


def test_an_answer_streams_and_the_talk_grows(handlers: Handlers, meme: str) -> None:
    talk, shown, box = last(handlers, "send", message("What?", meme), Talk(), "run/tiny", *SHORT)
    turn = talk.conversation.turns[0]
    assert (turn.question, len(turn.images), turn.finish) == ("What?", 1, "length")
    assert turn.answer
    assert talk.notes[0].seconds_to_first is not None
    assert [entry["role"] for entry in shown] == ["user", "assistant"]
    assert box["value"] is None  # emptied


def test_a_question_shows_at_once_while_the_answer_is_awaited(handlers: Handlers) -> None:
    _, shown, box = handlers.send(message("What?"), Tab(), Talk(), "run/tiny", *SHORT)
    assert shown[0]["content"][0]["text"] == "What?"
    assert (box["submit_btn"], box["stop_btn"]) == (False, True)


def test_further_questions_keep_the_context_and_pictures_stay_with_their_turn(handlers: Handlers, meme: str) -> None:
    talk, _, _ = last(handlers, "send", message("And this?", meme), asked(handlers, "First?"), "run/tiny", *SHORT)
    assert [(turn.question, len(turn.images)) for turn in talk.conversation.turns] == [("First?", 0), ("And this?", 1)]


def test_a_picture_needs_no_words(handlers: Handlers, meme: str) -> None:
    talk, _, _ = last(handlers, "send", message("", meme), Talk(), "run/tiny", *SHORT)
    assert talk.conversation.turns[0].answer


@pytest.mark.parametrize("nothing", [message(""), message("  \n"), None])
def test_nothing_typed_gets_a_hint_and_nothing_happens(
    handlers: Handlers, nothing: dict[str, Any] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = asked(handlers, "First?")
    assert last(handlers, "send", nothing, before, "run/tiny", *SHORT) == (before, messages(before), None)
    assert "Type a question or add a picture" in capsys.readouterr().out


def broken_files() -> dict[str, bytes]:
    file = io.BytesIO()
    Image.effect_noise((300, 300), 90).convert("RGB").save(file, "JPEG")
    wide = io.BytesIO()
    Image.new("1", (12_000, 6_000)).save(wide, "PNG")
    return {
        "broken.png": b"\x89PNG\r\n\x1a\n" + b"nonsense" * 40,
        "truncated.jpg": file.getvalue()[: len(file.getvalue()) // 2],
        "huge.png": wide.getvalue(),
        "empty.png": b"",
        "notes.txt": b"Dear diary, this is no picture.",
    }


@pytest.mark.parametrize("name", broken_files())
def test_a_bad_file_is_named_and_talk_and_box_stay(handlers: Handlers, tmp_path: Path, name: str, meme: str) -> None:
    bad = tmp_path / name
    bad.write_bytes(broken_files()[name])
    before = asked(handlers, "First?")
    with pytest.warns(UserWarning, match=name) as told:
        talk, _, box = last(handlers, "send", message("What?", meme, str(bad)), before, "run/tiny", *SHORT)
    assert talk == before
    assert box["value"] == message("What?", meme, str(bad))
    assert str(tmp_path) not in str(told[0].message)
    assert last(handlers, "send", message("Next?", meme), talk, "run/tiny", *SHORT)[0].conversation.turns[-1].answer


def test_a_conversation_that_is_too_long_says_what_to_do(handlers: Handlers) -> None:
    before = asked(handlers, "First?")
    with pytest.warns(UserWarning, match="tokens.*at most 512"):
        talk, shown, box = last(handlers, "send", message("long " * 300), before, "run/tiny", *SHORT)
    assert talk == before
    assert len(shown) == 2
    assert box["value"]["text"] == "long " * 300
    assert last(handlers, "send", message("Next?"), talk, "run/tiny", *SHORT)[0].conversation.turns[-1].answer


@pytest.mark.parametrize(
    ("too_much", "told"),
    [
        (message("a" * (MAX_CHARACTERS + 1)), "20,001 characters; the limit is 20,000"),
        (message("What?", *["x.png"] * (LOCAL.pictures + 1)), "9 pictures in this message; the limit is 8"),
    ],
)
def test_a_message_is_bounded_before_anything_is_read(handlers: Handlers, too_much: dict[str, Any], told: str) -> None:
    with pytest.warns(UserWarning, match=told):
        assert last(handlers, "send", too_much, Talk(), "run/tiny", *SHORT)[0] == Talk()


def test_an_unknown_model_is_named_and_markup_in_its_name_stays_text(handlers: Handlers) -> None:
    with pytest.warns(UserWarning, match="“&lt;b&gt;x” is not in the list"):
        talk, _, box = last(handlers, "send", message("What?"), Talk(), "<b>x", *SHORT)
    assert (talk, box["value"]["text"]) == (Talk(), "What?")


def test_a_model_folder_that_vanished_is_named_and_another_model_answers(handlers: Handlers, runs: Path) -> None:
    shutil.rmtree(runs / "Vanished")
    with pytest.warns(UserWarning, match="“Vanished” is not in the list any more"):
        talk, _, _ = last(handlers, "send", message("What?"), Talk(), "run/Vanished", *SHORT)
    assert last(handlers, "send", message("What?"), talk, "run/tiny", *SHORT)[0].conversation.turns[0].answer


def test_a_fault_is_told_by_number_and_explained_only_in_the_log(
    handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    before = asked(handlers, "First?")
    with caplog.at_level(logging.ERROR), pytest.warns(UserWarning, match="error id [0-9a-f]{8}") as told:
        last(handlers, "send", message("What?"), before, "run/Faulty", *SHORT)
    assert "secret" not in str(told[0].message)
    assert "secret" in caplog.text


def test_what_was_written_before_a_failure_stays_and_is_marked(handlers: Handlers) -> None:
    before = asked(handlers, "First?")
    with pytest.warns(UserWarning, match="error id"):
        talk, shown, box = last(handlers, "send", message("What?"), before, "run/Faulty", *SHORT)
    turn = talk.conversation.turns[-1]
    assert (turn.question, turn.answer, turn.finish) == ("What?", "Two words", "failed")
    assert "broke off" in shown[-1]["content"][-1]["value"]
    assert not box["value"]  # the question is in the conversation
    assert handlers.live.get(talk.key) == talk


@pytest.mark.parametrize(
    "settings", [(99.0, -1.0, 12, "9" * 10), (math.nan, math.nan, 12, " 7 "), (None, None, 12, None)]
)
def test_numbers_from_outside_are_clamped(handlers: Handlers, settings: tuple[float | str | None, ...]) -> None:
    assert last(handlers, "send", message("What?"), Talk(), "run/tiny", *settings)[0].conversation.turns[0].answer


def test_a_seed_that_is_no_number_is_named(handlers: Handlers) -> None:
    with pytest.warns(UserWarning, match="The seed “-5” is not a whole number"):
        assert last(handlers, "send", message("What?"), Talk(), "run/tiny", 0.0, 1.0, 12, "-5")[0] == Talk()


class Rein:
    """Holds the model of the tests while an answer is written, so that none is over before it was looked at."""

    def __init__(self) -> None:
        self._free = threading.Event()
        self._steps = count(1)

    def let_go(self) -> None:
        self._free.set()

    def step(self, whole: Callable[..., Any], *parts: Any) -> Any:
        """A step of the model; after the first twenty it waits until it is let go."""
        if next(self._steps) > 20:
            self._free.wait(60)
        return whole(*parts)


@pytest.fixture
def rein(handlers: Handlers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rein]:
    rein = Rein()
    with handlers.models.lend(handlers.models.card("run/tiny")) as ready:
        decoder = ready.result().engine._worker._decoder
    monkeypatch.setattr(decoder, "step", partial(rein.step, decoder.step))
    yield rein
    rein.let_go()


def begun(handlers: Handlers, tab: Tab) -> tuple[Talk, Generator[Any, None, None]]:
    """A long answer in `tab` of which something is written: the talk that the tab shows, and the stream."""
    talk, _, _ = handlers.send(message("What?"), tab, Talk(), "run/tiny", 0.0, 1.0, 200, "")
    stream = handlers.stream(tab, talk)
    for _ in stream:
        assert not tab.asked.so_far.conversation.is_open
        if tab.asked.so_far.conversation.turns[-1].answer:
            return talk, stream
    raise AssertionError("nothing was written")


@pytest.mark.parametrize("how", ["stopped", "closed"])
def test_stopped_anywhere_what_was_written_stays_and_is_marked(handlers: Handlers, rein: Rein, how: str) -> None:
    tab = Tab()
    talk, stream = begun(handlers, tab)
    if how == "stopped":
        handlers.stop(tab)
        assert list(stream) == []
    stream.close()
    assert not tab.is_answering
    known = handlers.live.get(talk.key)  # what a reload shows
    talk, shown, box = handlers.settle(tab, talk)
    assert talk.conversation.turns[0].answer
    assert (talk, talk.conversation.turns[0].finish) == (known, "stopped")
    assert "stopped by you" in shown[-1]["content"][-1]["value"]
    assert (box["submit_btn"], box["stop_btn"]) == (True, False)


def test_a_second_question_is_refused_while_the_answer_to_the_first_comes(
    handlers: Handlers, rein: Rein, capsys: pytest.CaptureFixture[str]
) -> None:
    tab = Tab()
    talk, stream = begun(handlers, tab)
    refused = [
        handlers.send(message("Me?"), tab, talk, "run/tiny", *SHORT),
        handlers.retry(tab, talk, "run/tiny", *SHORT),
        handlers.edit(event(turn=0, text="Me?"), tab, talk, "run/tiny", *SHORT),
    ]
    assert refused == [page.UNCHANGED] * 3
    assert capsys.readouterr().out.count("Wait for the answer, or stop it.") == 3
    assert [type(update) for update in handlers.stream(tab, talk)] == [dict]  # nothing of its own to stream
    assert handlers.settle(tab, talk) == page.UNCHANGED
    rein.let_go()
    assert list(stream)  # the first goes on
    assert handlers.settle(tab, talk)[0].conversation.turns[0].finish == "length"


def test_who_waits_for_a_row_sees_the_place_in_the_queue(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = loading.load(read_card(runs / "tiny"), "float32")
    engine = LocalEngine(tiny, plan=replace(tiny.plan, rows=1))
    step, held = engine._worker._decoder.step, threading.Event()
    monkeypatch.setattr(engine._worker._decoder, "step", lambda *parts: held.wait(30) and step(*parts))
    models = Models(lambda card: Ready(engine, ""), lambda: (models.cards()["run/tiny"], ""), runs=runs)
    models.start()
    alone, told = Handlers(models, []), ["Reading …", "you are next …", "1 before you …"]
    tabs = [Tab() for _ in told]
    talks = [alone.send(message("Me?"), tab, Talk(), "run/tiny", *SHORT)[0] for tab in tabs]
    streams = [alone.stream(tab, talk) for tab, talk in zip(tabs, talks, strict=True)]
    for stream, phase in zip(streams, told, strict=True):
        assert next(shown for shown in stream if phase in footer(shown))
    held.set()
    assert all(list(stream) for stream in streams)
    settled = [alone.settle(tab, talk)[0] for tab, talk in zip(tabs, talks, strict=True)]
    assert [talk.conversation.turns[0].finish for talk in settled] == ["length"] * 3
    engine.close()


def footer(shown: Any) -> str:
    """The small line under the last answer."""
    return shown[-1]["content"][-1].get("value", "")


def test_a_browser_that_is_behind_gets_nothing_until_it_has_caught_up_and_fewer_pieces_then(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, tab = SimpleNamespace(now=0.0), Tab()
    monkeypatch.setattr("llava_app.ui.asked.time", SimpleNamespace(monotonic=lambda: clock.now))

    def drawn(seconds: float) -> int:
        """How many of a hundred pieces a second."""
        pieces = 0
        for _ in range(round(100 * seconds)):
            clock.now += 0.01
            pieces += tab.draws()
        return pieces

    assert drawn(1) == 100
    handlers.slow(event(late=0.5), tab)
    assert (drawn(0.49), drawn(1.1)) == (0, pytest.approx(10, abs=2))
    for _ in range(9):
        handlers.slow(event(late=10**400), tab)
    assert (drawn(0.99), drawn(3.1)) == (0, pytest.approx(3, abs=1))
    for forged in ({}, {"late": "1"}, {"late": math.nan}, {"late": -1}, {"late": True}):
        handlers.slow(event(**forged), fresh := Tab())
        assert fresh.draws()
        assert fresh.draws()


def test_after_stop_a_new_question_need_not_wait(handlers: Handlers, rein: Rein) -> None:
    tab = Tab()
    shown, stream = begun(handlers, tab)
    handlers.stop(tab)
    talk, _, _ = handlers.send(message("Next?"), tab, shown, "run/tiny", *SHORT)
    assert list(stream) == []
    assert handlers.settle(tab, talk) == page.UNCHANGED  # of the first question: the second is to come
    rein.let_go()
    assert list(handlers.stream(tab, talk))
    first, second = handlers.settle(tab, talk)[0].conversation.turns
    assert (first.question, first.finish, bool(first.answer)) == ("What?", "stopped", True)
    assert (second.question, bool(second.answer)) == ("Next?", True)
    assert second.finish in ("length", "stop")  # which of the two hangs on where the first was stopped


def test_stop_counts_even_before_the_answer_has_begun(handlers: Handlers) -> None:
    tab = Tab()
    talk, _, _ = handlers.send(message("What?"), tab, Talk(), "run/tiny", *SHORT)
    handlers.stop(tab)
    assert list(handlers.stream(tab, talk)) == []
    assert handlers.settle(tab, talk)[0] == talk


@pytest.mark.parametrize("leaving", ["new", "undo"])
def test_leaving_a_conversation_ends_its_answer_and_keeps_what_was_written(
    handlers: Handlers, rein: Rein, leaving: str
) -> None:
    tab = Tab()
    talk, stream = begun(handlers, tab)
    written = tab.asked.so_far
    if leaving == "new":
        now, _, shelf, *_ = Conversations(handlers.live).new(tab, talk, ())
        assert [entry.talk for entry in shelf] == [written]
    else:
        now, _, box = handlers.undo(tab, talk)
        assert box["value"]["text"] == "What?"
    assert list(stream) == []
    assert handlers.live.get(talk.key) == written
    assert handlers.settle(tab, now)[1] == messages(now) == []


def test_two_tabs_on_one_conversation_do_not_wait_for_each_other(handlers: Handlers, rein: Rein) -> None:
    tab, other = Tab(), Tab()
    talk, stream = begun(handlers, tab)
    again, _, _ = handlers.send(message("Me too?"), other, talk, "run/tiny", *SHORT)
    rein.let_go()
    assert list(handlers.stream(other, again))
    assert len(handlers.settle(other, again)[0].conversation.turns) == 2
    assert list(stream)
    assert len(handlers.settle(tab, talk)[0].conversation.turns) == 1


def test_what_two_tabs_ask_in_one_conversation_are_two_conversations(handlers: Handlers) -> None:
    both = asked(handlers, "First?")
    one, _, _ = last(handlers, "send", message("From one?"), both, "run/tiny", *SHORT)
    other, _, _ = last(handlers, "send", message("From the other?"), both, "run/tiny", *SHORT)
    assert one.key == both.key != other.key
    for talk, question in ((one, "From one?"), (other, "From the other?")):
        assert handlers.live.get(talk.key) == talk
        assert [turn.question for turn in talk.conversation.turns] == ["First?", question]


def test_in_one_tab_a_conversation_stays_one(handlers: Handlers) -> None:
    talk = asked(handlers, "First?", "Second?")
    key = talk.key
    talk, _, _ = last(handlers, "retry", talk, "run/tiny", *SHORT)
    talk, _, _ = last(handlers, "resume", talk, "run/tiny", *SHORT)
    shelf, _, _ = Conversations(handlers.live).keep(handlers.undo(Tab(), talk)[0], ())
    talk, _, _ = last(handlers, "send", message("Another?"), shelf[0].talk, "run/tiny", *SHORT)
    empty, _, _ = handlers.undo(Tab(), handlers.undo(Tab(), talk)[0])
    talk, _, _ = last(handlers, "send", message("Anew?"), empty, "run/tiny", *SHORT)
    assert talk.key == key
    assert [turn.question for turn in talk.conversation.turns] == ["Anew?"]


def test_retry_answers_the_last_question_anew(handlers: Handlers) -> None:
    before = asked(handlers, "First?", "Second?")
    talk, _, _ = last(handlers, "retry", before, "run/tiny", 0.0, 1.0, 5, "")
    assert [turn.question for turn in talk.conversation.turns] == ["First?", "Second?"]
    assert talk.conversation.turns[1].answer != before.conversation.turns[1].answer  # shorter
    assert len(talk.notes) == 2


def test_a_retry_that_fails_keeps_the_answer_there_was(handlers: Handlers) -> None:
    before = asked(handlers, "First?")
    with pytest.warns(UserWarning, match="error id"):
        assert last(handlers, "retry", before, "run/Faulty", *SHORT)[0] == before


def test_undo_puts_question_and_pictures_back_into_the_box(handlers: Handlers, meme: str) -> None:
    before = asked(handlers, "First?")
    talk, _, _ = last(handlers, "send", message("And this?", meme), before, "run/tiny", *SHORT)
    shorter, shown, box = handlers.undo(Tab(), talk)
    assert (shorter, len(shown), box["value"]["text"]) == (before, 2, "And this?")
    assert Image.open(box["value"]["files"][0]).getpixel((0, 0)) == (128, 0, 128)


def test_a_clip_is_asked_about_and_undo_puts_it_back_into_the_box(handlers: Handlers, tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(film("mp4"))
    talk, shown, _ = last(handlers, "send", message("What?", str(tmp_path / "film.mp4")), Talk(), "run/tiny", *SHORT)
    clip = talk.conversation.pictures[0]
    assert len(clip.stills) == 32
    assert "frames as separate pictures" in shown[-1]["content"][-1]["value"]
    _, _, box = handlers.undo(Tab(), talk)
    again, _, _ = last(handlers, "send", box["value"], Talk(), "run/tiny", *SHORT)
    back = again.conversation.pictures[0]
    assert [frame.image.size for frame in back.stills] == [frame.image.size for frame in clip.stills]
    assert back.times == pytest.approx(clip.times, abs=0.02)


@pytest.mark.parametrize("nothing", ["retry", "undo"])
def test_with_nothing_said_retry_and_undo_do_nothing(handlers: Handlers, nothing: str) -> None:
    update = handlers.undo(Tab(), Talk()) if nothing == "undo" else handlers.retry(Tab(), Talk(), "run/tiny", *SHORT)
    assert update == page.UNCHANGED


def test_an_example_is_one_click_away(handlers: Handlers) -> None:
    talk, _, _ = last(handlers, "example", SimpleNamespace(_data={"index": 0}), Talk(), "run/tiny", *SHORT)
    assert (talk.conversation.turns[0].question, len(talk.conversation.pictures)) == ("What is the joke?", 1)


def test_a_model_that_knows_more_is_offered_other_examples(runs: Path, meme: str) -> None:
    memes, world = read_examples(), read_examples(WORLD)
    assert len(world) == 3
    far = Card("far", "far/away", "server", "instruct", "vicuna_v1", "pad")
    models = Models(load, lambda: (far, ""), runs=runs, elsewhere=lambda: [far])
    handlers = Handlers(models, memes, world=world)
    assert [example["text"] for example in handlers.offer("far/away")["examples"]] == [e.question for e in world]
    assert len(handlers.offer("run/tiny")["examples"]) == len(handlers.offer(None)["examples"]) == len(memes)
    talk, *_ = handlers.example(SimpleNamespace(_data={"index": 1}), Tab(), Talk(), "far/away", *SHORT)
    assert talk.conversation.turns[0].question == world[1].question
    assert talk.conversation.pictures[0].image.size == (560, 400)
    assert handlers.example(SimpleNamespace(_data={"index": 3}), Tab(), Talk(), "far/away", *SHORT) == page.UNCHANGED


@pytest.mark.parametrize("forged", [7, -1, "0", None, [0]])
def test_an_example_that_is_not_there_is_ignored(handlers: Handlers, forged: Any) -> None:
    clicked = SimpleNamespace(_data={"index": forged})
    assert handlers.example(clicked, Tab(), Talk(), "run/tiny", *SHORT) == page.UNCHANGED


def test_examples_are_read_from_their_list_and_may_be_missing(tmp_path: Path) -> None:
    assert read_examples(tmp_path) == ()
    (tmp_path / "questions.json").write_text('[{"image": "memes/a.png", "question": "Why?"}]', encoding="utf-8")
    assert read_examples(tmp_path) == (Example(tmp_path / "memes/a.png", "Why?"),)


def address(**query: str) -> Any:
    return SimpleNamespace(query_params=query)


def test_the_address_may_name_the_model_and_begin_the_question(handlers: Handlers) -> None:
    for name in ("run/Faulty", "Faulty"):
        assert list(Picker(handlers.models).greet(address(model=name)))[-1][0]["value"] == "run/Faulty"
    assert list(Picker(handlers.models).greet(address(model="nobody")))[-1][0]["value"] == "run/tiny"
    assert handlers.begun(address(q="What is <b>it</b>?"))["value"] == message("What is <b>it</b>?")
    assert "value" not in handlers.begun(address())


def test_a_new_tab_learns_which_model_starts(handlers: Handlers) -> None:
    model, _ = list(Picker(handlers.models).greet(address()))[-1]
    assert model["value"] == "run/tiny"
    assert ("Tiny · trained here", "run/tiny") in model["choices"]


def test_a_start_that_failed_is_told_to_every_new_tab(runs: Path) -> None:
    models = Models(load, lambda: (models.cards()["nobody"], ""), runs=runs)
    models.start()
    _, status = list(Picker(models).greet(address()))[-1]
    assert "status failed" in status


def test_choosing_a_model_says_what_it_knows_and_how_it_runs(handlers: Handlers) -> None:
    status = list(Picker(handlers.models).choose("run/tiny"))[-1]
    assert "status ready" in status
    assert "Random weights: it answers nonsense." in status
    assert "The only one." in status
    assert "<dt>Trained</dt><dd>stage 2: it answers questions</dd>" in status


def test_choosing_a_model_that_is_gone_says_so(handlers: Handlers) -> None:
    assert "“nobody” is not in the list" in list(Picker(handlers.models).choose("nobody"))[-1]


def test_the_list_is_touched_only_when_it_changed_and_keeps_the_selection(handlers: Handlers, runs: Path) -> None:
    listed, update, _ = Picker(handlers.models).refresh([], "run/tiny")
    assert "value" not in update
    assert Picker(handlers.models).refresh(listed, "run/tiny")[1].keys() == {"__type__"}
    shutil.copytree(runs / "tiny", runs / "later")
    now, update, _ = Picker(handlers.models).refresh(listed, "run/tiny")
    shutil.rmtree(runs / "later")
    assert len(now) == len(listed) + 1
    assert "value" not in update


def test_a_selection_that_is_gone_moves_to_the_first_model(handlers: Handlers) -> None:
    with pytest.warns(UserWarning, match="“gone” is gone"):
        now, update, _ = Picker(handlers.models).refresh([], "gone")
    assert update["value"] == now[0][1]


def event(**data: Any) -> gr.EventData:
    return gr.EventData(None, data)


def test_an_edited_question_is_asked_anew_with_its_pictures_and_the_talk_goes_on_from_there(
    handlers: Handlers, meme: str
) -> None:
    talk, _, _ = last(handlers, "send", message("What?", meme), Talk(), "run/tiny", *SHORT)
    talk, _, _ = last(handlers, "send", message("Why?"), talk, "run/tiny", *SHORT)
    edited, _, _ = last(handlers, "edit", event(turn=0, text="Who?"), talk, "run/tiny", *SHORT)
    assert [(turn.question, len(turn.images)) for turn in edited.conversation.turns] == [("Who?", 1)]
    assert len(edited.notes) == 1


@pytest.mark.parametrize("forged", [{}, {"turn": 7, "text": "x"}, {"turn": "0", "text": "x"}, {"turn": 0, "text": 1}])
def test_a_forged_edit_changes_nothing(handlers: Handlers, forged: dict[str, Any]) -> None:
    assert handlers.edit(event(**forged), Tab(), asked(handlers, "A?"), "run/tiny", *SHORT) == page.UNCHANGED


def test_an_answer_that_was_cut_goes_on(handlers: Handlers) -> None:
    before = asked(handlers, "First?")
    talk, _, _ = last(handlers, "resume", before, "run/tiny", *SHORT)
    begun, whole = before.conversation.turns[0].answer, talk.conversation.turns[0].answer
    assert whole.startswith(begun)
    assert len(whole) > len(begun)
    assert len(talk.notes) == 1


def test_a_question_of_one_click_is_about_the_picture_and_leaves_the_text(handlers: Handlers, meme: str) -> None:
    typed = message("not this", meme)
    talk, _, box = last(handlers, "quick", "Describe it.", typed, Talk(), "run/tiny", *SHORT)
    assert (talk.conversation.turns[0].question, len(talk.conversation.pictures)) == ("Describe it.", 1)
    assert box["value"] == message("not this")
    again, _, _ = last(handlers, "quick", "And the text?", None, talk, "run/tiny", *SHORT)
    assert len(again.conversation.turns) == 2


def test_a_question_of_one_click_needs_a_picture(handlers: Handlers, capsys: pytest.CaptureFixture[str]) -> None:
    assert handlers.quick("Describe it.", None, Tab(), Talk(), "run/tiny", *SHORT) == page.UNCHANGED
    assert "Add a picture first" in capsys.readouterr().out


def test_the_system_prompt_and_the_repetition_penalty_reach_the_model(handlers: Handlers) -> None:
    plain = asked(handlers, "What?").conversation.turns[0].answer
    told, _, _ = last(handlers, "send", message("What?"), Talk(), "run/tiny", *SHORT, 1.0, "Be brief.")
    penalised, _, _ = last(handlers, "send", message("What?"), Talk(), "run/tiny", *SHORT, 2.0, "")
    assert told.conversation.system == "Be brief."
    assert len({plain, told.conversation.turns[0].answer, penalised.conversation.turns[0].answer}) == 3


def test_a_system_prompt_is_bounded(handlers: Handlers) -> None:
    with pytest.warns(UserWarning, match="system prompt has 4,001 characters; the limit is 4,000"):
        assert last(handlers, "send", message("What?"), Talk(), "run/tiny", *SHORT, 1.0, "x" * 4_001)[0] == Talk()


def test_the_image_mode_changes_what_the_model_sees_and_not_the_picture(handlers: Handlers, tmp_path: Path) -> None:
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("blue", (30, 0, 60, 30))
    wide.save(tmp_path / "wide.png")
    picture = message("What?", str(tmp_path / "wide.png"))
    talks = [
        last(handlers, "send", picture, Talk(), "run/tiny", *SHORT, 1.0, "", mode)[0]
        for mode in ("own", "pad", "crop", "sideways", ["pad"])
    ]
    own, pad, crop, *forged = [talk.conversation.turns[0].answer for talk in talks]
    assert own == pad == forged[0] == forged[1]  # the tiny model was made to pad
    assert crop != own
    assert {talk.conversation.pictures[0].image.size for talk in talks} == {(90, 30)}


def test_a_question_counts_once_and_when_it_is_sent_before_a_picture_is_opened(handlers: Handlers) -> None:
    limited = Handlers(handlers.models, [], Gate(replace(LOCAL, questions=2)))
    talk, _, _ = last(limited, "send", message("What?"), Talk(), "run/tiny", *SHORT)
    limited.send(message("And?"), Tab(), talk, "run/tiny", *SHORT)  # nobody waits for its answer
    third = message("And this?", "nowhere.png")
    with pytest.warns(UserWarning, match="You asked 2 questions within a minute"):
        kept, _, box = limited.send(third, Tab(), talk, "run/tiny", *SHORT)
    assert (kept, box["value"]) == (talk, third)
    with pytest.warns(UserWarning, match="You asked 2 questions within a minute"):
        assert limited.retry(Tab(), talk, "run/tiny", *SHORT)[0] == talk


LONG = Conversation().ask("x" * 4_001).answer("A cat.", "length")
MANY = Conversation().ask("Hi?").answer("x" * 60_000).ask("And?").answer("x" * 60_000, "length")


@pytest.mark.parametrize("event", ["retry", "resume"])
@pytest.mark.parametrize(
    ("conversation", "told"),
    [
        (LONG, "The question has 4,001 characters; the limit is 4,000"),
        (replace(MANY, turns=MANY.turns * 2), "characters; the limit is 100,000. Start a new chat"),
    ],
)
def test_what_came_in_as_a_whole_is_bounded_when_it_is_asked_again(
    handlers: Handlers, event: str, conversation: Conversation, told: str
) -> None:
    before = Talk(conversation)
    with pytest.warns(UserWarning, match=told):
        after = getattr(Handlers(handlers.models, [], Gate(PUBLIC)), event)(Tab(), before, "run/tiny", *SHORT)
    assert after[0] == before
