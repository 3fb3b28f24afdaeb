"""Training a 7B on one GPU, with its recipes as shipped: python -m tests.benchmarks.gpu [NAME …] [--json] [--tiny].

The shapes of LLaVA-1.5-7B, random weights, records of one picture. Each case is a run of the command line; what is
reported stands in the run's own log: MFU (finetune/flops.py says how it is counted) and memory (what torch reserved).
The first two steps are ignored and the best of the others counts. It needs 30 GB of disk, 110 for stage 2 in full,
whose run saves its optimiser, and a GPU of 80 GB (stage 2 in full: 141 GB). `--tiny` tries the way with a very small
model, on a CPU too.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

from finetune.recipe import load_recipe
from llava_app.checkpoints import Card, write_card
from llava_app.memory import published_config
from llava_app.presets import PRESETS
from llava_app.processors import make_processor
from tests.benchmarks.engine import Row
from tests.fixtures_model import byte_tokenizer, tiny_config

ROOT = Path(__file__).parent.parent.parent
PICTURES, STEPS, IGNORED = 64, 5, 2


@dataclass(frozen=True)
class Case:
    recipe: str
    overrides: tuple[str, ...]
    letters: int  # of an answer, each a token; a dialogue of LLaVA-665K has about 150 taught tokens, a caption 20
    mfu: float | None = None  # at least
    gigabytes: float | None = None  # at most


CASES = {
    "stage 1": Case("llava15_7b_align", (), 20, mfu=0.4),
    "stage 2 with LoRA": Case("llava15_7b_lora", (), 150, mfu=0.4),
    "stage 2 in full, recomputed": Case("llava15_7b_instruct", ("gradient_checkpointing=true",), 150, mfu=0.4),
    "QLoRA, batch 1, 1,024 tokens": Case(
        "llava15_7b_qlora_8gb", ("global_batch=8", "max_length=1024"), 1024, gigabytes=8
    ),
}
TINY = ("global_batch=4", "micro_batch=2", "max_length=512")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--json", action="store_true", help="print the rows as a list on the last line")
    parser.add_argument("--tiny", action="store_true", help="a very small model, batches of four")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "base", tiny=options.tiny)
        for name in options.names or CASES:
            for row in measure(name, CASES[name], Path(folder), TINY if options.tiny else ()):
                rows.append(row)
                print(f"{row.name}: {row.value:.4g} {row.unit}, asked {row.baseline:.4g}", flush=True)
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))


def measure(name: str, case: Case, folder: Path, smaller: tuple[str, ...]) -> Iterator[Row]:
    """What the log of the case says, beside what is asked for."""
    steps = run(name, case, folder, smaller)[IGNORED:]
    print(f"{name}: {max(step['samples_per_second'] for step in steps):.4g} samples/s", flush=True)
    used = [step["mfu"] for step in steps if "mfu" in step]  # left out where the peak of the device is not known
    if case.mfu and used:
        yield Row(f"{name}, MFU", max(used), case.mfu, max(used) / case.mfu, 1, "of the peak")
    if case.gigabytes:
        memory = max(step["memory"] for step in steps)
        yield Row(f"{name}, peak memory", memory, case.gigabytes, case.gigabytes / memory, 1, "GB")


def run(name: str, case: Case, folder: Path, smaller: tuple[str, ...]) -> list[dict[str, Any]]:
    """The lines of the steps in the log of a run of its own."""
    overrides = [*case.overrides, *smaller, f"max_steps={STEPS}", "held_out=0"]
    recipe, run_name = load_recipe(case.recipe, overrides), case.recipe
    data = write_records(folder / f"{run_name}.json", STEPS * recipe.global_batch, case.letters)
    verb = [sys.executable, "-m", "finetune", recipe.stage, "--name", run_name, "--runs", str(folder / "runs")]
    what = ["--base", str(folder / "base"), "--data", str(data), "--recipe", case.recipe, *overrides]
    subprocess.run([*verb, *what], cwd=ROOT, check=True, stdout=sys.stderr)
    lines = (folder / "runs" / run_name / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "samples_per_second" in line]


def write_model(folder: Path, *, tiny: bool) -> None:
    """A finished folder of random bfloat16 weights, with a token for each byte."""
    config: LlavaConfig = tiny_config() if tiny else published_config(next(p for p in PRESETS if "1.5-7b" in p.source))
    config.image_token_id, config.text_config.bos_token_id = 3, 0
    config.text_config.eos_token_id, config.text_config.pad_token_id = 1, 2
    config.dtype = torch.bfloat16
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.save_pretrained(folder)
    processor = make_processor(config, byte_tokenizer(), image_mode="pad", template_name="vicuna_v1")
    processor.save_pretrained(folder)
    write_card(folder, Card("Random", str(folder), "run", "align", "vicuna_v1", "pad"))


def write_records(path: Path, count: int, letters: int) -> Path:
    """So many records with a picture and an answer of so many letters each."""
    for number in range(PICTURES):
        picture = path.parent / f"{number}.png"
        if not picture.exists():
            Image.effect_noise((640, 480), number).convert("RGB").save(picture)
    question = {"from": "human", "value": "<image>\nWhat is this?"}
    turns = [question, {"from": "gpt", "value": "a" * letters}]
    records = [{"id": str(n), "image": f"{n % PICTURES}.png", "conversations": turns} for n in range(count)]
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
