"""LLaVA records (JSON or JSON lines) → checked examples, and a report of what was refused and why."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import ProcessorMixin

from finetune.recipe import Recipe
from llava_app.conversation import IMAGE_MARK, Conversation, from_record
from llava_app.errors import DataError, ImageError
from llava_app.images import Picture, open_image
from llava_app.prompts import Encoded, encode

MOST_REFUSED = 0.01  # of the records
OPENING_THREADS = 4
CHARACTERS_PER_TOKEN = 4
_BLANK = Picture(Image.new("RGB", (32, 32)), digest="blank")


@dataclass(frozen=True)
class Refusal:
    """Why a record is not learned from; `reason` is what refusals are counted by."""

    reason: str
    details: str


@dataclass(frozen=True)
class Example:
    """One checked record: its picture files in order, and about how many tokens it has."""

    record: dict[str, Any]
    images: tuple[Path, ...]
    length: int


@dataclass(frozen=True)
class Checked:
    """The examples of a data file, how many records were refused for which reason, and the file's sha256."""

    file: Path
    examples: tuple[Example, ...]
    refused: dict[str, int]
    first: dict[str, str]  # reason → the first record refused for it, and the details
    sha256: str

    def summary(self) -> dict[str, Any]:
        """What the card says of the data."""
        counts = {"records": len(self.examples), "refused": self.refused}
        return {"file": self.file.name, "sha256": self.sha256, **counts}

    def describe(self) -> str:
        """For a person: how many examples, and a line per reason of refusal."""
        lines = [f"data: {len(self.examples):,} examples from {self.file}"]
        for reason, count in self.refused.items():
            lines.append(f"  refused {count:,}: {reason} (first: {self.first[reason]})")
        return "\n".join(lines)


class Examples(Dataset[Encoded]):
    """Examples encoded when asked for: pictures are opened then, and texts cut to `max_length` tokens."""

    def __init__(self, examples: tuple[Example, ...], processor: ProcessorMixin, *, max_length: int) -> None:
        self.examples = examples
        self.processor = processor
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Encoded:
        example = self.examples[index]
        pictures = [open_image(path) for path in example.images]
        encoded = encode(from_record(example.record, pictures), self.processor, open_answer=False)
        ids, supervised = encoded.input_ids[: self.max_length], encoded.supervised[: self.max_length]
        return replace(encoded, input_ids=ids, supervised=supervised)


def check(
    file: Path, root: Path, processor: ProcessorMixin, *, recipe: Recipe, allow_refused: float = MOST_REFUSED
) -> Checked:
    """Read the records of `file`, open every picture below `root`, and refuse what cannot be learned from.

    Raises DataError when more than the fraction `allow_refused` is refused, or nothing is left.
    """
    records = read_records(file)
    ruler = _Ruler(processor, recipe)
    wrong = [_wrong_record(record, recipe.stage) for record in records]
    paths = [() if refusal else _paths(record, root) for record, refusal in zip(records, wrong, strict=True)]
    broken = _broken(path for several in paths for path in several)
    examples, refusals = [], []
    for record, refusal, images in zip(records, wrong, paths, strict=True):
        refusal = refusal or next((broken[path] for path in images if path in broken), None) or ruler.too_long(record)
        if refusal is None:
            examples.append(Example(record, images, ruler.length(record)))
        else:
            refusals.append((record, refusal))
    checked = _report(file, examples, refusals)
    _judge(checked, len(records), allow_refused)
    return checked


