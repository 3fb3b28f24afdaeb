import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import copyfile
from threading import Barrier, Event

import pytest
import torch
from PIL import Image

from llava_app.__main__ import main
from llava_app.checkpoints import Card
from llava_app.cli import ask, caption, doctor
from llava_app.conversation import Conversation
from llava_app.engine import Piece, Sampling
from llava_app.engine.local import LocalEngine
from llava_app.images import open_image
from llava_app.loading import Loaded

GREEDY = Sampling(temperature=0, max_new_tokens=6)
FLAGS = ["--temperature", "0", "--max-new-tokens", "6", "--precision", "float32"]


class Interrupted:
    """An engine during whose answer somebody presses Ctrl-C."""

    def __init__(self) -> None:
        self.card = Card("Interrupted", "", "run", "instruct", "vicuna_v1", "pad")

    def answer(self, conversation: Conversation, sampling: Sampling) -> Iterator[Piece]:
        yield Piece("Two ", tokens=1)
        raise KeyboardInterrupt


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Two pictures, one of them in a folder of its own, and a file that only calls itself one."""
    (tmp_path / "more").mkdir()
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    Image.new("RGB", (10, 20), "blue").save(tmp_path / "more" / "blue.PNG")
    (tmp_path / "broken.jpg").write_text("not a picture")
    (tmp_path / "notes.txt").write_text("no picture either")
    return tmp_path


@pytest.fixture
def expected(tiny_loaded: Loaded) -> Iterator[LocalEngine]:
    """The engine by itself, to compare with."""
    engine = LocalEngine(tiny_loaded)
    yield engine
    engine.close()


def said(engine: LocalEngine, conversation: Conversation) -> str:
    return "".join(piece.text for piece in engine.answer(conversation, GREEDY))


def lines(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_without_a_verb_the_verbs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert main(["ak"]) == 2
    listed = capsys.readouterr().out
    assert all(verb in listed for verb in ("ask", "caption", "doctor"))


@pytest.mark.parametrize(
    ("words", "pictures", "question"),
    [
        ([], [], None),
        (["What is a cat?"], [], "What is a cat?"),
        (["a.png", "b.jpg", "Which is it?"], ["a.png", "b.jpg"], "Which is it?"),
        (["a.png"], ["a.png"], None),
        ([__file__], [__file__], None),
    ],
)
def test_the_last_word_is_the_question_unless_it_is_a_picture(
    words: list[str], pictures: list[str], question: str | None
) -> None:
    assert ask.split(words) == (pictures, question)


def test_an_answer_cannot_command_the_terminal() -> None:
    assert ask.printable("A\x1b]0;owned\x07 cat.\n\tÄ 猫") == "A]0;owned cat.\n\tÄ 猫"


def test_a_question_is_answered_as_the_engine_does(
    album: Path, tiny_card: Card, expected: LocalEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    red = album / "red.png"
    assert main(["ask", str(red), "What is it?", "--model", tiny_card.source, *FLAGS]) == 0
    told = capsys.readouterr()
    asked = Conversation().ask("What is it?", [open_image(red)])
    assert told.out == ask.printable(said(expected, asked)) + "\n"
    assert "float32" in told.err
    assert "--max-new-tokens" in told.err  # random weights do not come to an end in six tokens


def test_without_a_question_every_line_is_one_and_the_conversation_goes_on(
    album: Path,
    tiny_card: Card,
    expected: LocalEngine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"What is it?\n\n{'too long ' * 500}\nWhy?\n"))
    red = album / "red.png"
    assert main(["ask", str(red), "--model", tiny_card.source, *FLAGS]) == 0
    first = Conversation().ask("What is it?", [open_image(red)])
    answer = said(expected, first)
    second = said(expected, first.answer(answer).ask("Why?"))
    told = capsys.readouterr()
    assert told.out.replace("\n\n", "\n") == "".join(f"{ask.printable(text)}\n" for text in (answer, second))
    assert "Shorten the question" in told.err


def test_ctrl_c_ends_the_answer_and_keeps_it(capsys: pytest.CaptureFixture[str]) -> None:
    kept = ask._stream(Interrupted(), Conversation().ask("Why?"), GREEDY)  # type: ignore[arg-type]
    assert (kept.turns[-1].answer, kept.turns[-1].finish) == ("Two ", "stopped")
    assert capsys.readouterr().out == "Two \n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png", "What?"], "There is no file nowhere.png"),
        (["What?", "--temperature", "9"], "temperature is 9.0; it must lie between 0.0 and 2.0"),
        (["What?", "--model", "no-such"], "There is no model “no-such”"),
    ],
)
def test_what_cannot_be_asked_is_told_before_anything_loads(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Loading" not in told


def test_a_folder_is_captioned_and_what_was_missing_is_done_the_next_time(
    album: Path, tiny_card: Card, expected: LocalEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["caption", str(album), "--model", tiny_card.source, *FLAGS]
    out = album / "captions.jsonl"
    assert main(command) == 1
    assert "broken.jpg: this file is not a picture" in capsys.readouterr().err
    captions = {line["file"]: line["caption"] for line in lines(out)}
    for name in ("red.png", "more/blue.PNG"):
        asked = Conversation().ask(caption.QUESTION, [open_image(album / name)])
        assert captions.pop(name) == said(expected, asked).strip()
    assert not captions
    written = out.read_bytes()
    out.write_bytes(written + b'{"file": "bro')  # as a crash leaves it
    copyfile(album / "red.png", album / "broken.jpg")
    assert main(command) == 0
    assert out.read_bytes().startswith(written)
    assert [line["file"] for line in lines(out)][2:] == ["broken.jpg"]
    assert main(command) == 0
    assert "3 pictures, 3 of them captioned already." in capsys.readouterr().err


def test_a_folder_without_pictures_is_refused(album: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caption", str(album / "nowhere")]) == 2
    assert "There are no pictures" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["mine\n", "mine, without an end", '["file"]\n'])
def test_a_file_of_something_else_is_refused_and_stays(
    album: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = album / "notes.txt"
    notes.write_text(text)
    assert main(["caption", str(album), "--out", str(notes)]) == 2
    assert "Line 1" in capsys.readouterr().err
    assert notes.read_text() == text


def test_pictures_are_captioned_several_at_a_time_and_the_rest_is_dropped_when_nobody_waits() -> None:
    together, over = Barrier(3, timeout=30), Event()
    begun: list[str] = []

    def slow(name: str) -> str:
        begun.append(name)
        if name < "003":
            together.wait()  # passes only when three are here at once
        else:
            over.wait(30)
        return name

    results = caption._several(slow, [f"{number:03}" for number in range(500)], at_once=3)
    name, text = next(results)
    results.close()
    over.set()
    assert text == name
    assert len(begun) <= 6


def test_the_doctor_tries_the_built_in_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--runs", str(tmp_path)]) in (0, 1)  # 1 on a machine with little room
    told = capsys.readouterr().out
    assert "the built-in model was loaded and answered in" in told
    for about in ("torch", "Hub models", "CPU", "Memory", "Starts with", "Precision"):
        assert f"\n{about} " in told


def test_the_doctor_names_packages_that_are_old_or_missing() -> None:
    found = list(doctor._packages("pillow>=999  # from the future\nno-such-package>=1\npytest\n"))
    assert [finding.remedy for finding in found] == [
        'this app is made for >=999: pip install "pillow>=999"',
        'pip install "no-such-package>=1"',
        None,
    ]


def test_the_doctor_says_why_a_gpu_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GeForce GTX 1080")
    monkeypatch.setattr("llava_app.precision.gpu_fault", lambda: "no kernel image is available")
    finding = next(doctor._devices())
    assert finding.about == "GPU"
    assert finding.found == "GeForce GTX 1080: no kernel image is available"
    assert "build of PyTorch for this GPU" in str(finding.remedy)


def test_the_doctor_says_where_room_is_missing(tmp_path: Path) -> None:
    enough = doctor._folder("Runs", tmp_path / "runs", needed=0, instead="")
    short = doctor._folder("Runs", tmp_path / "runs", needed=1e18, instead="give --runs with a folder on another")
    assert enough.remedy is None
    assert short.remedy == "1000000000.0 GB may be needed; make room, or give --runs with a folder on another disk"
    assert doctor._memory(1e9).remedy
    assert not doctor._memory(8e9).remedy
