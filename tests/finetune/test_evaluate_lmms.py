"""The suites that come by way of lmms-eval.

With lmms-eval installed the tests run on it; without, on a stand-in of the part of its interface that is used.
"""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from finetune.__main__ import main
from finetune.evaluate import lmms
from finetune.evaluate.judge import Judge
from finetune.evaluate.results import Answer, Suite
from llava_app.checkpoints import DEMO
from tests.openai_server import Broken, openai_server

datasets = pytest.importorskip("datasets", reason="lmms-eval reads its data with datasets")


def picture(colour: str) -> dict[str, Any]:
    file = BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{colour}.png"}


def mme(colour: str, asked: str) -> dict[str, Any]:
    answer = "Yes" if colour == asked else "No"
    question = f"Is it {asked}? Please answer yes or no."
    row = {"question_id": f"{colour}.png", "question": question, "answer": answer, "category": "color"}
    return row | {"image": picture(colour)}


def seed(number: int, kind: str, answer: str, *colours: str) -> dict[str, Any]:
    row = {f"choice_{letter}": letter for letter in "abcd"} | {"question": "What?", "answer": answer}
    return row | {"data_type": kind, "question_id": str(number), "image": [picture(colour) for colour in colours]}


def mmbench(index: int, answer: str) -> dict[str, Any]:
    row = {"index": index, "question": "What?", "hint": "nan", "answer": answer, "category": "kind", "source": "s"}
    choices = {"A": "cat", "B": "dog", "C": "nan", "D": "nan"}
    return row | choices | {"L2-category": "kinds", "split": "dev", "image": picture("red")}


def mm_vet(number: int, abilities: str) -> dict[str, Any]:
    row = {"question_id": f"v{number}", "question": "What?", "answer": "a<AND>b", "capability": abilities}
    return row | {"image": picture("red")}


ROWS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "mme": ("test", [mme("red", "red"), mme("red", "blue"), mme("blue", "red"), mme("blue", "blue")]),
    "seed": ("test", [seed(0, "image", "A", "red"), seed(1, "video", "B", "red", "blue")]),
    "mmbench": ("dev", [mmbench(1, "A"), mmbench(2, "B"), mmbench(1_000_001, "B")]),
    "mm-vet": ("test", [mm_vet(0, "rec"), mm_vet(1, "rec"), mm_vet(2, "ocr,math")]),
}


def stored(name: str, folder: Path) -> Path:
    """The rows of a suite as `save_to_disk` writes them."""
    split, rows = ROWS[name]
    data = datasets.Dataset.from_list(rows)
    kind = datasets.Image() if name != "seed" else datasets.Sequence(datasets.Image())
    data = data.cast(datasets.Features(data.features | {"image": kind}))
    datasets.DatasetDict({split: data}).save_to_disk(str(folder / name))
    return folder / name


@pytest.fixture(autouse=True)
def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """lmms-eval, or what stands in for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    if find_spec("lmms_eval"):
        return
    parts: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.tasks": {"TaskManager": lambda *_, **__: None, "get_task_dict": stand_in},
        "lmms_eval.tasks.mmbench": {},
        "lmms_eval.tasks.mmbench.mmbench_evals": {"MMBench_Evaluator": lambda: SimpleNamespace(eval_sub_data=letters)},
        "lmms_eval.tasks.mmvet": {},
        "lmms_eval.tasks.mmvet.utils": {"MM_VET_PROMPT": "Compare the ground truth and prediction"},
        "tenacity": {"RetryError": type("RetryError", (Exception,), {})},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def letters(rows: Any, right: dict[int, str], static_only: bool) -> int:
    assert static_only
    return int(rows.iloc[0]["prediction"] == right[rows.iloc[0]["index"]])


def stand_in(wanted: list[dict[str, Any]], _manager: object) -> dict[str, Any]:
    """A task as lmms-eval builds it of a folder."""
    (task,) = wanted
    (split, rows) = next(iter(datasets.load_from_disk(task["dataset_path"]).items()))
    assert task["dataset_kwargs"] == {"load_from_disk": True}
    return {task["task"]: Task(task["task"], split, rows)}


class Task:
    def __init__(self, name: str, split: str, rows: Any) -> None:
        self.name, self.split = name, split
        self.dataset = {split: rows}
        self.dataset_no_image = {split: rows.remove_columns("image")}
        self.instances: list[Any] = []

    def build_all_requests(self, *, limit: int | None) -> None:
        settings = {"temperature": 0} | ({"max_new_tokens": 16} if self.name == "mme" else {})
        self.instances = [
            SimpleNamespace(args=(row["question"], settings, self.show, number, self.name, self.split))
            for number, row in enumerate(self.dataset_no_image[self.split])
        ][:limit]

    def show(self, row: dict[str, Any]) -> list[Image.Image]:
        return row["image"] if self.name == "seedbench" else [row["image"]]

    def doc_to_target(self, row: dict[str, Any]) -> str:
        return str(row["answer"])

    def process_results(self, row: dict[str, Any], texts: list[str]) -> dict[str, Any]:
        said = {"prediction": texts[0].strip(), "pred": texts[0].strip()[:1], **row}
        said["score"] = float(texts[0].strip().lower() == str(row["answer"]).lower())
        return {{"mme": "mme_perception_score", "seedbench": "seed_all"}.get(self.name, "gpt_eval_score"): said}

    def aggregation(self) -> dict[str, Callable[[list[dict[str, Any]]], float]]:
        """MME's: two questions about each picture, per cent right and per cent with both right."""
        return {"mme_perception_score": lambda said: 2 * 100 * sum(each["score"] for each in said) / len(said)}


