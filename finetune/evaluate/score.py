"""python -m finetune score: answers and reviews that were made elsewhere."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.evaluate import reviews, scienceqa
from finetune.evaluate.results import read_lines, write_whole


def main(arguments: list[str]) -> None:
    """Print the scores; with --json as one JSON object on the last line. Raises DataError for files that are wrong."""
    options = _parser().parse_args(arguments)
    lines, found = options.score(options)
    print(*lines, sep="\n")
    if options.json:
        print(json.dumps(found, ensure_ascii=False))


def _scienceqa(options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    problems, answers = scienceqa.read_problems(options.problems), read_lines(options.answers)
    found = scienceqa.score_answers(problems, answers)
    if options.choices_out:
        rows = scienceqa.choices_read(answers, problems)
        write_whole(options.choices_out, "".join(f"{json.dumps(row)}\n" for row in rows))
    lines = [f"{shown(found['accuracy'])} % right: {found['correct']} of {found['count']} answers"]
    lines.append("  ".join(f"{column} {shown(value)}" for column, value in found["columns"].items()))
    counted = ("unreadable", "missing_answers", "answers_without_a_problem", "repeated_answers")
    lines.append(", ".join(f"{name.replace('_', ' ')} {found[name]}" for name in counted))
    return lines, found


def _reviews(options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    rows = {str(file): reviews.read_rows(file) for file in options.files}
    total = reviews.tally([row for some in rows.values() for row in some])
    found = asdict(total)
    if len(rows) > 1:
        found["files"] = {name: asdict(reviews.tally(some)) for name, some in rows.items()}
    lines = [f"relative score {shown(total.relative_score, 1)}"]
    lines += [f"  {category} {shown(value, 1)}" for category, value in total.by_category.items()]
    lines.append(f"{total.rows_read} rows read, {total.rows_left_out} left out")
    lines += [f"  {count}: {reason}" for reason, count in total.left_out.items()]
    return lines, found


def shown(value: float | None, places: int = 2) -> str:
    """A percentage for a person; a dash where there is none."""
    return "–" if value is None else f"{value:.{places}f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m finetune score", description=__doc__)
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    answers = kinds.add_parser("scienceqa", help="answers to ScienceQA, as the paper reads and tabulates them")
    answers.add_argument("--problems", type=Path, required=True, help="the official problems.json")
    answers.add_argument("--answers", type=Path, required=True, help="JSON lines with question_id and text")
    answers.add_argument("--choices-out", type=Path, help="write the choice read from each answer, as JSON lines")
    answers.set_defaults(score=_scienceqa)
    judged = kinds.add_parser("reviews", help="a judge's reviews → LLaVA-Bench's relative score")
    judged.add_argument("files", type=Path, nargs="+", metavar="FILE", help="JSON lines with text or content")
    judged.set_defaults(score=_reviews)
    for kind in (answers, judged):
        kind.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser
