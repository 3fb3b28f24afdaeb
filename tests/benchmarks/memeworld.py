"""What each stage of the built-in model learned: python -m tests.benchmarks.memeworld [--aligned FOLDER] [--limit N].

Asks every question of the README's tables, writes results/memeworld.json and prints the tables.
"""

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from finetune.evaluate.memeworld import ask_all, score
from llava_app.checkpoints import DEMO, find
from llava_app.engine.local import LocalEngine
from llava_app.loading import load

RESULTS = Path(__file__).parent / "results" / "memeworld.json"
ROWS = {  # name: how the questions are asked
    "held-out pictures": {"asking": "suite", "split": "heldout"},
    "held-out combinations": {"asking": "suite", "split": "combinations"},
    "held-out pictures, swapped": {"asking": "suite", "split": "heldout", "swap_pictures": True},
    "held-out combinations, swapped": {"asking": "suite", "split": "combinations", "swap_pictures": True},
    "phrasings never trained on": {"asking": "unseen", "split": "heldout"},
    "captions": {"asking": "captions", "split": "heldout"},
    "scene told in words": {"asking": "described", "split": "heldout"},
}
PER_STAGE = {
    "nothing": ("held-out pictures", "captions", "scene told in words"),
    "stage 1": ("captions",),
    "stage 2": tuple(ROWS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--aligned", type=Path, help="the checkpoint after stage 1, which is not shipped")
    parser.add_argument("--limit", type=int, default=1000)
    options = parser.parse_args()
    models = {"nothing": DEMO / "memeworld-base", "stage 1": options.aligned, "stage 2": DEMO / "memeworld"}
    scores = {stage: _scores(folder, stage, options.limit) for stage, folder in models.items() if folder}
    machine = {"processor": platform.machine(), "torch": torch.__version__, "transformers": transformers.__version__}
    RESULTS.write_text(json.dumps({"machine": machine, "scores": scores}, indent=1) + "\n", encoding="utf-8")
    print(_table(scores))


def _scores(folder: Path, stage: str, limit: int) -> dict[str, Any]:
    engine = LocalEngine(load(find(str(folder)), "float32"))
    scores = {}
    for row in PER_STAGE[stage]:
        scores[row] = asdict(score(list(ask_all(engine, limit=limit, **ROWS[row]))))
        print(f"{stage}, {row}: {scores[row]['accuracy']:.1%}", flush=True)
    engine.close()
    return scores


def _table(scores: dict[str, Any]) -> str:
    """The stages side by side, then the finished model by kind of question, as Markdown."""
    stages = list(scores)
    lines = [f"| | {' | '.join(stages)} |", "|---" * (1 + len(stages)) + "|"]
    for row in ROWS:
        cells = [f"{scores[stage][row]['accuracy']:.1%}" if row in scores[stage] else "–" for stage in stages]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    by_kind = {row: scores["stage 2"][row]["by_kind"] for row in list(ROWS)[:4]}
    lines += ["", f"| kind of question | {' | '.join(by_kind)} |", "|---" * 5 + "|"]
    for kind in next(iter(by_kind.values())):
        lines.append(f"| {kind} | {' | '.join(f'{kinds[kind]:.0%}' for kinds in by_kind.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
