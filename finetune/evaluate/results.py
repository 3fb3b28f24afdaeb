"""What a suite asks and what came of it: Question → Answer → Result → Scores."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from finetune.evaluate.intervals import Interval, interval, ratio
from llava_app.engine import Sampling
from llava_app.errors import DataError
from llava_app.images import Picture, open_image

GREEDY = Sampling(temperature=0)  # as LLaVA-1.5 was measured (docs/Evaluation.md of haotian-liu/LLaVA)
Show = Callable[[], Picture]
RESULTS, SCORES = "results.jsonl", "scores.json"


@dataclass(frozen=True)
class Question:
    """One question of a suite; `shows` open its pictures, `right` is what a right answer is read against."""

    identifier: str
    category: str
    text: str
    shows: tuple[Show, ...] = field(default=(), compare=False)
    right: tuple[str, ...] = ()

    def pictures(self) -> list[Picture]:
        """The pictures it is about, opened now. Raises ImageError."""
        return [show() for show in self.shows]


@dataclass(frozen=True)
class Answer:
    """What the model wrote, or `problem`: why it wrote nothing."""

    question: Question
    text: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class Result:
    """A marked answer: `points` of `out_of`; points None is missing for the reason in `why` and counts nowhere."""

    question: Question
    answer: str
    points: float | None
    out_of: float = 1.0
    why: str = ""


@dataclass(frozen=True)
class Suite:
    """Questions, how their answers are marked, and further tables of the report, by title."""

    name: str  # names the folder of its results
    measure: str  # read after the percentage: "right"
    questions: Sequence[Question]
    mark: Callable[[list[Answer]], list[Result]]
    sampling: Sampling = GREEDY
    tables: Callable[[list[Result]], dict[str, dict[str, Any]]] = lambda _: {}


@dataclass(frozen=True)
class Scores:
    """Percentages, 100 × points / out_of, over all and by category; None where nothing could be marked."""

    suite: str
    model: str
    measure: str
    score: float | None
    interval: Interval | None
    count: int  # results that the score is made of
    missing: dict[str, int]  # reason → questions that it is not made of
    by_category: dict[str, float | None]
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)


def opened(file: Path) -> Show:
    """What opens this picture. Raises DataError when there is no such file: no score is made of what is left."""
    if not file.is_file():
        raise DataError(f"There is no picture {file}. Give the folder of the pictures: --images FOLDER.")
    return partial(open_image, file)


def each(mark: Callable[[Question, str], bool | float]) -> Callable[[list[Answer]], list[Result]]:
    """Marks answers one by one with `mark`, which gives 0 to 1; what was not answered is missing."""

    def marked(answer: Answer) -> Result:
        if answer.problem is not None:
            return unanswered(answer)
        return Result(answer.question, answer.text, float(mark(answer.question, answer.text)))

    return lambda answers: [marked(answer) for answer in answers]


def unanswered(answer: Answer) -> Result:
    return Result(answer.question, answer.text, None, why=f"no answer from the model: {answer.problem}")


def scores(suite: Suite, results: list[Result], *, model: str, seed: int) -> Scores:
    """All percentages of a suite, the interval by bootstrap with this seed."""
    counted = [result for result in results if result.points is not None]
    return Scores(
        suite.name,
        model,
        suite.measure,
        percentage(counted),
        interval([(result.points or 0.0, result.out_of) for result in counted], seed) if counted else None,
        len(counted),
        dict(Counter(result.why for result in results if result.points is None)),
        {category: percentage(some) for category, some in by_category(results).items()},
        suite.tables(results),
    )


def percentage(results: Iterable[Result]) -> float | None:
    """100 × points / out_of over the results that have points; None where that is nothing."""
    return ratio([(result.points, result.out_of) for result in results if result.points is not None])


def by_category(results: Iterable[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.question.category].append(result)
    return dict(sorted(groups.items()))


def write_results(folder: Path, results: list[Result]) -> None:
    """One line for each question, whole or not at all."""
    lines = [json.dumps(_row(result), ensure_ascii=False) for result in results]
    write_whole(folder / RESULTS, "".join(f"{line}\n" for line in lines))


def write_scores(file: Path, found: Scores) -> None:
    """Put the scores of one suite into `file` (see finetune/evaluate/cli.py), beside those of other suites there."""
    stored = read_json(file) if file.exists() else {}
    stored[found.suite] = asdict(found)
    write_whole(file, json.dumps(stored, indent=1, ensure_ascii=False) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Write by rename, so that a reader finds the old text or the new one."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises DataError with the place of the first mistake."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({type(error).__name__}). Give a file of JSON lines.") from error
    return [_object(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises DataError."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON ({type(error).__name__}). Put a whole file there.") from error


def text_of(row: Mapping[str, Any], *names: str) -> str:
    """The first of these fields that is text. Raises DataError where none is."""
    found = next((row[name] for name in names if isinstance(row.get(name), str)), None)
    if found is None:
        raise DataError(f"{str(dict(row))[:80]}… has no text in {' or '.join(names)}. Give the official file.")
    return found


def _object(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(f"{file}, line {number}: not JSON. Give one object per line.") from error
    if not isinstance(found, dict):
        raise DataError(f"{file}, line {number}: a {type(found).__name__}, not an object. Give one object per line.")
    return found


def _row(result: Result) -> dict[str, Any]:
    question = result.question
    return {
        "question_id": question.identifier,
        "category": question.category,
        "question": question.text,
        "right": list(question.right),
        "text": result.answer,
        "points": result.points,
        "out_of": result.out_of,
        "why": result.why,
    }
