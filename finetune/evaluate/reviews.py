"""A judge's words → two scores, and many reviews → a relative score, as LLaVA-Bench defines it."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.evaluate.intervals import ratio
from llava_app.errors import DataError

LOWEST, HIGHEST = 0, 10
NO_WORDS, NO_SCORES, NO_OBJECT = "no text of a judge", "no two scores in the first line", "not a JSON object"

_SCORE = r"(-?\d+(?:\.\d+)?)(?:\s*/\s*10)?"
_PLAIN = re.compile(rf"[\s*_(\[]*{_SCORE}[\s,;|]+{_SCORE}[\s*_)\]]*(?:$|[.;:–—-]?\s+[A-Z])")  # and perhaps a sentence
_NAMES = r"\b(assistant|answer|response|model|candidate)s?\s*"
_LABEL = re.compile(_NAMES + r"(#?1\s*(and|&|,)\s*#?2\b|#?[12]\b(?!\s*/)|[ab]\b)", re.IGNORECASE)
_OUT_OF = re.compile(r"\s*(?:/|out of)\s*10(?:\.0+)?(?!\d|\.\d)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_AROUND = {"score", "scores", "rating", "ratings", "overall", "and", "vs", "points", "for", "the", "assistant",
           "assistants", "are", "is", "respectively", "first", "second"}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """The judge's two scores of one question."""

    reference: float
    candidate: float


@dataclass(frozen=True)
class Tally:
    """What a set of reviews comes to. Scores are None where no review could be read."""

    relative_score: float | None
    by_category: dict[str, float | None]
    rows_read: int
    rows_left_out: int
    left_out: dict[str, int]  # reason → rows


def read_scores(words: str) -> tuple[float, float] | None:
    """The two scores in the first line that is not empty; None unless it says two scores from 0 to 10 and no more.

    Read are `8 7`, `8, 7`, `8/10 7/10`, `Assistant 1: 8, Assistant 2: 7.5`, `**8 7**`; not read are a single number,
    three of them, numbers beyond the scale, and prose that happens to hold two numbers.
    """
    line = next((line for line in words.splitlines() if line.strip()), "")
    plain = _PLAIN.match(line)
    numbers = [float(number) for number in (plain.groups() if plain else _labelled(line))]
    if len(numbers) != 2 or not all(LOWEST <= number <= HIGHEST for number in numbers):
        return None
    return numbers[0], numbers[1]


def _labelled(line: str) -> list[str]:
    """The numbers of a line that holds nothing else but the names of what they are for."""
    line = _OUT_OF.sub(" ", _LABEL.sub(" ", line))
    rest = _NUMBER.sub(" ", line).lower()
    return [] if "/" in rest or set(re.findall(r"\w+", rest)) - _AROUND else _NUMBER.findall(line)


def pair_of(words: str, *, swapped: bool) -> Pair | None:
    """The scores by whom they are for: the reference answer stands first unless the order was swapped."""
    found = read_scores(words)
    if found is None:
        return None
    return Pair(found[1], found[0]) if swapped else Pair(found[0], found[1])


def relative_score(pairs: Sequence[Pair]) -> float | None:
    """100 × mean(candidate) / mean(reference): a ratio of means, not a mean of ratios."""
    return ratio([(pair.candidate, pair.reference) for pair in pairs])


def tally(rows: Sequence[Any]) -> Tally:
    """Score rows with the judge's words in `text` or `content`, perhaps a `category` and `swapped` (our own)."""
    pairs: dict[str, list[Pair]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for row in rows:
        found = _pair(row)
        if isinstance(found, Pair):
            pairs[str(row.get("category", ""))].append(found)
        else:
            left_out[found] += 1
    everything = [pair for some in pairs.values() for pair in some]
    by_category = {name: relative_score(some) for name, some in sorted(pairs.items()) if name}
    return Tally(relative_score(everything), by_category, len(rows), sum(left_out.values()), dict(left_out))


def read_rows(file: Path) -> list[Any]:
    """The rows of a file of JSON lines; a line that is no JSON is None. Raises DataError when there is no such text."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({type(error).__name__}). Give a file of JSON lines.") from error
    return [_parsed(line) for line in lines if line.strip()]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _pair(row: Any) -> Pair | str:
    """A row's scores, or why it has none."""
    if not isinstance(row, Mapping):
        return NO_OBJECT
    words = next((row[name] for name in ("text", "content") if isinstance(row.get(name), str)), None)
    if words is None:
        return NO_WORDS
    return pair_of(words, swapped=row.get("swapped") is True) or NO_SCORES
