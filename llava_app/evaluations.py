"""Evaluations: `python -m finetune evaluate` as a process of its own, and the reports that it leaves."""

import json
import re
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from llava_app.commands import ROOT, Background, told, without_folders
from llava_app.errors import BusyError, DataError

EVALUATIONS = Path("evaluations")
SCORES = "scores.json"
SUITES = (
    "vibes", "memeworld", "scienceqa", "pope", "textvqa", "llava-bench-coco", "llava-bench-wild",
    "gqa", "mme", "mm-vet", "seed", "mmbench",
)  # fmt: skip


@dataclass(frozen=True)
class Order:
    """What a person wants measured; `limit` 0 is all questions."""

    source: str  # of the model: its folder or Hub id
    suite: str
    data: str = ""
    judge: str = ""
    limit: int = 0

    def arguments(self) -> list[str]:
        """For the command line. Raises DataError for a suite that there is not."""
        if self.suite not in SUITES:
            raise DataError(f"There is no suite “{self.suite:.40}”. Choose one of {', '.join(SUITES)}.")
        options = {"data": self.data, "judge": self.judge, "limit": max(0, self.limit)}
        return [self.source, self.suite, *(f"--{name}={value}" for name, value in options.items() if value)]


@dataclass(frozen=True)
class Report:
    """One suite of one model: its score in per cent, None where there is none, and its page."""

    model: str
    suite: str
    score: float | None
    count: int
    missing: int
    page: Path


@dataclass(frozen=True)
class Score:
    """What a model reached in a suite, in per cent."""

    suite: str
    value: float
    count: int  # questions


def read_scores(folder: Path) -> list[Score]:
    """The scores that evaluations of whole suites left in a model's folder; without those that cannot be read."""
    try:
        stored = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        found = [Score(suite, entry["score"], entry["count"]) for suite, entry in stored.items()]
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return []
    return [score for score in found if isinstance(score.value, int | float)]


class Evaluation:
    """The one evaluation that this page runs at a time; all files lie below `folder`."""

    def __init__(self, folder: Path = EVALUATIONS) -> None:
        self.folder = folder.absolute()
        self._command = Background()

    def start(self, order: Order) -> None:
        """Begin, or go on from the answers that are there. Raises BusyError while another one runs, DataError."""
        arguments = order.arguments()
        if self.is_running:
            raise BusyError("An evaluation is running already. Wait for it, or stop it.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._command.start(["evaluate", *arguments, f"--root={self.folder}"], out=self._log)

    def stop(self) -> None:
        """Ask the process to end; what was answered is kept."""
        self._command.stop()

    @property
    def is_running(self) -> bool:
        return self._command.is_running

    def progress(self) -> str:
        """How far it is: "12 of 90 questions"; before the first one, that the model loads."""
        counts = re.findall(r"(\d+)/(\d+) \[", self._said())
        return "{} of {} questions".format(*counts[-1]) if counts else "The model is being loaded"

    def outcome(self) -> str:
        """How it ended. Raises DataError with its last words, without paths, when it failed."""
        lines = [line for line in re.split(r"[\r\n]+", self._said()) if line.strip()] or [""]
        if not self._command.exit_code:
            return "Done."
        if self._command.exit_code in (130, -signal.SIGINT):
            return "Stopped. The answers are kept; the same order goes on from them."
        raise DataError(without_folders(lines[-1]))

    def reports(self) -> list[Report]:
        """The newest first."""
        pages = sorted(self.folder.glob("*/*/report.html"), key=lambda page: page.stat().st_mtime, reverse=True)
        return [_report(page) for page in pages]

    def models(self) -> list[str]:
        """The models that were measured."""
        return sorted({report.model for report in self.reports()})

    def compare(self, models: Sequence[str]) -> str:
        """An HTML page that puts measured models side by side. Raises DataError."""
        if len(models) < 2 or not set(models) <= set(self.models()):
            raise DataError("Choose at least two measured models.")
        with TemporaryDirectory() as folder:
            page = Path(folder) / "compared.html"
            command = told(["compare", *(str(self.folder / model) for model in models), f"--html={page}"])
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise DataError(without_folders(done.stderr.strip().rpartition("\n")[2]))
            return page.read_text(encoding="utf-8")

    @property
    def _log(self) -> Path:
        return self.folder / "last.log"

    def _said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""


def _report(page: Path) -> Report:
    found = next(iter(json.loads((page.parent / SCORES).read_text(encoding="utf-8")).values()))
    missing = sum(found["missing"].values())
    return Report(page.parents[1].name, found["suite"], found["score"], found["count"], missing, page)