def suite(name: str, tmp_path: Path, judge: Judge | None = None, limit: int | None = None) -> Suite:
    return lmms.suite(name, judge, folder=tmp_path, data=stored(name, tmp_path), limit=limit)


def answers(found: Suite, *texts: str | None) -> list[Answer]:
    return [
        Answer(question, problem="too long") if text is None else Answer(question, text)
        for question, text in zip(found.questions, texts, strict=True)
    ]


def test_questions_come_with_their_pictures_and_are_marked_by_lmms_eval(tmp_path: Path) -> None:
    found = suite("mme", tmp_path)
    assert [question.pictures()[0].image.getpixel((0, 0)) for question in found.questions[1:3]] == [
        (255, 0, 0),
        (0, 0, 255),
    ]
    assert "Is it blue?" in found.questions[1].text
    assert found.sampling.temperature == 0
    assert found.sampling.max_new_tokens == 16
    results = found.mark(answers(found, "Yes", "No", "No", "Yes"))
    assert [result.points for result in results] == [1, 1, 1, 1]
    assert found.tables(results) == {"MME's own scores": {"mme_perception_score": 200.0}}
    results = found.mark(answers(found, "Yes", "Yes", None, "Yes"))
    assert [result.points for result in results] == [1, 0, None, 1]
    assert found.tables(results) == {}  # no total of what is missing


def test_a_clip_is_several_pictures(tmp_path: Path) -> None:
    found = suite("seed", tmp_path)
    assert [len(question.pictures()) for question in found.questions] == [1, 2]
    assert [question.category for question in found.questions] == ["image", "video"]
    assert [result.points for result in found.mark(answers(found, "A", "C"))] == [1, 0]


def test_a_question_of_mmbench_is_right_when_all_its_copies_are(tmp_path: Path) -> None:
    found = suite("mmbench", tmp_path)
    assert [result.points for result in found.mark(answers(found, "A", "B", "B"))] == [1, 1]
    assert [result.points for result in found.mark(answers(found, "A", "B", "A"))] == [0, 1]
    assert [result.points for result in found.mark(answers(found, "A", "A", None))] == [None, 0]


def test_the_judge_of_mm_vet_gives_the_score_or_none(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    with openai_server(["0.5", "1.0 because", "seven"], asked) as url:
        found = suite("mm-vet", tmp_path, Judge("scripted", url, at_once=1))
        results = found.mark(answers(found, "an a", "a b", "c"))
        assert [result.points for result in results] == [0.5, 1.0, None]
        assert results[2].why == lmms.NO_SCORE
        assert found.tables(results) == {"Judge": {"model": "scripted"}}
        found.mark(answers(found, "an a", "a b", "c"))
        assert len(asked) == 3
    assert asked[0]["messages"][0]["content"].endswith("What? | a <AND> b | an a |")
    with openai_server([Broken()]) as url:
        found = suite("mm-vet", tmp_path, Judge("scripted", url, retries=0))
        assert {result.points for result in found.mark(answers(found, "d", "e", "f"))} == {None}


def test_the_command_leaves_scores_and_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = stored("mme", tmp_path / "data")
    command = ["evaluate", str(DEMO / "memeworld"), "mme", "--data", str(data), "--limit", "3", "--json"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (printed["suite"], printed["count"], printed["missing"]) == ("mme", 3, {})
    assert (tmp_path / "evaluations/memeworld/mme/report.html").is_file()


def test_what_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["evaluate", str(DEMO / "memeworld"), "mm-vet"]) == 2
    assert "needs a judge" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", None)
    assert main(["evaluate", str(DEMO / "memeworld"), "gqa"]) == 2
    assert "pip install lmms-eval" in capsys.readouterr().err
