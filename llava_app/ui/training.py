"""What happens on the Train tab.

Every handler is a public endpoint wherever the tab is. Nothing that the browser sends becomes more than one argument of
`python -m finetune`, and no shell sees it.
"""

import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import gradio as gr
import yaml

from llava_app.commands import ROOT
from llava_app.errors import RecipeError, UserError
from llava_app.images import open_image
from llava_app.jobs import Command, Job, Jobs, ask, short
from llava_app.ui.compare import base_key
from llava_app.ui.curves import LINES, run_view
from llava_app.ui.display import choices, status
from llava_app.ui.models import Models

RECIPES = ROOT / "finetune" / "recipes"
FIELDS = ("learning_rate", "epochs", "global_batch", "micro_batch", "max_steps")
UNTRAINED = "built-in/memeworld-base"  # its two halves are trained, the projector between them is not
FIRST_DATA = ROOT / "data" / "first"
FIRST_PICTURES = 1_000
SHOWN = 3  # examples of the data
PEAK = re.compile(r"at most at once\s+([\d.]+) GB")  # as the plan says it


@dataclass(frozen=True)
class Form:
    """What a person asks for, as the page sends it."""

    name: str
    base: str  # a key of the model list
    recipe: str
    data: str  # path on this machine
    images: str  # path, or empty
    fields: tuple[float | None, ...]  # as FIELDS
    other: str  # field=value, with blanks between

    @property
    def data_path(self) -> str:
        """Absolute, or as the command line takes it in ROOT."""
        return _path(self.data)

    @property
    def image_root(self) -> Command:
        return (f"--images={_path(self.images)}",) if self.images.strip() else ()


