"""The measure tab: an evaluation as a process, its progress, its report."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.evaluate.results import Question, Result, Suite, scores, write_results, write_scores
from finetune.evaluate.suites import SUITES as REAL_SUITES
from llava_app.checkpoints import DEMO, built_in
from llava_app.errors import DataError
from llava_app.evaluations import SUITES, Evaluation, Order
from llava_app.ui.measure_tab import MeasureHandlers
from llava_app.ui.models import Models


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    shutil.copytree(DEMO / "memeworld", tmp_path / "runs" / "tiny")
    return tmp_path / "runs"


@pytest.fixture
def handlers(runs: Path, tmp_path: Path) -> MeasureHandlers:
    def never(*_: Any) -> Any:
        raise AssertionError("the tab loads no model")

    return MeasureHandlers(Models(never, lambda: (built_in(), ""), runs=runs), Evaluation(tmp_path / "evaluations"))


def test_the_tab_offers_the_suites_that_there_are() -> None:
    assert set(SUITES) == set(REAL_SUITES)


def test_a_model_is_measured_and_its_report_is_shown(handlers: MeasureHandlers) -> None:
    said = list(handlers.run("run/tiny", "memeworld", "", "", 3))
    assert "Done." in said[-1]
    ((model, suite, score, count, missing),) = handlers.rows()
    assert (model, suite, count, missing) == ("tiny", "memeworld-heldout", 3, 0)
    assert 0 <= float(score) <= 100
    shown = handlers.show(*handlers.names())
    assert shown.startswith("<iframe")
    assert "sandbox" in shown
    assert "memeworld-heldout" in shown
    assert handlers.show("../../secret") == ""


def test_what_went_wrong_is_said_without_paths(handlers: MeasureHandlers, tmp_path: Path) -> None:
    said = list(handlers.run("run/tiny", "pope", str(tmp_path / "nowhere"), "", None))
    assert "failed" in said[-1]
    assert "coco_pope_random.json" in said[-1]
    assert str(tmp_path) not in said[-1]


@pytest.mark.parametrize(("key", "suite"), [("run/gone", "vibes"), ("run/tiny", "rm -rf")])
def test_forged_choices_start_nothing(key: str, suite: str, handlers: MeasureHandlers) -> None:
    (said,) = handlers.run(key, suite, "", "", 0)
    assert "failed" in said
    assert not handlers.evaluation.is_running


def test_an_order_is_a_command_line() -> None:
    assert Order("m", "pope", "d", "j", -3).arguments() == ["m", "pope", "--data=d", "--judge=j"]
    with pytest.raises(DataError, match="no suite"):
        Order("m", "x").arguments()


def test_progress_is_read_from_what_the_process_says(tmp_path: Path) -> None:
    evaluation = Evaluation(tmp_path)
    assert evaluation.progress() == "The model is being loaded"
    (tmp_path / "last.log").write_text("asking:  2%| | 1/52 [00:01<00:51]\rasking: 40%|##| 21/52 [00:02<00:03]")
    assert evaluation.progress() == "21 of 52 questions"


def test_the_newest_report_comes_first(tmp_path: Path) -> None:
    for place, name in enumerate(("old", "new")):
        folder = tmp_path / name / "toy"
        folder.mkdir(parents=True)
        found = {"suite": "toy", "score": None, "count": 0, "missing": {"x": 2}}
        (folder / "scores.json").write_text(json.dumps({"toy": found}))
        (folder / "report.html").write_text("<p>")
        os.utime(folder / "report.html", (place, place))
    assert [(report.model, report.missing) for report in Evaluation(tmp_path).reports()] == [("new", 2), ("old", 2)]


def test_measured_models_are_put_side_by_side(handlers: MeasureHandlers, tmp_path: Path) -> None:
    for model, points in (("good", [1.0] * 12), ("bad", [0.0] * 12)):
        folder = tmp_path / "evaluations" / model / "toy"
        folder.mkdir(parents=True)
        results = [Result(Question(str(n), "all", f"Q{n}?"), "A.", value) for n, value in enumerate(points)]
        suite = Suite("toy", "right", [], lambda _: [])
        write_results(folder, results)
        write_scores(folder / "scores.json", scores(suite, results, model=model, seed=0))
        (folder / "report.html").write_text("<p>")
    assert handlers.evaluation.models() == ["bad", "good"]
    shown = handlers.compare(["good", "bad"])
    assert shown.startswith("<iframe")
    assert "beside good" in shown
    assert "-100.0" in shown
    assert "at least two measured models" in handlers.compare(["good"])
    assert "at least two measured models" in handlers.compare(["good", "../../secret"])


LAID_OUT = """
import gradio as gr
from llava_app.evaluations import Evaluation
from llava_app.ui.measure_tab import MeasureHandlers, measure
with gr.Blocks() as page:
    measure(MeasureHandlers(None, Evaluation()), page)
print({getattr(block, "elem_id", None) for block in page.blocks.values()})
"""


def test_the_tab_can_be_laid_out() -> None:
    """In a process of its own, because Gradio leaves an event loop open."""
    done = subprocess.run([sys.executable, "-c", LAID_OUT], capture_output=True, text=True, check=True)
    assert {"measure-model", "measure-suite", "measure-run", "measure-reports"} <= ast.literal_eval(done.stdout)
