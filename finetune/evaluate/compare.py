"""python -m finetune compare A B …: measured models side by side, on the questions that all of them were asked.

Intervals and differences are bootstrapped over the questions; the test is paired, and its p-values are adjusted for
the number of comparisons with the first model (see finetune/evaluate/intervals.py for the sources).
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.evaluate.cli import EVALUATIONS, model_name
from finetune.evaluate.intervals import Interval, Pair, difference_interval, holm, interval, paired_p, ratio
from finetune.evaluate.results import RESULTS, SCORES, read_json, read_lines, write_whole
from llava_app.checkpoints import find
from llava_app.errors import DataError

JUDGE = "Judge"  # the table of scores.json that says who judged


@dataclass(frozen=True)
class Row:
    """One model in one suite; what compares it with the first model is None for that one."""

    model: str
    score: float | None
    interval: Interval | None
    by_category: dict[str, float | None]
    difference: float | None = None
    difference_interval: Interval | None = None
    p: float | None = None  # adjusted by Holm's method


@dataclass(frozen=True)
class Comparison:
    """A suite: `count` questions that every model has a marked answer to, `left_out` that some have not."""

    suite: str
    count: int
    left_out: int
    rows: list[Row]


def main(arguments: list[str]) -> None:
    """Print a table for each suite that all models share; write --html; with --json an object as the last line."""
    options = _parser().parse_args(arguments)
    found = {_label(name, options.models): _suites(name) for name in options.models}
    if len(found) < len(options.models):
        raise DataError("The same model is named twice. Name each once.")
    shared = [suite for suite in next(iter(found.values())) if all(suite in suites for suites in found.values())]
    if not shared:
        raise DataError("These models share no evaluated suite. Run python -m finetune evaluate MODEL SUITE for each.")
    compared = [
        compare(suite, {name: suites[suite] for name, suites in found.items()}, options.seed) for suite in shared
    ]
    for comparison in compared:
        print(*_lines(comparison), "", sep="\n")
    if options.html:
        write_whole(options.html, _page(compared))
        print(f"The comparison is {options.html}")
    if options.json:
        print(json.dumps([asdict(comparison) for comparison in compared]))


def compare(suite: str, folders: Mapping[str, Path], seed: int) -> Comparison:
    """Compare the results in `folders` (by model) question by question. Raises DataError when the judges differ."""
    _same_judge(suite, folders)
    rows = {
        model: {row["question_id"]: row for row in read_lines(folder / RESULTS)} for model, folder in folders.items()
    }
    everything = {name for some in rows.values() for name in some}
    shared = [name for name in next(iter(rows.values())) if all(_has(some, name) for some in rows.values())]
    if not shared:
        raise DataError(f"{suite}: no question has a marked answer from every model. Evaluate them on the same ones.")
    pairs = {model: [_pair(some[name]) for name in shared] for model, some in rows.items()}
    first, *others = pairs
    p_values = holm([paired_p(pairs[other], pairs[first], seed) for other in others])
    table = [_row(first, pairs[first], [rows[first][name] for name in shared], seed)]
    for other, p in zip(others, p_values, strict=True):
        row = _row(other, pairs[other], [rows[other][name] for name in shared], seed)
        table.append(_against(row, pairs[other], pairs[first], p=p, seed=seed))
    return Comparison(suite, len(shared), len(everything) - len(shared), table)


def _row(model: str, pairs: Sequence[Pair], rows: Sequence[Mapping[str, Any]], seed: int) -> Row:
    categories: dict[str, list[Pair]] = {}
    for row in rows:
        categories.setdefault(row["category"], []).append(_pair(row))
    return Row(
        model, ratio(pairs), interval(pairs, seed), {name: ratio(some) for name, some in sorted(categories.items())}
    )


def _against(row: Row, pairs: Sequence[Pair], first: Sequence[Pair], *, p: float, seed: int) -> Row:
    mine, other = ratio(pairs), ratio(first)
    difference = None if mine is None or other is None else mine - other
    between = difference_interval(pairs, first, seed)
    return Row(row.model, row.score, row.interval, row.by_category, difference, between, p)


def _same_judge(suite: str, folders: Mapping[str, Path]) -> None:
    judges = {json.dumps(read_json(folder / SCORES)[suite]["tables"].get(JUDGE)) for folder in folders.values()}
    if len(judges) > 1:
        raise DataError(f"{suite} was judged in different ways, which does not compare: {', '.join(sorted(judges))}.")


def _has(rows: Mapping[str, Mapping[str, Any]], name: str) -> bool:
    return name in rows and rows[name]["points"] is not None


def _pair(row: Mapping[str, Any]) -> Pair:
    return row["points"], row["out_of"]


def _suites(name: str) -> dict[str, Path]:
    """The evaluated suites of a model, or the one in a folder of results. Raises DataError when there are none."""
    folder = Path(name)
    if not (folder / RESULTS).is_file():
        evaluated = EVALUATIONS / name
        folder = evaluated if evaluated.is_dir() else EVALUATIONS / model_name(find(name))
    folders = (
        [folder] if (folder / RESULTS).is_file() else [file.parent for file in sorted(folder.glob(f"*/{RESULTS}"))]
    )
    if not folders:
        raise DataError(f"{name} was not evaluated yet. Run python -m finetune evaluate {name} SUITE.")
    return {next(iter(read_json(each / SCORES))): each for each in folders}


def _label(name: str, names: Sequence[str]) -> str:
    """The last part of a path, or all of it where that would not tell two models apart."""
    last = [Path(each).name for each in names]
    return Path(name).name if last.count(Path(name).name) == 1 else name


def _lines(found: Comparison) -> list[str]:
    from finetune.evaluate.report import markdown_table

    left_out = f", {found.left_out} left out because not every model has a marked answer" * bool(found.left_out)
    return [f"{found.suite}: {found.count} questions{left_out}", markdown_table(_cells(found))]


def _cells(found: Comparison) -> list[tuple[str, ...]]:
    head = ("model", "%", "95 % interval", f"beside {found.rows[0].model}", "95 % interval", "p (paired, Holm)")
    return [head, *map(_cell_row, found.rows)]


def _cell_row(row: Row) -> tuple[str, ...]:
    difference = "" if row.difference is None else f"{row.difference:+.1f}"
    p = "" if row.p is None else f"{row.p:.4f}"
    return row.model, _number(row.score), _between(row.interval), difference, _between(row.difference_interval), p


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _between(found: Interval | None) -> str:
    return f"{found[0]:.1f} to {found[1]:.1f}" if found else ""


def _page(compared: Sequence[Comparison]) -> str:
    from finetune.evaluate.plots import FEWEST_SPOKES, bars, radar, spokes
    from finetune.evaluate.report import document, html_table

    parts = ["<h1>Models compared</h1>"]
    for found in compared:
        scored = [(row.model, row.score, row.interval, True) for row in found.rows if row.score is not None]
        parts += [f"<h2>{found.suite}, {found.count} questions</h2>", html_table(_cells(found)), bars("%", scored)]
        by_model = {row.model: row.by_category for row in found.rows}
        if len(spokes(by_model)) >= FEWEST_SPOKES:
            parts.append(radar("by category, %", by_model))
    return document("Models compared", "\n".join(parts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m finetune compare", description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="an evaluated model, or a folder of its results")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap and the test (0)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the comparison with its plots")
    parser.add_argument("--json", action="store_true", help="one JSON list as the last line")
    return parser
