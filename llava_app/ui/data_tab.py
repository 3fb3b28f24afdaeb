"""The data tab: have dialogues about pictures written from captions and boxes, look them through, export them.

It belongs on a machine of one's own: it starts processes and reads files of this machine.
"""

import html
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from llava_app.datasets import DataSet, Item, Order, summary
from llava_app.errors import ImageError, UserError
from llava_app.images import open_image
from llava_app.ui.display import status

KINDS = ("conversation", "detail", "reasoning")
DOMAINS = ("general", "medical", "satellite")
LOOK = 0.5  # s between two looks at a running process
EVENT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
ABOUT = (
    "## Make training data\n"
    "A teacher that sees no picture writes dialogues from captions and boxes. Prompts, filters and file formats "
    "are explained in `finetune/instruct/README.md`."
)

View = tuple[int, str, Any, list[list[str]]]  # place, heading, picture, dialogue


class DataHandlers:
    """The events of the tab, on the data sets below `parent`."""

    def __init__(self, parent: Path) -> None:
        self.parent = parent
        self._sets: dict[str, DataSet] = {}

    def preview(self, name: str, *choices: Any) -> tuple[str, str]:
        """The exact prompts for the first picture, and what asking for all would cost."""
        try:
            prompts, estimate = self._set(name).preview(_order(*choices))
        except UserError as error:
            return "", _problem(error)
        return prompts, status(estimate, state="ready")

    def run(self, name: str, *choices: Any) -> Iterator[str]:
        """Start, or go on; then say how far it is until it ends. Closing the tab does not end it."""
        try:
            data = self._set(name)
            data.start(_order(*choices))
        except UserError as error:
            yield _problem(error)
            return
        while data.is_running:
            yield _progress(data.progress())
            time.sleep(LOOK)
        yield _ended(data)

    def stop(self, name: str) -> None:
        try:
            self._set(name).stop()
        except UserError as error:
            gr.Info(html.escape(str(error)))

    def show(self, name: str, place: float, step: int, pictures: str) -> View:
        """The dialogue `step` places further, beside its picture."""
        try:
            data = self._set(name)
            items = data.items()
        except UserError as error:
            return 0, _problem(error), None, []
        if not items:
            return 0, status("Nothing is written yet.", state="loading"), None, []
        at = int(place + step) % len(items)
        item = items[at]
        return at, _heading(item, at, items), _picture(data, item, pictures), [list(turn) for turn in item.dialogue]

    def decide(self, name: str, place: float, verdict: str, dialogue: list[list[str]], pictures: str) -> View:
        """Write the decision down and go on to the next dialogue."""
        try:
            data = self._set(name)
            items = data.items()
            item = items[int(place) % max(1, len(items))] if items else Item("", "", ())
            data.review(item.key, verdict, dialogue if verdict == "edit" else ())
        except UserError as error:
            return int(place), _problem(error), gr.skip(), gr.skip()
        return self.show(name, place, 1, pictures)

    def export(self, name: str) -> tuple[Any, str]:
        """The file of records, made anew with the reviews."""
        try:
            data = self._set(name)
            copy = shutil.copy(
                data.export(), tempfile.mkdtemp(prefix="llava-")
            )  # the page may hand out files from there
            line = status(f"records.json is ready: {summary(data.items())}.", state="ready")
            return gr.DownloadButton(value=copy, interactive=True), line
        except UserError as error:
            return gr.skip(), _problem(error)

    def _set(self, name: str) -> DataSet:
        if name not in self._sets:
            self._sets[name] = DataSet(name, self.parent)
        return self._sets[name]


def data(handlers: DataHandlers) -> None:
    """Lay the tab out and connect it."""
    gr.Markdown(ABOUT, elem_classes="intro")
    with gr.Column(elem_classes="card"):
        name, choices = _choices()
        with gr.Row(elem_classes="buttons"):
            run, preview, stop = (
                gr.Button(label, variant=variant)
                for label, variant in (
                    ("Write", "primary"),
                    ("Preview prompts and cost", "secondary"),
                    ("Stop", "secondary"),
                )
            )
        line = gr.HTML(status("Nothing is running.", state="idle"), elem_id="data-status")
        prompts = gr.Textbox(label="Exact prompts", lines=2, max_lines=16, interactive=False, elem_id="prompts")
    preview.click(handlers.preview, [name, *choices], [prompts, line], **EVENT)
    stop.click(handlers.stop, name, None, **EVENT)
    with gr.Column(elem_classes="card"):
        _browse(handlers, name, run.click(handlers.run, [name, *choices], line, **EVENT))


