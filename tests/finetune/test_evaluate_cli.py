"""Every suite from the command line to its report, with the built-in model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.__main__ import main
from finetune.evaluate import cli
from finetune.evaluate.asking import ask_all
from finetune.evaluate.ledger import Ledger, alone
from finetune.evaluate.results import GREEDY, Question, read_lines
from finetune.memeworld import talk
from llava_app.checkpoints import DEMO, built_in
from llava_app.engine.local import LocalEngine
from llava_app.errors import ImageError
from llava_app.images import open_image
from llava_app.loading import load
from tests.openai_server import openai_server

EXPLAINED = {"question": "Which is hot?", "choices": ["ice", "fire"], "answer": 1, "hint": "", "image": "image.png",
             "subject": "natural science", "grade": "grade3", "split": "test"}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model where scores may be written beside its card."""
    return Path(shutil.copytree(DEMO / "memeworld", tmp_path_factory.mktemp("runs") / "tiny"))


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")


def lines(file: Path, *rows: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def pope(folder: Path) -> list[str]:
    for split in ("random", "popular", "adversarial"):
        rows = [{"question_id": 1, "image": "a.jpg", "text": "Is there a cat in the image?", "label": "yes"}]
        lines(folder / f"coco_pope_{split}.json", *rows)
    return ["pope", "--data", str(folder)]


def textvqa(folder: Path) -> list[str]:
    row = {"question_id": 7, "image_id": "a", "question": "what does it say?", "answers": ["stop"] * 10}
    lines(folder / "TextVQA_0.5.1_val.json", {"data": [row]})
    return ["textvqa", "--data", str(folder), "--images", str(folder / "images")]


def scienceqa(folder: Path) -> list[str]:
    (folder / "images" / "test" / "3").mkdir(parents=True)
    Image.new("RGB", (20, 10), "red").save(folder / "images" / "test" / "3" / "image.png")
    lines(folder / "problems.json", {"3": EXPLAINED, "4": EXPLAINED | {"image": None}})
    return ["scienceqa", "--data", str(folder), "--judge", "scripted"]


def coco(folder: Path) -> list[str]:
    lines(folder / "qa90_questions.jsonl", {"question_id": 0, "image": "a.jpg", "text": "What?", "category": "conv"})
    lines(folder / "caps_boxes_coco2014_val_80.jsonl", {"image": "a.jpg", "captions": ["A cat."], "instances": []})
    lines(folder / "qa90_gpt4_answer.jsonl", {"question_id": 0, "text": "A cat."})
    return ["llava-bench-coco", "--data", str(folder), "--judge", "scripted"]


def vibes(_folder: Path) -> list[str]:
    return ["vibes", "--judge", "scripted"]


@pytest.mark.parametrize(
    ("files", "name"),
    [(pope, "pope"), (textvqa, "textvqa"), (scienceqa, "scienceqa-lepa"), (coco, "llava-bench-coco"), (vibes, "vibes")],
)
def test_a_suite_leaves_scores_results_and_reports(
    files: Any, name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "images").mkdir(parents=True)
    Image.new("RGB", (20, 10), "red").save(tmp_path / "data" / "images" / "a.jpg")
    arguments = files(tmp_path / "data")
    with openai_server(["8 6\nThe answer is B."]) as url:
        assert main(["evaluate", str(model), *arguments, "--judge-url", url, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    folder = tmp_path / "evaluations" / "tiny" / name
    results = read_lines(folder / "results.jsonl")
    assert printed["suite"] == name
    assert printed["count"] == len(results) > 0
    assert printed["score"] == pytest.approx(
        100 * sum(r["points"] for r in results) / sum(r["out_of"] for r in results)
    )
    assert not printed["missing"]
    assert json.loads((model / "scores.json").read_text(encoding="utf-8"))[name]["score"] == printed["score"]
    assert "<h1>" in (folder / "report.html").read_text(encoding="utf-8")
    assert (folder / "report.md").read_text(encoding="utf-8").startswith("# memeworld")


def test_the_built_in_model_passes_the_vibes_that_it_was_trained_for(model: Path, tmp_path: Path) -> None:
    assert main(["evaluate", str(model), "vibes"]) == 0
    text = (tmp_path / "evaluations" / "tiny" / "vibes" / "report.md").read_text(encoding="utf-8")
    assert "does it see? | pass: 8" in text
    assert "What is the joke?" in text


def test_memeworld_prints_one_json_object_and_a_part_is_no_score_of_the_model(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (model / "scores.json").read_bytes() if (model / "scores.json").exists() else None
    cli.main([str(model), "memeworld", "--split", "combinations", "--limit", "13", "--json"])
    printed = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert printed["accuracy"] == printed["score"] / 100
    assert printed["count"] == 13
    assert set(printed["by_kind"]) == set(talk.SUITE)
    assert ((model / "scores.json").read_bytes() if before else None) == before


def test_a_run_goes_on_from_the_answers_that_it_has(model: Path, tmp_path: Path) -> None:
    arguments = [str(model), "memeworld", "--out", str(tmp_path / "out")]
    cli.main([*arguments, "--limit", "3"])
    first = (tmp_path / "out" / "answers.jsonl").read_bytes()
    (tmp_path / "out" / "answers.jsonl").write_bytes(first[:-20])  # killed while it wrote the third
    cli.main([*arguments, "--limit", "5"])
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_bytes().split(b"\n") if line[-1:] == b"}"
    ]
    assert len(rows) == 5
    assert len({row["key"] for row in rows}) == 5


def test_two_at_once_do_not_ask_the_same(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(model), "memeworld", "--limit", "2", "--out", str(tmp_path / "out")]
    with alone(tmp_path / "out"):
        assert main(arguments) == 2
        assert "is being written by another run" in capsys.readouterr().err
    assert main(arguments) == 0


def test_another_model_another_picture_and_other_words_are_other_questions(tmp_path: Path) -> None:
    engine = LocalEngine(load(built_in(), "float32"))
    ledger = Ledger(tmp_path / "answers.jsonl")
    red, blue = tmp_path / "red.png", tmp_path / "blue.png"
    Image.new("RGB", (9, 9), "red").save(red)
    Image.new("RGB", (9, 9), "blue").save(blue)

    def asked(text: str, picture: Path, model: str) -> int:
        list(
            ask_all(
                engine, [Question("1", "", text, (lambda: open_image(picture),))], GREEDY, ledger=ledger, model=model
            )
        )
        return len((tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines())

    counts = [
        asked("a?", red, "x"),
        asked("a?", red, "x"),
        asked("b?", red, "x"),
        asked("b?", blue, "x"),
        asked("b?", blue, "y"),
    ]
    engine.close()
    ledger.close()
    assert counts == [1, 1, 2, 3, 4]


def test_a_question_that_cannot_be_asked_has_a_problem_and_no_answer() -> None:
    engine = LocalEngine(load(built_in(), "float32"))

    def gone() -> Any:
        raise ImageError("gone.png cannot be opened.")

    long, broken = Question("1", "", "word " * 5000), Question("2", "", "What?", (gone,))
    answers = list(ask_all(engine, [long, broken], GREEDY))
    engine.close()
    assert [answer.problem is not None for answer in answers] == [True, True]
    assert answers[1].problem == "gone.png cannot be opened."


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["llava-bench-coco", "--data", "x"], "--judge MODEL"),
        (["pope"], "--data FOLDER"),
        (["scienceqa", "--data", "nowhere"], "problems.json cannot be read"),
    ],
)
def test_what_is_missing_is_said_before_the_model_is_loaded(
    arguments: list[str], words: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(model), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_limit_below_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["x", "memeworld", "--limit", "0"])
    assert "ask at least 1" in capsys.readouterr().err
