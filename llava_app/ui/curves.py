"""What the page shows of a training run: its state in a line, curves, answers, the log's end."""

from typing import Any

import gradio as gr

from llava_app.jobs import Job
from llava_app.progress import Progress, last_lines, read_progress, smooth, thin
from llava_app.ui.display import status

REFRESH = 2  # s between two looks at a run that is watched
SHOWN_ANSWERS = 4  # evaluations: the first and the last ones
# What `run_view` gives, in this order.
LINES = ("line", "run", "loss", "rate", "answers", "log", "timer", "stop", "resume", "chat", "compare", "seen")
SAID = {
    "queued": ("It waits for the run before it.", "loading"),
    "running": ("It starts.", "loading"),
    "finished": ("It is trained, and in the model list.", "ready"),
    "stopped": ("It was stopped; Resume goes on where it was saved last.", "failed"),
    "failed": ("It failed. The end of its log says why.", "failed"),
}


def run_view(jobs: list[Job], name: str | None, seen: Any, *, note: str = "") -> list[Any]:
    """The view of the job called `name`, else of the one that runs, else of the last one.

    `seen` is what the view before gave as its last value; where nothing changed since, only the log is drawn anew.
    """
    job = _chosen(jobs, name)
    if job is None:
        return [status("No run yet.", state="idle"), *[gr.skip()] * (len(LINES) - 1)]
    state, progress = job.state, read_progress(job.folder, job.log)
    now = [job.name, state, progress.step, len(progress.evaluations)]
    if now == seen:
        return [*[gr.skip()] * 5, last_lines(job.log), *[gr.skip()] * 6]
    alive = state in ("queued", "running")
    return [
        _line(job.name, state, progress, note),
        gr.update(choices=[(f"{other.name} ({other.state})", other.name) for other in jobs], value=job.name),
        loss_curve(progress),
        rate_curve(progress),
        answers(progress),
        last_lines(job.log),
        gr.Timer(active=alive),
        gr.update(interactive=alive),
        gr.update(interactive=state in ("stopped", "failed")),
        gr.update(interactive=state == "finished"),
        gr.update(interactive=state == "finished"),
        now,
    ]


def loss_curve(progress: Progress) -> dict[str, Any]:
    """Loss per supervised token: of each step, smoothed, and of what is held out."""
    losses = [line["loss"] for line in progress.steps]
    taken = [line["step"] for line in progress.steps]
    points = thin(list(zip(taken, losses, smooth(losses), strict=True)))
    rows = [[step, loss, "each step"] for step, loss, _ in points]
    rows += [[step, smoothed, "smoothed"] for step, _, smoothed in points]
    rows += [[line["step"], line["held_out_loss"], "held out"] for line in progress.evaluations]
    return _plot({"step": "quantitative", "loss": "quantitative", "which": "nominal"}, rows)


def rate_curve(progress: Progress) -> dict[str, Any]:
    """The learning rate of each step."""
    rows = thin([[line["step"], line["learning_rate"]] for line in progress.steps])
    return _plot({"step": "quantitative", "learning rate": "quantitative"}, rows)


def _plot(kinds: dict[str, str], rows: list[list[Any]]) -> dict[str, Any]:
    """What LinePlot makes of a table; made here, it needs no pandas."""
    return {"columns": list(kinds), "data": rows, "datatypes": kinds, "mark": "line"}


def answers(progress: Progress) -> dict[str, Any]:
    """A row for each question: what was wanted, and what the model said as it learned."""
    shown = progress.evaluations[:1] + progress.evaluations[1:][-SHOWN_ANSWERS + 1 :]
    headers = ["Question", "Wanted", *(f"after step {line['step']}" for line in shown)]
    asked = shown[0]["answers"] if shown else []
    rows = [
        [first["question"], first["wanted"], *(line["answers"][place]["answer"] for line in shown)]
        for place, first in enumerate(asked)
    ]
    return {"headers": headers, "data": rows}


def _chosen(jobs: list[Job], name: str | None) -> Job | None:
    named = next((job for job in jobs if job.name == name), None)
    return named or next((job for job in jobs if job.state == "running"), jobs[0] if jobs else None)


def _line(name: str, state: str, progress: Progress, note: str) -> str:
    about, look = SAID[state]
    if progress.steps:
        last = progress.steps[-1]
        of = f" of {progress.total:,}" if progress.total else ""
        about = f"Step {progress.step:,}{of}, loss {smooth([line['loss'] for line in progress.steps])[-1]:.3f}, "
        about += f"{last['tokens_per_second']:,.0f} tokens/s" + (f". {SAID[state][0]}" if state != "running" else "")
    if state == "running" and progress.seconds_left is not None:
        about += f", about {_duration(progress.seconds_left)} left"
    return status(f"{name}: {about}", state=look, why=note)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