def read_records(file: Path) -> list[Any]:
    """The records of a JSON list or of a file of JSON lines. Raises DataError with the place of the first mistake."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}. Give a JSON or JSON lines file of LLaVA records.") from error
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is not a JSON list: {error}.") from error
    return [_line(file, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def image_names(record: dict[str, Any]) -> list[str]:
    """The picture files that a record names, in order."""
    names = record.get("image") or []
    return names if isinstance(names, list) else [names]


class _Ruler:
    """Measures records without tokenising each: no text has more tokens than bytes."""

    def __init__(self, processor: ProcessorMixin, recipe: Recipe) -> None:
        self.processor = processor
        self.max_length = recipe.max_length
        asked = encode(Conversation().ask("", (_BLANK,)), processor, open_answer=True)
        self.frame = len(asked.input_ids)
        self.image_tokens = self._seen(asked.input_ids)

    def length(self, record: dict[str, Any]) -> int:
        """About the number of tokens, pictures included: what examples are sorted by."""
        letters = sum(len(turn["value"]) for turn in record["conversations"])
        return letters // CHARACTERS_PER_TOKEN + len(image_names(record)) * self.image_tokens

    def too_long(self, record: dict[str, Any]) -> Refusal | None:
        """Refuses a record of which no answer, or not every picture, lies within `max_length` tokens."""
        values = [turn["value"] for turn in record["conversations"]]
        last = max((place for place, value in enumerate(values) if IMAGE_MARK in value), default=0)
        images = len(image_names(record))
        frames = self.frame * (last // 2 + 1)
        most = frames + images * self.image_tokens + len("".join(values[: last + 2]).encode())
        if most < self.max_length:
            return None
        encoded = encode(from_record(record, [_BLANK] * images), self.processor, open_answer=False)
        ids, supervised = encoded.input_ids[: self.max_length], encoded.supervised[: self.max_length]
        if supervised.any() and self._seen(ids) == images * self.image_tokens:
            return None
        return Refusal(f"no answer within {self.max_length} tokens (max_length)", f"it has {len(encoded.input_ids)}")

    def _seen(self, ids: Tensor) -> int:
        return int((ids == self.processor.image_token_id).sum())


def _wrong_record(record: Any, stage: str) -> Refusal | None:
    """Refuses what is no LLaVA record, or none that the stage learns from."""
    if not isinstance(record, dict):
        return Refusal("not an object", repr(record)[:80])
    names = image_names(record)
    if not all(isinstance(name, str) for name in names):
        return Refusal("an image that is not a file name", repr(names)[:80])
    try:
        conversation = from_record(record, [_BLANK] * len(names))
    except DataError as error:
        return Refusal(re.sub(r"\d+", "N", str(error)), str(error))
    if not all((turn.answer or "").strip() for turn in conversation.turns):
        return Refusal("an empty answer", "")
    if stage == "align" and not names:
        return Refusal("no picture; stage align learns from pictures only", "")
    return None


def _paths(record: dict[str, Any], root: Path) -> tuple[Path, ...]:
    return tuple(root / name for name in image_names(record))


def _broken(paths: Iterable[Path]) -> dict[Path, Refusal]:
    """The picture files that cannot be opened. Pillow decodes without Python's lock, so threads suffice."""
    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(OPENING_THREADS) as pool:
        return {path: refusal for path, refusal in zip(distinct, pool.map(_opened, distinct), strict=True) if refusal}


def _opened(path: Path) -> Refusal | None:
    try:
        open_image(path)
    except ImageError as error:
        return Refusal("a picture that cannot be opened", str(error))
    return None


def _report(file: Path, examples: list[Example], refusals: list[tuple[Any, Refusal]]) -> Checked:
    counts = Counter(refusal.reason for _, refusal in refusals)
    first: dict[str, str] = {}
    for record, refusal in refusals:
        first.setdefault(refusal.reason, f"{_identifier(record)} {refusal.details}".rstrip())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Checked(file, tuple(examples), dict(counts.most_common()), first, digest)


def _judge(checked: Checked, total: int, allowed: float) -> None:
    refused = total - len(checked.examples)
    if not checked.examples:
        raise DataError(f"Nothing to learn from.\n{checked.describe()}")
    if refused > allowed * total:
        raise DataError(
            f"{refused} of {total} records are refused, more than {allowed:.1%}. "
            f"Mend the data, or allow more with --allow-refused {refused / total:.3f}.\n{checked.describe()}"
        )


def _line(file: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {number}: not JSON ({error.msg}). Give one record per line.") from error


def _identifier(record: Any) -> str:
    return str(record.get("id", "without id")) if isinstance(record, dict) else "not an object"
