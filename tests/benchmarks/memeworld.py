"""What each stage of the built-in model learned: python -m tests.benchmarks.memeworld STAGE FOLDER [--limit N].

Asks the questions of the README's tables of one stage's checkpoint, notes the scores in results/memeworld.json and
prints the tables of all stages measured so far.
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
from llava_app.checkpoints import find
from llava_app.engine.local import LocalEngine
from llava_app.loading import load

RESULTS = Path(__file__).parent / "results" / "memeworld.json"
ROWS = {  # name: how the questions are asked
    "held-out pictures": {"asking": "suite", "split": "heldout"},
    "held-out combinations": {"asking": "suite", "split": "combinations"},
    "held-out pictures, swapped": {"asking": "suite", "split": "heldout", "swap_pictures": True},
    "phrasings never trained on": {"asking": "unseen", "split": "heldout"},
    "captions": {"asking": "captions", "split": "heldout"},
    "scene told in words": {"asking": "described", "split": "heldout"},
}
PER_STAGE = {
    "nothing": ("held-out pictures", "captions", "scene told in words"),
    "stage 1": ("captions",),
    "stage 2": tuple(row for row in ROWS if row != "captions"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=PER_STAGE)
    parser.add_argument("folder", type=Path, help="the checkpoint after that stage")
    parser.add_argument("--limit", type=int, default=1000)
    options = parser.parse_args()
    scores = _scores(options.folder, options.stage, options.limit)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()}
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    stored[options.stage] = {"versions": versions, "scores": scores}
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    print(_table({stage: stored[stage]["scores"] for stage in PER_STAGE if stage in stored}))


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
    if "stage 2" in scores:
        by_kind = {row: scores["stage 2"][row]["by_kind"] for row in list(ROWS)[:3]}
        lines += ["", f"| kind of question | {' | '.join(by_kind)} |", "|---" * (1 + len(by_kind)) + "|"]
        for kind in next(iter(by_kind.values())):
            lines.append(f"| {kind} | {' | '.join(f'{kinds[kind]:.0%}' for kinds in by_kind.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
