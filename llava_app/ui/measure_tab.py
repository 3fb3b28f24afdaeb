"""The measure tab: run an evaluation of a model of the list, and read the reports.

It belongs on a machine of one's own: it starts processes and reads files of this machine.
"""

import html
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr

from llava_app.errors import UserError
from llava_app.evaluations import SUITES, Evaluation, Order, Report
from llava_app.ui.display import status
from llava_app.ui.models import Models

LOOK = 0.5  # s between two looks at a running process
EVENT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
ABOUT = (
    "## Measure a model\n"
    "Every suite runs through the same engine as the chat. **vibes** and **memeworld** need nothing; the others need "
    "their official files, and LLaVA-Bench and **mm-vet** a judge: see `OPENAI_API_KEY` and `OPENAI_BASE_URL` in the "
    "README. **gqa**, **mme**, **mm-vet**, **seed** and **mmbench** need `pip install lmms-eval`, which fetches theirs."
)
HEAD = ["Model", "Suite", "Score, %", "Questions", "Missing"]


class MeasureHandlers:
    """The events of the tab: one evaluation at a time."""

    def __init__(self, models: Models, evaluation: Evaluation) -> None:
        self.models = models
        self.evaluation = evaluation

    def run(self, key: str, suite: str, data: str, judge: str, limit: float | None) -> Iterator[str]:
        """Start, or go on; then say how far it is until it ends. Closing the tab does not end it."""
        try:
            source = self.models.card(key).source
            self.evaluation.start(Order(source, suite, data.strip(), judge.strip(), int(limit or 0)))
        except UserError as error:
            yield _problem(error)
            return
        while self.evaluation.is_running:
            yield status(self.evaluation.progress(), state="loading")
            time.sleep(LOOK)
        try:
            yield status(self.evaluation.outcome(), state="ready")
        except UserError as error:
            yield _problem(error)

    def stop(self) -> None:
        self.evaluation.stop()

    def rows(self) -> list[list[Any]]:
        """The table of reports."""
        return [_row(report) for report in self.evaluation.reports()]

    def names(self) -> list[str]:
        """The reports to choose from."""
        return [_name(report) for report in self.evaluation.reports()]

    def show(self, name: str | None) -> str:
        """The report of this name, in a frame that runs nothing."""
        found = next((report for report in self.evaluation.reports() if _name(report) == name), None)
        if found is None:
            return ""
        return _frame(found.page.read_text(encoding="utf-8"))

    def compare(self, models: list[str]) -> str:
        """Measured models side by side, in a frame like a report's."""
        try:
            return _frame(self.evaluation.compare(models))
        except UserError as error:
            return _problem(error)


def measure(handlers: MeasureHandlers, page: gr.Blocks) -> None:
    """Lay the tab out and connect it."""
    gr.Markdown(ABOUT, elem_classes="intro")
    with gr.Column(elem_classes="card"):
        with gr.Row():
            model = gr.Dropdown([], label="Model", elem_id="measure-model")
            suite = gr.Dropdown(list(SUITES), value=SUITES[0], label="Suite", elem_id="measure-suite")
            limit = gr.Number(0, label="Questions", info="The first so many; 0 is all.", precision=0, minimum=0)
        with gr.Row():
            data = gr.Textbox("", label="Folder of the official files", info="Only for suites that need them.")
            judge = gr.Textbox("", label="Judge", info="The name of a model at the endpoint, where a suite needs one.")
        with gr.Row(elem_classes="buttons"):
            run, stop = gr.Button("Measure", variant="primary", elem_id="measure-run"), gr.Button("Stop")
        line = gr.HTML(status("Nothing is running.", state="idle"), elem_id="measure-status")
    with gr.Column(elem_classes="card"):
        table = gr.Dataframe(headers=HEAD, interactive=False, label="Measured so far", elem_id="measure-reports")
        with gr.Row():
            chosen = gr.Dropdown([], label="Report", elem_id="measure-report")
            several = gr.Dropdown([], label="Models to compare", multiselect=True, elem_id="measure-several")
            compare = gr.Button("Compare", min_width=120)
        report = gr.HTML("")
    run.click(handlers.run, [model, suite, data, judge, limit], line, **EVENT).then(handlers.rows, None, table, **EVENT)
    stop.click(handlers.stop, None, None, **EVENT)
    chosen.input(handlers.show, chosen, report, **EVENT)
    chosen.focus(lambda: gr.Dropdown(choices=handlers.names()), None, chosen, **EVENT)
    several.focus(lambda: gr.Dropdown(choices=handlers.evaluation.models()), None, several, **EVENT)
    compare.click(handlers.compare, several, report, **EVENT)
    page.load(handlers.rows, None, table, **EVENT)
    page.load(lambda: _choices(handlers.models), None, model, **EVENT)


def _choices(models: Models) -> Any:
    cards = models.cards()
    return gr.Dropdown(choices=[(card.name, key) for key, card in cards.items()], value=next(iter(cards)))


def _frame(page: str) -> str:
    return f'<iframe title="Report" sandbox srcdoc="{html.escape(page)}" class="report"></iframe>'


def _name(report: Report) -> str:
    return f"{report.model}: {report.suite}"


def _row(report: Report) -> list[Any]:
    score = "–" if report.score is None else f"{report.score:.1f}"
    return [report.model, report.suite, score, report.count, report.missing]


def _problem(error: UserError) -> str:
    return status(str(error), state="failed")
