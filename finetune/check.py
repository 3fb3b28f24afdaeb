"""python -m finetune check DATA: everything that can be known of data before anybody trains on it."""

import argparse
import os
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from finetune.cleaned import Writer, writers
from finetune.data import OPENING_THREADS, try_opening
from finetune.data.mixture import MIXTURES, Data, Part, open_data, picture_root
from finetune.data.pictures import Place, open_picture
from finetune.data.records import image_names
from finetune.data.refusals import BLANK, CHARACTERS_PER_TOKEN, Refusal, Ruler, identifier, wrong_record
from finetune.recipe import LIMITS
from llava_app.checkpoints import find
from llava_app.conversation import IMAGE_MARK, from_record
from llava_app.errors import DataError
from llava_app.loading import processor_of
from llava_app.prompts import render, template_text

AT_ONCE = 256  # records whose pictures are opened together
CUTS = (512, 1024, 2048, 4096)  # tokens
SHOWN = 60  # characters of a frequent answer
MOVED = f"questions have words between several {IMAGE_MARK}, and are learned with all pictures before their words"
LEARNED = ("\x1b[32m", "\x1b[0m")  # around what is learned: green
PLAINLY = ("⟦", "⟧")  # where there are no colours
TEMPLATES = {"instruct": "vicuna_v1", "align": "plain"}  # by stage, of what is shown without a model


@dataclass
class Answers:
    """How much the answers differ. Kept as hashes, with the beginnings of those that come again."""

    counts: Counter[int] = field(default_factory=Counter)
    again: dict[int, str] = field(default_factory=dict)

    def add(self, answer: str) -> None:
        """Count one."""
        key = _hash(answer.encode())
        self.counts[key] += 1
        if self.counts[key] == 2:
            self.again[key] = answer[:SHOWN]

    def describe(self) -> str:
        """How many are different, and the most frequent ones."""
        total = self.counts.total()
        frequent = [(self.again[key], count) for key, count in self.counts.most_common(3) if key in self.again]
        told = ", ".join(f"“{answer}” {count / total:.1%}" for answer, count in frequent)
        line = f"answers: {total:,}, of which {len(self.counts):,} are different ({len(self.counts) / total:.0%})"
        return f"{line}; most frequent: {told}" if told else line


@dataclass
class Report:
    """What was found in the records of one file or folder."""

    records: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    pictures: int = 0  # shown by good records, counted as often as they are shown
    moved: int = 0  # questions of good records with words between their pictures
    lengths: "array[int]" = field(default_factory=lambda: array("i"))
    answers: Answers = field(default_factory=Answers)

    def refuse(self, record: Any, refusal: Refusal) -> None:
        """Count a refused record."""
        self.records += 1
        self.refused[refusal.reason] += 1
        self.first.setdefault(refusal.reason, f"{identifier(record)} {refusal.details}".rstrip())

    def accept(self, record: dict[str, Any], length: int) -> None:
        """Count a good record of so many tokens."""
        self.records += 1
        self.pictures += len(image_names(record))
        self.lengths.append(length)
        for message in record["conversations"]:
            self.moved += any(words.strip() for words in message["value"].split(IMAGE_MARK)[1:-1])
            if message["from"] == "gpt":
                self.answers.add(message["value"])

    def describe(self, *, exact: bool, max_length: int) -> str:
        """For a person."""
        lines = [f"{self.records:,} records: {len(self.lengths):,} good, {self.refused.total():,} refused"]
        lines += [f"  refused {count:,}: {why} (first: {self.first[why]})" for why, count in self.refused.most_common()]
        if self.lengths:
            moved = f"; {self.moved:,} {MOVED}" if self.moved else ""
            lines.append(f"pictures: {self.pictures:,} shown{moved}")
            lines += [self.answers.describe(), *self._cuts(exact, max_length)]
        return "\n".join(lines)

    def _cuts(self, exact: bool, max_length: int) -> Iterator[str]:
        lengths = np.frombuffer(self.lengths, dtype=np.int32)
        half, most, nearly = np.percentile(lengths, (50, 90, 99)).astype(int).tolist()
        yield (
            f"length in {'tokens' if exact else 'about tokens of text (give --base for exact ones with pictures)'}: "
            f"half have at most {half:,}, 90 % {most:,}, 99 % {nearly:,}, the longest {lengths.max():,}"
        )
        for cut in sorted({*CUTS, max_length}):
            mark = " (--max-length)" if cut == max_length else ""
            yield f"  cut at {cut:,}: {(lengths > cut).sum():,} examples{mark}"


