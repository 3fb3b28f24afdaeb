"""python -m finetune evaluate MODEL memeworld: how many questions a model answers right."""

import argparse
import json
from dataclasses import asdict

from tqdm import tqdm


def main(arguments: list[str]) -> None:
    """Ask, print the wrong answers asked for and the table; with --json one JSON object as the last line."""
    options = _parser().parse_args(arguments)

    from finetune.evaluate import memeworld
    from finetune.evaluate.pairs import ask_pairs
    from llava_app.checkpoints import find
    from llava_app.engine.local import LocalEngine
    from llava_app.loading import load

    engine = LocalEngine(load(find(options.model), options.precision))
    settings = {"split": options.split, "limit": options.limit, "swap_pictures": options.swap_pictures}
    if options.ask == "pairs":
        asked = ask_pairs(engine, **settings)
    else:
        asked = memeworld.ask_all(engine, asking=options.ask, **settings)
    results = list(tqdm(asked, total=options.limit, desc="asking", unit=" questions"))
    engine.close()
    for result in [result for result in results if not result.is_right][: options.show_wrong]:
        print(f"{result.question.kind}: {result.question.conversation.turns[-1].question}")
        print(f"  right: {' or '.join(sorted(result.question.right))}\n  said:  {result.answer}")
    score = memeworld.score(results)
    print(
        f"{score.accuracy:.1%} of {score.count} right: " + ", ".join(f"{k} {v:.0%}" for k, v in score.by_kind.items())
    )
    if options.json:
        print(json.dumps(asdict(score)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m finetune evaluate")
    parser.add_argument("model", help="a folder, or a name of the page's model list")
    parser.add_argument("suite", choices=["memeworld"])
    parser.add_argument("--split", choices=["heldout", "combinations"], default="heldout")
    parser.add_argument("--swap-pictures", action="store_true", help="show another picture than the one asked about")
    parser.add_argument("--ask", choices=["suite", "unseen", "captions", "described", "pairs"], default="suite")
    parser.add_argument("--limit", type=_positive, default=1000, help="number of questions (1000)")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--show-wrong", type=int, default=0, metavar="N", help="print the first N wrong answers")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; ask at least 1")
    return number
