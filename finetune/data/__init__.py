"""Data files → checked examples, read when they are learned from, and a report of what was refused and why."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import ProcessorMixin

from finetune.data.mixture import Data, digest, open_data
from finetune.data.pictures import Place, open_picture
from finetune.data.records import read_records
from finetune.data.refusals import Refusal, Ruler, identifier, wrong_record
from finetune.recipe import Recipe
from llava_app.conversation import from_record
from llava_app.errors import DataError, ImageError
from llava_app.prompts import Encoded, encode

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Checked", "Example", "Examples", "Index", "check", "read_records"]

logger = logging.getLogger(__name__)

MOST_REFUSED = 0.01  # of the records; and of the examples whose pictures cannot be read once training goes on
OPENING_THREADS = 4
UNOPENED = "a picture that cannot be opened"
MOST_OPENED = 2_000  # examples whose pictures are opened before training; the others when they are learned from


@dataclass(frozen=True)
class Example:
    """One checked record: where its pictures are, in order, and about how many tokens it has."""

    record: dict[str, Any]
    images: tuple[Place, ...]
    length: int


@dataclass(frozen=True)
class Index(Sequence[Example]):
    """N examples that are read when asked for; what they are sorted and grouped by is known of all."""

    data: Data
    lengths: np.ndarray  # (N,) int32, about how many tokens
    pictured: np.ndarray  # (N,) bool, whether it has a picture

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> "Index": ...
    def __getitem__(self, index: int | slice | np.ndarray) -> "Example | Index":
        if isinstance(index, slice | np.ndarray):
            return Index(self.data.take(index), self.lengths[index], self.pictured[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        record, part = self.data.read(index)
        return Example(record, part.places(record), int(self.lengths[index]))


@dataclass(frozen=True)
class Checked:
    """The examples of a data file, how many records were refused for which reason, and the file's sha256."""

    file: Path
    examples: Index
    refused: dict[str, int]
    first: dict[str, str]  # reason → the first record refused for it, and the details
    sha256: str
    opened: int  # examples whose pictures were opened
    unopened: list[int]  # those refused for their pictures, by their places among the records whose text is right

    def summary(self) -> dict[str, Any]:
        """What the card says of the data."""
        counts = {"records": len(self.examples), "refused": self.refused}
        return {"file": self.file.name, "sha256": self.sha256, **counts}

    def describe(self) -> str:
        """For a person: how many examples, and a line per reason of refusal."""
        lines = [f"data: {len(self.examples):,} examples from {self.file}"]
        for reason, count in self.refused.items():
            lines.append(f"  refused {count:,}: {reason} (first: {self.first[reason]})")
        if self.opened < self.examples.pictured.sum():
            lines.append(f"  the pictures of {self.opened:,} examples were opened; the others are as they are used")
        return "\n".join(lines)


class Examples(Dataset[Encoded]):
    """Examples encoded when asked for: pictures are opened then, and texts cut to `max_length` tokens.

    Where a picture cannot be read, the next example of its kind comes instead, so that every step has its examples;
    if it is one of `learned` (by default all). More than the fraction `allowed` of such examples raises DataError.
    """

    def __init__(
        self,
        examples: Index,
        processor: ProcessorMixin,
        *,
        max_length: int,
        allowed: float = MOST_REFUSED,
        learned: Sequence[int] | None = None,
    ) -> None:
        self.examples = examples
        every = np.arange(len(examples))
        self._learned = np.isin(every, every if learned is None else learned)  # a set would take 60 bytes of each
        self.processor = processor
        self.max_length = max_length
        self.allowed = allowed
        self._unreadable = torch.zeros(len(examples), dtype=torch.bool).share_memory_()  # the loader's processes write
        self._united = 0  # what the processes' counts of it came to when they last told each other

    def __len__(self) -> int:
        return len(self.examples)

    def unite(self, skipped: int, accelerator: "Accelerator") -> None:
        """Count what the other processes skipped too: `skipped` examples in all, some of them by several processes.

        Every process calls this with the same number. Raises DataError above the fraction `allowed`.
        """
        if skipped == self._united:
            return
        together = accelerator.reduce(self._unreadable.int().to(accelerator.device), "sum").cpu() > 0
        self._unreadable |= together
        self._united = accelerator.num_processes * int(together.sum())
        if together.sum() > self.allowed * len(self):
            raise DataError(self._complaint())

    @property
    def skipped(self) -> int:
        """How many examples were skipped so far because a picture of theirs could not be read."""
        return int(self._unreadable.sum())

    def __getitem__(self, index: int) -> Encoded:
        for place in range(len(self)):
            number = (index + place) % len(self)
            example = self.examples[number]
            if place and not (self._learned[number] and example.images):
                continue
            if encoded := self._read(number, example):
                return encoded
        raise DataError(self._complaint())

    def readable(self, places: Iterable[int]) -> list[Encoded]:
        """The examples at `places`, without those whose pictures cannot be read."""
        return [encoded for place in places if (encoded := self._read(place, self.examples[place]))]

    def watch(self, steps: Iterable[Any]) -> Iterator[Any]:
        """The steps that a loader makes of these examples. An error of the loader's processes comes without a trace."""
        try:
            yield from steps
        except Exception as error:
            clear_frames(error.__traceback__)  # they hold the loader, for whose processes the program's end would wait
            if not isinstance(error, DataError):
                raise
            raise DataError(self._complaint() if self.skipped else str(error)) from error

    def _read(self, number: int, example: Example) -> Encoded | None:
        if self._unreadable[number]:
            return None
        try:
            return self._encoded(example)
        except ImageError as error:
            self._skip(number, error)
            return None

    def _encoded(self, example: Example) -> Encoded:
        pictures = [open_picture(place) for place in example.images]
        encoded = encode(from_record(example.record, pictures), self.processor, open_answer=False)
        ids, supervised = encoded.input_ids[: self.max_length], encoded.supervised[: self.max_length]
        return replace(encoded, input_ids=ids, supervised=supervised)

    def _skip(self, number: int, error: ImageError) -> None:
        self._unreadable[number] = True
        logger.warning("Skipped: %s", error)
        if self.skipped > self.allowed * len(self):
            raise DataError(self._complaint())

    def _complaint(self) -> str:
        return (
            f"The pictures of {self.skipped} of {len(self)} examples cannot be read, more than {self.allowed:.1%}. "
            "See that their folder is there, then --resume; or go on without them: --resume --allow-refused FRACTION. "
            "python -m finetune check names each one."
        )