class Inspector:
    """Looks at every record of a part: its layout, its pictures, its length, and whether it came before."""

    def __init__(self, part: Part, *, stage: str, ruler: Ruler | None) -> None:
        self.part = part
        self.stage = stage
        self.ruler = ruler
        self._seen: dict[int, str] = {}
        self._opened = cache(try_opening)  # by name; a picture that is bytes is opened each time

    def inspect(self) -> Iterator[tuple[Any, Refusal | int]]:
        """Every record with its length in tokens, or with why it is refused."""
        numbers = iter(range(len(self.part.records)))
        with ThreadPoolExecutor(OPENING_THREADS) as pool:
            while several := list(islice(numbers, AT_ONCE)):
                read = [self._read(number) for number in several]
                places = [() if refusal else self.part.places(record) for record, refusal in read]
                distinct = list({place for group in places for place in group})
                opened = dict(zip(distinct, pool.map(self._opens, distinct), strict=True))
                for (record, refusal), group in zip(read, places, strict=True):
                    broken = next((opened[place] for place in group if opened[place]), None)
                    yield record, refusal or broken or self._repeats(record) or self._length(record)

    def _read(self, number: int) -> tuple[Any, Refusal | None]:
        try:
            record = self.part.records[number]
        except DataError as error:
            return None, Refusal("not JSON", str(error))
        return record, wrong_record(record, self.stage)

    def _opens(self, place: Place) -> Refusal | None:
        return try_opening(place) if isinstance(place, bytes) else self._opened(place)

    def _repeats(self, record: dict[str, Any]) -> Refusal | None:
        key = _hash(repr((image_names(record), record["conversations"])).encode())
        if key in self._seen:
            return Refusal("the same as an earlier record", f"as {self._seen[key]}")
        self._seen[key] = identifier(record)
        return None

    def _length(self, record: dict[str, Any]) -> Refusal | int:
        if self.ruler is None:
            return sum(len(turn["value"]) for turn in record["conversations"]) // CHARACTERS_PER_TOKEN
        ids, supervised = self.ruler.tokens(record)
        return self.ruler.cut_off(ids, supervised, images=len(image_names(record))) or len(ids)


def main(arguments: list[str]) -> int:
    """Check every part of the data and print a report of each. Raises DataError where a part has no good record."""
    options = _parser().parse_args(arguments)
    ruler = Ruler(processor_of(find(options.base)), options.max_length) if options.base else None
    empty, numbers = [], count(1)
    data = open_data(options.data, picture_root(options.data, options.images))
    for part, writer in zip(data.parts, writers(data.parts, options.out), strict=True):
        report = _inspect(part, writer, options=options, ruler=ruler, numbers=numbers)
        print(f"{part.path}: {_printable(report.describe(exact=ruler is not None, max_length=options.max_length))}")
        print(writer.close())
        if not report.lengths:
            empty.append(str(part.path))
    if options.data.suffix in MIXTURES:
        print(describe_mixture(options.data, data))
    if empty:
        raise DataError(
            f"There is no good record in {', '.join(empty)}: nothing can be learned from it. Mend the data."
        )
    return 0


def _inspect(
    part: Part, writer: Writer, *, options: argparse.Namespace, ruler: Ruler | None, numbers: Iterator[int]
) -> Report:
    """Look at every record of a part, show the first good ones and write all; `numbers` are of those that are shown."""
    template = ruler.processor.chat_template if ruler else template_text(TEMPLATES[options.stage])
    report = Report()
    for record, found in Inspector(part, stage=options.stage, ruler=ruler).inspect():
        if isinstance(found, Refusal):
            report.refuse(record, found)
            writer.refuse(record, found)
            continue
        if len(report.lengths) < options.show:
            print(show(record, template), end="\n\n")
            number = next(numbers)
            if options.shown:
                save_shown(part.places(record), options.shown, number)
        report.accept(record, found)
        writer.accept(record)
    return report


def describe_mixture(path: Path, data: Data) -> str:
    """How many records a run draws of each part, good or not."""
    lines = [f"{path}: {len(data):,} records are drawn for each epoch"]
    for part, drawn in zip(data.parts, np.bincount(data.part, minlength=len(data.parts)).tolist(), strict=True):
        held = len(part.records)
        share = f"{drawn / max(1, len(data)):.0%} of the mixture, weight {drawn / max(1, held):.3g}"
        lines.append(f"  {part.path}: {drawn:,} drawn from {held:,} records, {share}")
    return "\n".join(lines)


def save_shown(places: Sequence[Place], folder: Path, number: int) -> None:
    """Save the pictures of the example that is shown as the `number`th, in order, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, picture in enumerate(places):
        open_picture(picture).image.save(folder / f"{number}-{place:03}.png")


def show(record: dict[str, Any], template: str) -> str:
    """A record as the model reads it, what it learns in colour; ⟦ ⟧ where the terminal has no colours."""
    plainly = "NO_COLOR" in os.environ or not sys.stdout.isatty()
    begin, end = PLAINLY if plainly else LEARNED
    names = image_names(record)
    rendered = render(from_record(record, [BLANK] * len(names)), template, open_answer=False)
    text, place = "", 0
    for first, last in rendered.answers:
        text += _printable(rendered.text[place:first]) + begin + _printable(rendered.text[first:last]) + end
        place = last
    told = ", ".join(name if isinstance(name, str) else "in the dataset" for name in names) or "none"
    return (
        f"--- {_printable(identifier(record))}, pictures: {_printable(told)}\n{text}{_printable(rendered.text[place:])}"
    )


def _printable(text: str) -> str:
    """Without control characters, by which data could write to the terminal whatever it likes."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text)


def _hash(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is too few; give at least {least}")
        return int(text)

    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m finetune check")
    parser.add_argument("data", type=Path, help="records: JSON, JSON lines, a folder, a dataset or a mixture")
    parser.add_argument("--images", type=Path, help="folder or archive of the pictures (default: the data's folder)")
    parser.add_argument("--base", help="model whose tokens are counted: a folder or a name of the model list")
    parser.add_argument("--stage", choices=TEMPLATES, default="instruct", help="that will learn from it (instruct)")
    least = int(LIMITS["max_length"][0])
    parser.add_argument(
        "--max-length", type=_at_least(least), default=2048, help="tokens to which examples will be cut (2048)"
    )
    parser.add_argument("--out", type=Path, help="folder of the two files that are written (default: beside the data)")
    parser.add_argument("--show", type=_at_least(0), default=0, metavar="N", help="print the first N good examples")
    parser.add_argument("--shown", type=Path, metavar="FOLDER", help="save the pictures of these examples there")
    return parser
