import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.instruct.ledger import Ledger
from llava_app.commands import _emptied
from llava_app.datasets import ROOT, DataSet, Order
from llava_app.errors import DataError
from llava_app.ui.data_tab import DataHandlers
from tests.openai_server import openai_server

DRAWN = (None, 3, ["conversation", "detail"], "general", "template", 0, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data set "drawn", written by the real process."""
    parent = tmp_path_factory.mktemp("data")
    said = list(DataHandlers(parent).run("drawn", *DRAWN))
    assert "Kept 3 conversation, 3 detail. 0 tokens." in said[-1]
    return parent


def test_the_exact_prompts_of_the_first_picture_are_shown(tmp_path: Path) -> None:
    shown, line = DataHandlers(tmp_path).preview("new", *DRAWN)
    assert "6 questions for the template teacher, which costs nothing." in line
    assert shown.startswith("=== memeworld-000000/conversation · system ===\nYou write training data")
    assert "memeworld-000000/detail · user" in shown
    assert "memeworld-000001" not in shown
    assert list(tmp_path.iterdir()) == []


def test_a_budget_in_money_and_the_cost_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)  # a look at the prompts needs none
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    paid = (None, 3, ["detail"], "general", "scripted", 0, 0)
    handlers = DataHandlers(tmp_path)
    _, line = handlers.preview("paid", *paid, 0, 1, 1000)
    assert re.search(r"3 questions: about [\d,]+ tokens of prompts and .*, so about 3\.\d\d in money at most", line)
    assert "needs the prices" in handlers.preview("paid", *paid, 5, 0, 0)[1]
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with openai_server(["There are many things. " * 100]) as url:  # 400 tokens; 1,024 are set aside
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        said = list(handlers.run("paid", *paid, 1.5, 1, 1000))
    assert "in money" in said[-1]
    assert "1 missing (the budget is used up)" in said[-1]


def test_results_are_shown_beside_their_pictures(parent: Path) -> None:
    handlers = DataHandlers(parent)
    place, heading, picture, dialogue = handlers.show("drawn", 0, 0, "")
    assert (place, picture.size) == (0, (224, 224))
    assert "1 of 6: memeworld-000000/conversation, kept" in heading
    record = json.loads((parent / "drawn/records.json").read_text(encoding="utf-8"))[0]
    assert ["<image>\n" + dialogue[0][0], dialogue[0][1]] == [turn["value"] for turn in record["conversations"][:2]]
    assert handlers.show("drawn", 0, -1, "")[0] == 5


def test_reviews_are_kept_and_exported(parent: Path) -> None:
    handlers = DataHandlers(parent)
    place, _, _, _ = handlers.decide("drawn", 0, "reject", [], "")
    assert place == 1
    assert "Nothing is left to ask." in handlers.preview("drawn", *DRAWN)[1]
    handlers.decide("drawn", 2, "edit", [["What is it?", "A star."]], "")
    handlers.decide("drawn", 4, "accept", [], "")
    button, line = handlers.export("drawn")
    assert "5 kept, 1 refused; reviewed: 1 edited, 1 accepted, 1 rejected." in line
    records = json.loads(Path(button.value["path"]).read_text(encoding="utf-8"))
    assert len(records) == 5
    edited = next(record for record in records if record["provenance"]["review"] == "edit")
    assert [turn["value"] for turn in edited["conversations"]] == ["<image>\nWhat is it?", "A star."]


def test_an_edit_needs_both_sides(parent: Path) -> None:
    line = DataHandlers(parent).decide("drawn", 1, "edit", [["What is it?", " "]], "")[1]
    assert "Every line needs a question and an answer" in line


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda handlers: handlers.preview("../up", *DRAWN)[1], "no folder name"),
        (lambda handlers: handlers.preview("new", None, 0, *DRAWN[2:])[1], "no pictures to write about"),
        (lambda handlers: handlers.preview("new", None, 3, [], *DRAWN[3:])[1], "No kind of data"),
        (lambda handlers: handlers.preview("new", *DRAWN[:3], "--help", *DRAWN[4:])[1], "--help is no domain"),
        (
            lambda handlers: list(handlers.run("new", *DRAWN[:2], ["reasoning"], *DRAWN[3:]))[-1],
            "cannot write reasoning",
        ),
        (lambda handlers: handlers.show("empty", 0, 0, "")[1], "Nothing is written yet"),
        (lambda handlers: handlers.decide("empty", 0, "accept", [], "")[1], "no such dialogue"),
        (lambda handlers: handlers.export("empty")[1], "holds no generation"),
    ],
)
def test_what_cannot_be_done_is_explained(tmp_path: Path, call: Callable[[DataHandlers], Any], said: str) -> None:
    line = call(DataHandlers(tmp_path))
    assert said in line
    assert str(tmp_path) not in line


def test_a_running_generation_can_be_stopped_and_goes_on(tmp_path: Path) -> None:
    data = DataSet("long", tmp_path)
    order = Order(drawn=150, kinds=("detail",))
    data.start(order)
    with pytest.raises(DataError, match="being written already"):
        data.start(order)
    while "done" not in data.progress():
        assert data.is_running, data.problem()
    data.stop()
    data._writing._process.wait()
    left = data.progress()["missing"]
    assert 0 < left < 150
    data.start(order)
    data._writing._process.wait()
    assert data.progress()["missing"] == 0


def test_what_an_earlier_page_left_running_is_not_disturbed(tmp_path: Path) -> None:
    progress = tmp_path / "left" / "progress.jsonl"
    with Ledger(made(progress).with_name("ledger.jsonl")), _emptied(progress) as earlier:
        earlier.write(b'{"done": 1}\n')
        earlier.flush()
        data = DataSet("left", tmp_path)
        data.start(Order(drawn=1, kinds=("detail",)))
        assert data._writing._process.wait() == 2
        assert "is being written by another run" in data.problem()
        earlier.write(b'{"done": 2}\n')
        earlier.flush()
        assert data.progress() == {"done": 2}


def made(file: Path) -> Path:
    file.parent.mkdir(parents=True)
    return file


def test_the_tab_is_absent_on_a_public_page(tmp_path: Path) -> None:
    built = (
        "import sys; from pathlib import Path; from llava_app.ui.models import Models; "
        "from llava_app.ui.page import build; runs = Path(sys.argv[1]); models = Models(None, None, runs=runs); "
        "ids = lambda public: {getattr(block, 'elem_id', None) for block in build(models, runs, public=public)"
        ".blocks.values()}; own = {'data-tab', 'other-model', 'lens'}; "
        "print(own <= ids(False), bool(own & ids(True)), 'conversation' in ids(True))"
    )
    command = [sys.executable, "-c", built, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "False", "True"], done.stderr
