"""The Train tab without a browser."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_app.checkpoints import Card, built_in, write_card
from llava_app.errors import TrainingError
from llava_app.progress import read_progress
from llava_app.ui.curves import LINES, answers, loss_curve, rate_curve
from llava_app.ui.models import Models, Ready, load_locally
from llava_app.ui.page import build
from llava_app.ui.training import FIELDS, Form, Training
from tests.loops import run
from tests.test_models import Silent, card
from tests.test_progress import write


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(lambda card: load_locally(card, "float32"), lambda: (built_in(), ""), runs=tmp_path)


@pytest.fixture
def training(models: Models, tmp_path: Path) -> Training:
    return Training(models, tmp_path)


def asked(training: Training, **changes: Any) -> tuple[Any, ...]:
    """What the page sends, of a recipe as it is but for `changes`."""
    fields = dict(zip(FIELDS, training.fill(RECIPE), strict=True))
    form = {"name": "mine", "base": "built-in/memeworld", "recipe": RECIPE, "data": "/data/a.json", "images": ""}
    return tuple((form | fields | {"other": ""} | changes).values())


RECIPE = "memeworld_instruct"


def test_a_command_says_what_differs_from_the_recipe(training: Training, tmp_path: Path) -> None:
    plain = training.command(*asked(training))
    assert plain == (
        f"python -m finetune instruct --name=mine --runs={tmp_path} --base=llava_app/demo/memeworld "
        "--data=/data/a.json --recipe=memeworld_instruct"
    )
    changed = training.command(*asked(training, learning_rate=1e-4, max_steps=7, epochs=2, other="lora_rank=8"))
    assert changed == plain + " learning_rate=0.0001 max_steps=7 lora_rank=8"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": "../mine"}, "is no folder name"),
        ({"base": "hub/nothing"}, "is not in the list"),
        ({"recipe": "../../secret"}, "no such recipe"),
        ({"data": " "}, "no data to learn from"),
        ({"other": "--push=me/mine"}, "is not a change to a recipe"),
    ],
)
def test_what_cannot_run_is_said_and_not_started(training: Training, changes: dict[str, str], complaint: str) -> None:
    values = asked(training, **changes)
    assert complaint in training.command(*values)
    (view,) = training.start(*values)
    assert complaint in view[0]
    assert not training.jobs.all()


def test_a_blank_in_a_path_stays_one_argument(training: Training) -> None:
    assert "'--data=/data/my own; ls.json'" in training.command(*asked(training, data="/data/my own; ls.json"))


def test_a_view_without_a_run_says_what_to_do(training: Training) -> None:
    view = training.show(None)
    assert len(view) == len(LINES)
    assert "No run yet" in view[0]


def test_curves_and_answers_follow_the_log(tmp_path: Path) -> None:
    said = [{"question": "Which?", "wanted": "A cat.", "answer": word} for word in ("Eh", "A dog.", "A cat.")]
    evaluations = [{"step": n, "held_out_loss": 2.0 - n, "answers": [said[n]]} for n in range(3)]
    steps = [{"step": n, "loss": 3.0 - n, "learning_rate": 0.1 * n, "elapsed": n} for n in (1, 2)]
    write(tmp_path, evaluations[0], steps[0], evaluations[1], steps[1], evaluations[2])
    progress = read_progress(tmp_path, tmp_path / "log.txt")
    rows = loss_curve(progress)["data"]
    assert [row for row in rows if row[2] == "each step"] == [[1, 2.0, "each step"], [2, 1.0, "each step"]]
    assert [row[1] for row in rows if row[2] == "held out"] == [2.0, 1.0, 0.0]
    assert rate_curve(progress)["data"] == [[1, 0.1], [2, 0.2]]
    assert answers(progress) == {
        "headers": ["Question", "Wanted", "after step 0", "after step 1", "after step 2"],
        "data": [["Which?", "A cat.", "Eh", "A dog.", "A cat."]],
    }


@pytest.mark.parametrize(("free", "closed"), [(9.9e9, True), (12e9, False)])
def test_a_model_gives_its_memory_back_to_a_training_whose_plan_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, closed: bool
) -> None:
    opened: list[Silent] = []

    def load(wanted: Card) -> Ready:
        opened.append(Silent(wanted))
        return Ready(opened[-1], "")

    models = Models(load, lambda: (card("big"), ""), runs=tmp_path, free=lambda: free)
    training = Training(models, tmp_path)
    planned: list[Form] = []

    def plan(form: Form) -> Iterator[str | None]:
        planned.append(form)
        yield None
        yield "weights   4.5 GB\nat most at once   11.3 GB"

    monkeypatch.setattr(training, "_plan", plan)
    monkeypatch.setattr(training.jobs, "start", lambda name, stage, commands: None)
    monkeypatch.setattr(training, "show", lambda name, note: [note])
    assert list(training.start(*asked(training))) == [[""]]
    assert not planned  # nothing is loaded that could be given back
    models.start()
    with models.lend(card("big")) as ready:
        ready.result(30)
    planning, *_, (note,) = training.start(*asked(training))
    assert "Planning …" in planning[0]
    assert note == ("big gave its memory back; a question to it loads it again." if closed else "")
    assert opened[0].closed is closed
    assert models.holds_memory is not closed


def test_a_run_starts_also_where_no_plan_can_be_made(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(form: Form) -> Iterator[str | None]:
        yield None
        raise TrainingError("no plan")

    training, ordered = Training(models, models.runs), []
    monkeypatch.setattr(Models, "holds_memory", True)
    monkeypatch.setattr(training, "_plan", plan)
    monkeypatch.setattr(training.jobs, "start", lambda name, stage, commands: ordered.append(name))
    *_, view = training.start(*asked(training))
    assert ordered == ["mine"]
    assert "no plan" not in view[0]


@pytest.mark.parametrize("layout", ["a folder", "an archive", "a mixture"])
def test_the_pictures_of_data_are_shown_whatever_its_layout(training: Training, tmp_path: Path, layout: str) -> None:
    data = folder = tmp_path / "mine"
    folder.mkdir()
    Image.new("RGB", (7, 5), "red").save(folder / "red.png")
    row = {"id": "first", "file_name": "red.png", "text": "A red picture."}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    if layout == "an archive":
        with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
            archive.write(folder / "red.png", "red.png")
        (folder / "red.png").unlink()
    if layout == "a mixture":
        data = tmp_path / "mixture.yaml"
        data.write_text("seed: 0\nparts:\n  - {data: mine}\n  - {data: mine}\n", encoding="utf-8")
    *_, (line, pictures, _) = training.look(*asked(training, data=str(data)))
    assert "This is the data." in line
    shown = [(picture.size, picture.getpixel((0, 0)), name) for picture, name in pictures]
    assert shown == [((7, 5), (255, 0, 0), "first")] * (2 if layout == "a mixture" else 1)


def test_the_first_run_takes_a_name_that_no_folder_has(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered: list[str] = []
    monkeypatch.setattr(training.jobs, "_start", lambda job, order: ordered.append(job.name))
    for name in ("first-1-stage-1", "first-2-stage-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.yaml").write_text("of the command line", encoding="utf-8")
    training.first()
    assert ordered == ["first-3-stage-1", "first-3-stage-2"]

    def taken(name: str, *_: object) -> None:
        raise TrainingError(f"There is a run {name} already.")

    monkeypatch.setattr(training.jobs, "start", taken)
    assert "There is a run first-3-stage-1 already." in training.first()[0]


def test_a_finished_run_is_compared_with_its_base_in_one_click(training: Training, tmp_path: Path) -> None:
    for name, base in (("mine-stage-1", "memeworld-base"), ("mine", "mine-stage-1"), ("lost", "nowhere")):
        (tmp_path / name).mkdir()
        write_card(tmp_path / name, Card(name, name, "run", "instruct", "vicuna_v1", "pad", base=base))
    left, right = training.compare("mine")
    assert (left["value"], right["value"]) == ("run/mine-stage-1", "run/mine")
    assert training.compare("mine-stage-1")[0]["value"] == "built-in/memeworld-base"
    for name in ("lost", "nobody", None):
        assert "value" not in training.compare(name)[1]


def test_a_public_page_has_no_event_that_trains(models: Models, tmp_path: Path) -> None:
    async def handlers(public: bool) -> set[str]:  # outside a loop, every component would leave one open
        page = build(models, tmp_path, public=public)
        return {type(event.fn.__self__).__name__ for event in page.fns.values() if hasattr(event.fn, "__self__")}

    assert "Training" in run(handlers(public=False))
    assert "Training" not in run(handlers(public=True))
