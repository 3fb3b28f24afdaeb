"""python -m finetune evaluate MODEL SUITE: ask a model the questions of a suite, mark its answers, write a report.

Everything is kept in a folder of the suite: every answer (an interrupted run goes on from them), every review, one
line per question in results.jsonl, report.md and report.html. The scores of a whole suite (no --limit) also go into
scores.json beside the model's card, an object of `Scores` by suite:

    {"pope": {"suite": "pope", "model": "name", "measure": "right", "score": 85.9, "interval": [85.1, 86.6],
              "count": 9000, "missing": {}, "by_category": {"random": 87.3, …}, "tables": {"title": {"name": value}}}}

Scores are per cent; "score" and "interval" are null where nothing could be marked; "missing" counts questions by the
reason why the score is not made of them.
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock

from finetune.evaluate.judge import Judge
from finetune.evaluate.ledger import alone
from finetune.evaluate.results import SCORES, Result, Scores, Suite, scores, write_results, write_scores, write_whole
from finetune.evaluate.suites import SUITES, build, name_of
from llava_app.checkpoints import Card, find

EVALUATIONS = Path("evaluations")
ASKING = ("suite", "unseen", "captions", "described", "unshown", "pairs", "clips", "small-print")  # of memeworld


def main(arguments: list[str]) -> None:
    """Ask, mark, write, print; with --json one JSON object as the last line. Raises UserError."""
    options = _parser().parse_args(arguments)
    card = find(options.model)
    folder = options.out or options.root / model_name(card) / name_of(options)
    suite = build(options, _judge(options), folder)
    with alone(folder):
        results = _results(card, suite, folder, options.precision)
        found = scores(suite, results, model=card.name, seed=options.seed)
        _write(folder, found, results)
        if options.limit is None:
            _publish(card, folder, found)
    _print(folder, found, results, show_wrong=options.show_wrong)
    if options.json:
        print(json.dumps(_json(found)))


def model_name(card: Card) -> str:
    """What the folder of a model's evaluations is called."""
    return Path(card.source).name if Path(card.source).is_dir() else card.source.replace("/", "--")


def _results(card: Card, suite: Suite, folder: Path, precision: str) -> list[Result]:
    from tqdm import tqdm

    from finetune.evaluate.asking import ask_all, identity
    from finetune.evaluate.ledger import Ledger
    from llava_app.engine.local import LocalEngine
    from llava_app.loading import load

    engine = LocalEngine(load(card, precision))
    ledger = Ledger(folder / "answers.jsonl")
    asked = ask_all(engine, suite.questions, suite.sampling, ledger=ledger, model=identity(card, precision))
    try:
        answers = list(tqdm(asked, total=len(suite.questions), desc="asking", unit=" questions"))
    finally:
        engine.close()
        ledger.close()
    return suite.mark(answers)


def _publish(card: Card, folder: Path, found: Scores) -> None:
    """Into scores.json beside the model's card; beside its suites for one of the Hub, or that may not be changed."""
    beside = Path(card.source)
    place = beside if beside.is_dir() and os.access(beside, os.W_OK) else folder.parent
    with FileLock(folder.parent / ".scores.lock"):  # two suites may end at the same time
        write_scores(place / SCORES, found)


def _write(folder: Path, found: Scores, results: list[Result]) -> None:
    from finetune.evaluate.report import markdown, page

    write_results(folder, results)
    write_scores(folder / SCORES, found)
    write_whole(folder / "report.md", markdown(found, results))
    write_whole(folder / "report.html", page(found, results))


def _print(folder: Path, found: Scores, results: list[Result], *, show_wrong: int) -> None:
    from finetune.evaluate.report import headline, shown

    for result in [result for result in results if result.points == 0][:show_wrong]:
        print(f"{result.question.category}: {result.question.text}")
        print(f"  right: {' or '.join(result.question.right)}\n  said:  {result.answer}")
    print(headline(found))
    print("  " + ", ".join(f"{category} {shown(value)}" for category, value in found.by_category.items()))
    for title, table in found.tables.items():
        print(f"{title}: " + ", ".join(f"{name} {shown(value)}" for name, value in table.items()))
    print(f"The report is {folder / 'report.html'}")


def _json(found: Scores) -> dict[str, object]:
    """The scores; for memeworld also by the names that they had before there were other suites, as shares."""
    shares = {kind: None if value is None else value / 100 for kind, value in found.by_category.items()}
    return asdict(found) | {"accuracy": None if found.score is None else found.score / 100, "by_kind": shares}


def _judge(options: argparse.Namespace) -> Judge | None:
    return Judge(options.judge, options.judge_url, seed=options.seed) if options.judge else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m finetune evaluate",
        description="The suites: " + "; ".join(f"{name}: {entry.about}" for name, entry in SUITES.items()) + ".",
    )
    parser.add_argument("model", help="a folder, or a name of the page's model list")
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--data", type=Path, help="the official files: a folder, or TextVQA's file")
    parser.add_argument("--images", type=Path, help="folder of the pictures (default: images beside the data)")
    parser.add_argument("--root", type=Path, default=EVALUATIONS, help=f"of the results of all models ({EVALUATIONS})")
    parser.add_argument("--out", type=Path, help="folder of these results (default: ROOT/MODEL/SUITE)")
    parser.add_argument(
        "--limit", type=_positive, help="number of questions (all; memeworld 1000; POPE: of each split)"
    )
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of intervals, guesses and the judge (0)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--show-wrong", type=int, default=0, metavar="N", help="print the first N wrong answers")
    judged = parser.add_argument_group("a judge (OPENAI_API_KEY, OPENAI_BASE_URL)")
    judged.add_argument("--judge", metavar="MODEL", help="LLaVA-Bench and mm-vet need one; vibes, scienceqa can")
    judged.add_argument("--judge-url", metavar="URL", help="any server that speaks the OpenAI protocol")
    judged.add_argument("--both-orders", action="store_true", help="LLaVA-Bench: judge each pair in both orders")
    parser.add_argument(
        "--prompt", choices=("lepa", "letter"), default="lepa", help="scienceqa: explain, or the letter"
    )
    drawn = parser.add_argument_group("memeworld")
    drawn.add_argument("--split", choices=["heldout", "combinations"], default="heldout")
    drawn.add_argument("--swap-pictures", action="store_true", help="show another picture than the one asked about")
    drawn.add_argument("--ask", choices=ASKING, default="suite", help="which questions (suite)")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; ask at least 1")
    return number