@dataclass
class _Refused:
    """What was refused so far."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, refusal: Refusal, record: Any) -> None:
        self.counts[refusal.reason] += 1
        self.first.setdefault(refusal.reason, f"{identifier(record)} {refusal.details}".rstrip())


def check(
    file: Path,
    root: Path | None,
    processor: ProcessorMixin,
    *,
    recipe: Recipe,
    allow_refused: float = MOST_REFUSED,
    unopened: list[int] | None = None,
) -> Checked:
    """Read the records of `file`, open pictures below `root`, and refuse what cannot be learned from.

    The pictures of MOST_OPENED examples are opened, spread over all. A run that goes on gives those that were
    `unopened` when it started instead: it has the same examples whatever became of their pictures since. Raises
    DataError when more than the fraction `allow_refused` is refused, or nothing is left.
    """
    data, refused = open_data(file, root), _Refused()
    examples = _measured(data, Ruler(processor, recipe.max_length), recipe.stage, refused)
    wrong = len(data) - len(examples)
    tried = _spread(np.flatnonzero(examples.pictured))
    broken = _broken(examples, tried, refused) if unopened is None else _again(examples, unopened, refused)
    kept = np.setdiff1d(np.arange(len(examples)), broken)
    counts = dict(refused.counts.most_common())
    found = Checked(file, examples[kept], counts, refused.first, digest(file), len(tried), broken)
    _judge(found, len(data), wrong / max(1, len(data)) + len(broken) / max(1, len(tried)), allow_refused)
    return found


def _measured(data: Data, ruler: Ruler, stage: str, refused: _Refused) -> Index:
    """The records that are right as far as their text goes."""
    kept = np.zeros(len(data), bool)
    lengths = np.zeros(len(data), np.int32)
    pictured = np.zeros(len(data), bool)
    for index in range(len(data)):
        record, refusal = _read(data, index)
        refusal = refusal or wrong_record(record, stage) or ruler.too_long(record)
        if refusal is not None:
            refused.add(refusal, record)
            continue
        kept[index], lengths[index] = True, ruler.length(record)
        pictured[index] = bool(record.get("image"))
    return Index(data, lengths, pictured)[np.flatnonzero(kept)]


def _read(data: Data, index: int) -> tuple[Any, Refusal | None]:
    try:
        return data.read(index)[0], None
    except DataError as error:
        return None, Refusal("not JSON", str(error))


def _spread(indices: np.ndarray) -> np.ndarray:
    """At most MOST_OPENED of the indices, evenly spread over them."""
    return indices[:: max(1, math.ceil(len(indices) / MOST_OPENED))]


def _broken(examples: Index, tried: np.ndarray, refused: _Refused) -> list[int]:
    """Those of the examples `tried` with a picture that cannot be opened.

    Pillow decodes without Python's lock, so threads suffice; each picture is opened once.
    """
    several = {int(index): examples[int(index)] for index in tried}
    distinct = list(dict.fromkeys(place for example in several.values() for place in example.images))
    with ThreadPoolExecutor(OPENING_THREADS) as pool:
        opened = dict(zip(distinct, pool.map(try_opening, distinct), strict=True))
    broken = []
    for index, example in several.items():
        refusal = next((opened[place] for place in example.images if opened[place]), None)
        if refusal:
            broken.append(index)
            refused.add(refusal, example.record)
    return broken


def _again(examples: Index, unopened: list[int], refused: _Refused) -> list[int]:
    """Refuse those examples again; where the data changed, they may not be there any more."""
    broken = [index for index in unopened if index < len(examples)]
    for index in broken:
        refused.add(Refusal(UNOPENED, "when the run started"), examples[index].record)
    return broken


def try_opening(place: Place) -> Refusal | None:
    """Refuses a picture that cannot be opened."""
    try:
        open_picture(place)
    except ImageError as error:
        return Refusal(UNOPENED, str(error))
    return None


def _judge(checked: Checked, total: int, share: float, allowed: float) -> None:
    if not checked.examples:
        raise DataError(f"Nothing to learn from.\n{checked.describe()}")
    if share > allowed:
        raise DataError(
            f"{sum(checked.refused.values())} of {total} records are refused, more than {allowed:.1%}. Mend the data, "
            f"or allow more with --allow-refused {math.ceil(share * 1000) / 1000}.\n{checked.describe()}"
        )
