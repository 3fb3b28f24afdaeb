"""Data sets that a text-only teacher writes: the generation runs as a process of its own, its files are read here.

The process is `python -m finetune generate --json`; what its folder holds is said in finetune/instruct/README.md.
"""

import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_app.commands import ROOT, Background, told, without_folders
from llava_app.errors import DataError

VERDICTS = ("accept", "edit", "reject")
SOON = 120  # s that reading the captions and boxes may take


@dataclass(frozen=True)
class Order:
    """What a person wants written. Either `files` are given, or the number of pictures to be `drawn`."""

    files: tuple[Path, ...] = ()
    drawn: int = 0
    kinds: tuple[str, ...] = ()
    domain: str = "general"
    teacher: str = "template"
    limit: int | None = None
    budget_tokens: int | None = None
    budget_money: float | None = None
    prices: tuple[float, float] | None = None  # of a million tokens of prompts, and of answers

    def arguments(self) -> list[str]:
        """For the command line. Raises DataError when there is nothing to write about, or a budget without prices."""
        if not self.files and not self.drawn:
            raise DataError("There are no pictures to write about. Choose a file, or let some be drawn.")
        if not self.kinds:
            raise DataError("No kind of data is chosen. Choose at least one.")
        if self.budget_money and not self.prices:
            raise DataError("A budget in money needs the prices of prompts and answers. Fill them in, or leave it 0.")
        options = {
            "memeworld": self.drawn,
            "kinds": ",".join(self.kinds),
            "domain": self.domain,
            "teacher": self.teacher,
            "limit": self.limit,
            "budget-tokens": self.budget_tokens,
            "budget-money": self.budget_money,
        }
        given = [f"--{name}={value}" for name, value in options.items() if value]
        prices = ["--prices", *map(str, self.prices)] if self.prices else []
        return [*map(str, self.files), *given, *prices]


@dataclass(frozen=True)
class Item:
    """A written dialogue: kept, or refused for a reason."""

    key: str
    image: str
    dialogue: tuple[tuple[str, str], ...]
    reason: str = ""
    verdict: str = ""


class DataSet:
    """One folder of generated data. Raises DataError when `name` is no folder name."""

    def __init__(self, name: str, parent: Path) -> None:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise DataError(f"The name {name!r:.40} is no folder name. Give letters, digits, dots, dashes.")
        self.name = name
        self.path = (parent / name).absolute()
        self._writing = Background()

    def preview(self, order: Order) -> tuple[str, str]:
        """The exact prompts for the first picture, and what is left to be asked would cost. Raises DataError."""
        done = self._run([*order.arguments(), "--dry-run", "--json"])
        if done.returncode:
            raise DataError(self._shown(done.stderr))
        found = json.loads(done.stdout)
        return found["prompts"], found["estimate"]

    def start(self, order: Order) -> None:
        """Begin, or go on where the same order was left. Raises DataError while it is being written."""
        arguments = order.arguments()
        if self.is_running:
            raise DataError(f"{self.name} is being written already. Stop it first, or give another name.")
        self.path.mkdir(parents=True, exist_ok=True)
        command = self._command([*arguments, "--json"])
        self._writing.start(command, out=self.path / "progress.jsonl", problems=self.path / "problem.txt")

    def stop(self) -> None:
        """Ask the process to end; what was answered is kept."""
        self._writing.stop()

    @property
    def is_running(self) -> bool:
        return self._writing.is_running

    def progress(self) -> dict[str, Any]:
        """The last line that the process said: its estimate, counts while it runs, its report; {} before."""
        lines = _text(self.path / "progress.jsonl").rpartition("\n")[0].splitlines()
        return json.loads(lines[-1]) if lines else {}

    def problem(self) -> str:
        """What the process complained of, without paths; "" where it did not."""
        return self._shown(_text(self.path / "problem.txt"))

    def items(self) -> list[Item]:
        """Everything written, as reviewed: what is kept, then what the filters refused."""
        reviews = {line["key"]: line for line in map(json.loads, _text(self._reviews).splitlines())}
        kept = [Item(record["id"], record["image"], _dialogue(record)) for record in self._read("records")]
        refused = [
            Item(
                item["id"],
                item["image"],
                tuple(map(tuple, item["dialogue"])),
                f"{item['reason']} {item['details']}".strip(),
            )
            for item in self._read("refused")
        ]
        return [_reviewed(item, reviews[item.key]) if item.key in reviews else item for item in kept + refused]

    def review(self, key: str, verdict: str, dialogue: Sequence[Sequence[str]] = ()) -> None:
        """Write down what a person decided; with "edit" the dialogue as it shall be. Raises DataError."""
        if verdict not in VERDICTS or key not in {item.key for item in self.items()}:
            raise DataError("There is no such dialogue to review. Open the data set again.")
        edited = [[" ".join(str(text).split()) for text in turn] for turn in dialogue]
        if verdict == "edit" and (not edited or not all(len(turn) == 2 and all(turn) for turn in edited)):
            raise DataError("Every line needs a question and an answer. Fill it, or take it out.")
        line = {"key": key, "verdict": verdict} | ({"dialogue": edited} if verdict == "edit" else {})
        with self._reviews.open("a", encoding="utf-8") as reviews:
            reviews.write(json.dumps(line, ensure_ascii=False) + "\n")
            reviews.flush()
            os.fsync(reviews.fileno())

    def export(self) -> Path:
        """Write the records again, with the reviews; returns the file. Raises DataError."""
        done = self._run(["--export", "--json"])
        records = self.path / "records.json"
        if not records.exists():
            raise DataError(self._shown(done.stderr))
        return records

    @property
    def _reviews(self) -> Path:
        return self.path / "reviews.jsonl"

    def _command(self, arguments: list[str]) -> list[str]:
        return ["generate", *arguments, f"--out={self.path}"]

    def _run(self, arguments: list[str]) -> subprocess.CompletedProcess[str]:
        """A command that answers soon."""
        command = told(self._command(arguments))
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SOON, check=False)
        except subprocess.TimeoutExpired as error:
            raise DataError(
                f"This took longer than {SOON} seconds. Use the command line: python -m finetune generate --help"
            ) from error

    def _read(self, name: str) -> list[dict[str, Any]]:
        return json.loads(_text(self.path / f"{name}.json") or "[]")

    def _shown(self, complaint: str) -> str:
        """The last line of a complaint; of paths only the last name."""
        lines = complaint.strip().splitlines() or [""]
        return without_folders(lines[-1])


def summary(items: Sequence[Item]) -> str:
    """How many dialogues there are, and what became of them."""
    counts = Counter(item.verdict for item in items if item.verdict)
    refused = sum(bool(item.reason) for item in items)
    decided = ", ".join(f"{count} {verdict}ed" for verdict, count in counts.items())
    return f"{len(items) - refused} kept, {refused} refused" + (f"; reviewed: {decided}" if decided else "")


def _reviewed(item: Item, review: dict[str, Any]) -> Item:
    dialogue = tuple(map(tuple, review.get("dialogue", item.dialogue)))
    return Item(item.key, item.image, dialogue, item.reason, review["verdict"])


def _dialogue(record: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    values = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    return tuple(zip(values[::2], values[1::2], strict=True))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""