def _choices() -> tuple[gr.Textbox, list[gr.components.Component]]:
    """The name of the data set, and what `_order` takes, in its order."""
    with gr.Row():
        name = gr.Textbox(
            "first", label="Name of the data set", info="A name used before goes on.", elem_id="data-name"
        )
        drawn = gr.Number(
            20,
            label="Draw pictures of the built-in world",
            info="Or give files below.",
            precision=0,
            minimum=0,
            maximum=10_000,
        )
    files = gr.File(
        label="Captions and boxes (COCO .json files, or .jsonl)",
        file_count="multiple",
        file_types=[".json", ".jsonl"],
        height=120,
    )
    with gr.Row():
        kinds = gr.CheckboxGroup(list(KINDS), value=list(KINDS[:2]), label="Kinds", elem_id="kinds")
        domain = gr.Dropdown(
            list(DOMAINS),
            value="general",
            label="Domain",
            info="Or a folder of prompts.",
            allow_custom_value=True,
        )
    with gr.Row():
        teacher = gr.Textbox(
            "template", label="Teacher", info="template, a model's folder, or a model at OPENAI_BASE_URL.", scale=2
        )
        limit = gr.Number(0, label="Only the first", info="Pictures; 0 is all.", precision=0, minimum=0)
    with gr.Row():
        tokens = gr.Number(0, label="Budget in tokens", info="Never passed; 0 is no limit.", precision=0, minimum=0)
        money = gr.Number(0, label="Budget in money", info="Never passed; 0 is no limit.", minimum=0)
        prompts = gr.Number(0, label="Price of prompts", info="Per million tokens.", minimum=0)
        answers = gr.Number(0, label="Price of answers", info="Per million tokens.", minimum=0)
    return name, [files, drawn, kinds, domain, teacher, limit, tokens, money, prompts, answers]


def _browse(handlers: DataHandlers, name: gr.Textbox, written: gr.events.Dependency) -> None:
    """Results beside their pictures."""
    gr.HTML("<h3>Look through it</h3>")
    place = gr.State(0)
    heading = gr.HTML(elem_id="data-heading")
    with gr.Row():
        with gr.Column(scale=2):
            picture = gr.Image(label="Picture", interactive=False, height=300)
            pictures = gr.Textbox("", label="Folder of your pictures", info="Empty for drawn ones.", elem_id="pictures")
        with gr.Column(scale=3):
            dialogue = gr.Dataframe(
                headers=["Question", "Answer"],
                column_widths=["40%", "60%"],
                type="array",
                column_count=2,
                wrap=True,
                elem_id="dialogue",
            )
    view = [place, heading, picture, dialogue]
    written.then(handlers.show, [name, place, gr.State(0), pictures], view, **EVENT)
    with gr.Row(elem_classes="buttons"):
        for label, step in (("Back", -1), ("Show", 0), ("Next", 1)):
            button = gr.Button(label)
            button.click(handlers.show, [name, place, gr.State(step), pictures], view, **EVENT)
        for label, verdict in (("Accept", "accept"), ("Keep my edit", "edit"), ("Reject", "reject")):
            inputs = [name, place, gr.State(verdict), dialogue, pictures]
            gr.Button(label).click(handlers.decide, inputs, view, **EVENT)
    with gr.Row(elem_classes="buttons"):
        export = gr.Button("Export")
        download = gr.DownloadButton("Download records.json", interactive=False)
    export.click(handlers.export, name, [download, heading], **EVENT)


def _order(
    files: list[str] | None,
    drawn: float | None,
    kinds: list[str],
    domain: str,
    teacher: str,
    limit: float | None,
    tokens: float | None,
    money: float | None,
    prompts: float | None,
    answers: float | None,
) -> Order:
    """Files go before drawn pictures."""
    return Order(
        files=tuple(map(Path, files or ())),
        drawn=0 if files else int(drawn or 0),
        kinds=tuple(kinds),
        domain=domain.strip(),
        teacher=teacher.strip(),
        limit=int(limit) if limit else None,
        budget_tokens=int(tokens) if tokens else None,
        budget_money=money,
        prices=(prompts or 0, answers or 0) if prompts or answers else None,
    )


def _progress(said: dict[str, Any]) -> str:
    if "done" not in said:
        return status(said.get("estimate", "Starting …"), state="loading")
    spent = _spent(said["tokens"], said["cost"])
    return status(f"{said['done']:,} of {said['total']:,} asked, {spent}.", state="loading", why=said["problem"])


def _spent(tokens: int, cost: str) -> str:
    """What was used, in money only where there are prices."""
    return f"{tokens:,} tokens" + f", {cost} in money" * (float(cost) > 0)


def _ended(data: DataSet) -> str:
    report = data.progress()
    if "kept" not in report:
        return status(data.problem() or "It ended without a result.", state="failed")
    refused = ", ".join(f"{found['count']} {reason}" for reason, found in report["refused"].items())
    missing = f"{report['missing']:,} missing" + (f" ({report['ended_by']})" if report["ended_by"] else "")
    why = "; ".join(filter(None, [f"refused: {refused}" if refused else "", missing if report["missing"] else ""]))
    kept = ", ".join(f"{count} {kind}" for kind, count in report["kept"].items())
    spent = _spent(sum(report["tokens"].values()), report["cost"])
    return status(f"Kept {kept}. {spent}.", state="failed" if report["missing"] else "ready", why=why)


def _heading(item: Item, at: int, items: list[Item]) -> str:
    said = f"refused: {item.reason}" if item.reason else "kept"
    verdict = f"your review: {item.verdict}" if item.verdict else "not reviewed"
    state = "failed" if item.reason and not item.verdict else "ready"
    return status(f"{at + 1} of {len(items)}: {item.key}, {said}; {verdict}.", state=state, why=summary(items))


def _picture(data: DataSet, item: Item, pictures: str) -> Any:
    """The picture where it can be opened; a dialogue can be read without it."""
    try:
        return open_image(Path(pictures.strip() or data.path) / item.image).image
    except ImageError as error:
        gr.Info(html.escape(str(error)))
        return None


def _problem(error: UserError) -> str:
    return status(str(error), state="failed")
