"""How far a training run is, from the files that it writes: curves, time left, answers, the log's end."""

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from llava_app.commands import without_folders

SMOOTHING = 0.9  # share of what was before, at each step
RECENT = 50  # steps that the time left is reckoned from
POINTS = 400  # of a curve, which no screen shows more of
TAIL = 20_000  # bytes of the log's end that are read
SHOWN_LINES = 12

_BAR = re.compile(r"(\d+)/(\d+) \[[^\]]*step")  # tqdm's


@dataclass(frozen=True)
class Progress:
    """The lines of log.jsonl, and how many steps there will be once that is known."""

    steps: list[dict[str, Any]]  # step, loss, learning_rate, tokens_per_second, elapsed …
    evaluations: list[dict[str, Any]]  # step, held_out_loss, answers
    total: int | None

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def seconds_left(self) -> float | None:
        """None before two steps were taken, and while the total is unknown."""
        recent = [line["elapsed"] for line in self.steps[-RECENT:]]
        lengths = [after - before for before, after in pairwise(recent) if after > before]  # a resumed run counts anew
        return median(lengths) * (self.total - self.step) if lengths and self.total else None


def read_progress(run: Path, log: Path) -> Progress:
    """The progress of the run in a folder; `log` is what its process prints, whose bar knows the total."""
    path = run / "log.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    bars = _BAR.findall(_end(log))
    return Progress(
        steps=[line for line in lines if "loss" in line],
        evaluations=[line for line in lines if "held_out_loss" in line],
        total=int(bars[-1][1]) if bars else None,
    )


def smooth(values: list[float]) -> list[float]:
    """The exponential moving average without its bias to the beginning (Kingma & Ba 2015, Adam, section 3)."""
    smoothed, mean = [], 0.0
    for count, value in enumerate(values, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        smoothed.append(mean / (1 - SMOOTHING**count))
    return smoothed


def thin(points: list[Any]) -> list[Any]:
    """At most about POINTS of them, evenly spread, the last one among them."""
    stride = -(-len(points) // POINTS) or 1
    return list(reversed(points[::-1][::stride]))


def last_lines(log: Path) -> str:
    """The end of a log as a terminal would show it, of paths only the last name."""
    lines = [line.rpartition("\r")[2].rstrip() for line in _end(log).split("\n")]
    return without_folders("\n".join([line for line in lines if line][-SHOWN_LINES:]))


def _end(log: Path) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        return file.read().decode("utf-8", errors="replace")