class Training:
    """The events of the tab, on the models of this process and the jobs in the folder `runs`."""

    def __init__(self, models: Models, runs: Path) -> None:
        self.models = models
        self.jobs = Jobs(runs)
        self.recipes = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in sorted(RECIPES.glob("*.yaml"))}

    def greet(self, name: str | None) -> list[Any]:
        """The models to start from, and the view of the run that is watched."""
        return [gr.update(choices=self.bases()), *self.show(name)]

    def bases(self) -> list[tuple[str, str]]:
        """The model list, and the runs that will be in it once they are finished."""
        coming = [job.name for job in self.jobs.all() if job.state in ("queued", "running")]
        return choices(self.models.cards()) + [(f"{name} (once it is trained)", f"run/{name}") for name in coming]

    def fill(self, recipe: str) -> list[Any]:
        """The recipe's own values of FIELDS."""
        return [self.recipes.get(recipe, {}).get(field) for field in FIELDS]

    def command(self, *values: Any) -> str:
        """What would run, for a shell; or what is missing for it."""
        try:
            return f"python -m finetune {shlex.join(self._command(_form(*values)))}"
        except UserError as error:
            return f"# {error}"

    def look(self, *values: Any) -> Iterator[list[Any]]:
        """A line, the first pictures of the data and the check's report."""
        form = _form(*values)
        try:
            stage = self._recipe(form)["stage"]
            options = (f"--base={self._source(form.base)}", f"--stage={stage}", f"--show={SHOWN}", *form.image_root)
            with tempfile.TemporaryDirectory() as out:
                for report in ask(("check", *options, f"--out={out}", f"--shown={out}/shown", form.data_path)):
                    yield [status("Looking at every record …", state="loading"), gr.skip(), report or ""]
                pictures = _pictures(report or "", Path(out) / "shown")
            yield [status("This is the data.", state="ready"), pictures, gr.skip()]
        except UserError as error:
            yield [_problem(error), [], ""]

    def plan(self, *values: Any) -> Iterator[list[Any]]:
        """A line, and the plan: memory and time."""
        try:
            for plan in self._plan(_form(*values)):
                yield [status("Planning …", state="loading"), plan or ""]
            yield [status("This is the plan.", state="ready"), gr.skip()]
        except UserError as error:
            yield [_problem(error), ""]

    def start(self, *values: Any) -> Iterator[list[Any]]:
        """Order the run, and watch it."""
        form, given_back = _form(*values), ""
        try:
            command = self._command(form)
            for told in self._make_room(form):
                given_back = told or ""
                yield [status("Planning …", state="loading"), *[gr.skip()] * (len(LINES) - 1)]
            self.jobs.start(form.name, self._recipe(form)["stage"], (command,))
        except UserError as error:
            yield [_problem(error), *[gr.skip()] * (len(LINES) - 1)]
            return
        yield self.show(form.name, note=given_back)

    def first(self) -> list[Any]:
        """Order both stages on the built-in model, with data drawn for them; the second waits for the first."""
        names = ((f"first-{number}-stage-1", f"first-{number}-stage-2") for number in count(1))
        one, two = next(pair for pair in names if not any((self.jobs.runs / name).exists() for name in pair))
        folder = short(FIRST_DATA)
        draw = ("memeworld", "data", f"--folder={folder}", f"--pictures={FIRST_PICTURES}")
        runs = f"--runs={short(self.jobs.runs)}"
        base, aligned = self._source(UNTRAINED), short(self.jobs.runs / one)
        align = ("align", f"--name={one}", f"--base={base}", f"--data={folder}/align.json", runs, "save_every=10")
        instruct = ("instruct", f"--name={two}", f"--base={aligned}", f"--data={folder}/instruct.json", runs)
        try:
            self.jobs.start(one, "align", (draw, (*align, "global_batch=32", "micro_batch=32")))
            self.jobs.start(two, "instruct", ((*instruct, "save_every=10", "epochs=1"),))
        except UserError as error:  # somebody took the name just now
            return [_problem(error), *self.show(None)[1:]]
        return self.show(one, note=f"Stage 2 ({two}) waits for it.")

    def stop(self, name: str | None) -> list[Any]:
        """Ask it to save and end."""
        for job in self._chosen(name):
            job.stop()
        return self.show(name, note="It saves, then ends.")

    def resume(self, name: str | None) -> list[Any]:
        """Go on where it was saved last."""
        try:
            for job in self._chosen(name):
                self.jobs.resume(job.name)
        except UserError as error:
            return [_problem(error), *self.show(name)[1:]]
        return self.show(name)

    def show(self, name: str | None, seen: Any = None, *, note: str = "") -> list[Any]:
        """The view of a run, by default of the one that runs; only its line if it is as it was `seen`."""
        return run_view(self.jobs.all(), name, seen, note=note)

    def chat(self, name: str | None) -> Any:
        """Choose the model of a finished run in the model list."""
        cards = self.models.cards()
        key = f"run/{name}"
        return gr.update(choices=choices(cards), value=key) if key in cards else gr.skip()

    def compare(self, name: str | None) -> tuple[Any, Any]:
        """The model that a finished run was trained from on the left of the Compare tab, and the run on the right."""
        cards, key = self.models.cards(), f"run/{name}"
        base = base_key(cards[key], cards) if key in cards else None
        if base is None:
            gr.Info("The model that this run was trained from is not in the list any more. Choose another one.")
            return gr.skip(), gr.skip()
        listed = choices(cards)
        return gr.update(choices=listed, value=base), gr.update(choices=listed, value=key)

    def _chosen(self, name: str | None) -> list[Job]:
        return [job for job in self.jobs.all() if job.name == name]

    def _make_room(self, form: Form) -> Iterator[str | None]:
        """Give the memory of the page's models back if the plan needs it; at the end, what to say of that.

        Nothing is given back where no plan can be made: the run itself will say what it lacks.
        """
        if not self.models.holds_memory:
            return
        plan = ""
        with suppress(UserError):
            for told in self._plan(form):
                plan = told or ""
                yield None
        peak = PEAK.search(plan)
        names = self.models.give_back() if peak and float(peak[1]) * 1e9 > self.models.free() else []
        if names:
            yield f"{', '.join(names)} gave its memory back; a question to it loads it again."

    def _plan(self, form: Form) -> Iterator[str | None]:
        overrides, data = self._overrides(form), (f"--data={form.data_path}", *form.image_root)
        return ask(("plan", form.recipe, f"--base={self._source(form.base)}", *data, *overrides))

    def _command(self, form: Form) -> Command:
        """Raises UserError."""
        if not form.data.strip():
            raise RecipeError("There is no data to learn from. Give the path of a file or folder.")
        stage = self._recipe(form)["stage"]
        name = self.jobs.job(form.name).name
        runs = () if self.jobs.runs == ROOT / "runs" else (f"--runs={short(self.jobs.runs)}",)
        start = (stage, f"--name={name}", *runs, f"--base={self._source(form.base)}", f"--data={form.data_path}")
        return (*start, *form.image_root, f"--recipe={form.recipe}", *self._overrides(form))

    def _recipe(self, form: Form) -> dict[str, Any]:
        if form.recipe not in self.recipes:
            raise RecipeError("There is no such recipe. Choose one of the list.")
        recipe: dict[str, Any] = self.recipes[form.recipe]
        return recipe

    def _overrides(self, form: Form) -> Command:
        """What differs from the recipe. Raises RecipeError."""
        recipe, other = self._recipe(form), form.other.split()
        wrong = next((word for word in other if not re.fullmatch(r"[a-z_]+=\S+", word)), None)
        if wrong:
            raise RecipeError(f"{wrong!r:.60} is not a change to a recipe. Write field=value, such as lora_rank=8.")
        changed = [
            f"{name}={value:.10g}"
            for name, value in zip(FIELDS, form.fields, strict=True)
            if value and value != recipe.get(name)  # the page shows a field without a value as 0
        ]
        return (*changed, *other)

    def _source(self, key: str) -> str:
        """How the command line names a model of the list, or a run that will be in it. Raises ModelError."""
        if key not in self.models.cards() and any(f"run/{job.name}" == key for job in self.jobs.all()):
            return short(self.jobs.runs / key.removeprefix("run/"))
        card = self.models.card(key)
        return card.source if card.kind == "hub" else short(Path(card.source).absolute())


def _form(*values: Any) -> Form:
    """The form, from what the page sends in its order."""
    name, base, recipe, data, images, *fields, other = values
    return Form(str(name).strip(), base or "", recipe or "", data or "", images or "", tuple(fields), other or "")


def _path(text: str) -> str:
    return short(ROOT / Path(text.strip()).expanduser())


def _pictures(report: str, folder: Path) -> list[tuple[Any, str]]:
    """The pictures of the examples that a report shows, as the check left them, with what the examples are called."""
    named = enumerate(re.findall(r"^--- (.*), pictures: ", report, re.MULTILINE), 1)
    return [(open_image(path).image, name) for number, name in named for path in sorted(folder.glob(f"{number}-*"))]


def _problem(error: UserError) -> str:
    return status(str(error), state="failed")
