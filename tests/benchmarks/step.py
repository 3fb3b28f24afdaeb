"""Peak memory of real training on a CPU beside what `finetune plan` says: python -m tests.benchmarks.step [NAME …].

Each case is a run of two steps on a model of 34 million random parameters. What counts is how much more memory it takes
than is left after the same run on a very small model, in the same process. glibc is told to give freed memory back at
once; by default it kept up to 330 MB of it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from finetune.assemble import assemble
from finetune.collate import pack
from finetune.data import Example, Examples
from finetune.flops import Row
from finetune.plan import plan_memory
from finetune.recipe import load_recipe
from llava_app.checkpoints import read_card
from llava_app.loading import processor_of
from llava_app.outlook import config_of
from llava_app.prompts import Encoded
from tests.fixtures_model import byte_tokenizer

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = 8
TEMPLATE = "mistral_instruct"  # no system prompt: what examples share is as little as in real data, in bytes too
CASES = {  # name: overrides of the recipe
    "stage 1": ("stage=align",),
    "stage 2": (),
    "stage 2, recomputed": ("gradient_checkpointing=true",),
    "stage 2, accumulated": (f"micro_batch={EXAMPLES // 2}",),
    "stage 2, bfloat16": ("precision=bfloat16",),
    "recomputed, bfloat16": ("gradient_checkpointing=true", "precision=bfloat16"),
    "stage 1, bfloat16": ("stage=align", "precision=bfloat16"),
    "stage 2 with LoRA": ("lora_rank=16", "lora_alpha=32"),
    "LoRA, bfloat16": ("lora_rank=16", "lora_alpha=32", "precision=bfloat16"),
    "QLoRA": ("quantise=4bit", "lora_rank=16", "lora_alpha=32", "precision=bfloat16"),
    "QLoRA, recomputed": (
        "quantise=4bit",
        "lora_rank=16",
        "lora_alpha=32",
        "precision=bfloat16",
        "gradient_checkpointing=true",
    ),
}
SCRIPT = """
import resource, sys
import psutil
from accelerate.state import AcceleratorState
from finetune.__main__ import main

stage, small, large, data, *recipe = sys.argv[1:]
assert main([stage, "--base", small, "--data", data, "--name", "small", *recipe]) == 0
AcceleratorState._reset_state(reset_partial_state=True)
before = psutil.Process().memory_info().rss
assert main([stage, "--base", large, "--data", data, "--name", "large", *recipe]) == 0
print("BYTES", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


@dataclass(frozen=True)
class Material:
    """A model and data for it, all of whose records are alike."""

    small: Path
    large: Path
    data: Path
    examples: list[Encoded]

    def row(self, count: int) -> Row:
        """What a forward pass of so many examples takes in."""
        batch = pack(self.examples[:count], processor_of(read_card(self.large)).image_token_id)
        return Row(count, batch.input_ids.numel(), count, batch.supervised)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CASES)} (default: all)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        material = make_material(Path(folder))
        for name in options.names or CASES:
            measured, planned = measure(material, name), plan(material, name)
            share = planned / measured
            print(f"{name:22} measured {measured / 1e6:.0f} MB, planned {planned / 1e6:.0f} MB: {share:.2f}")


def make_material(folder: Path) -> Material:
    """A model of 512 × 8 with 64 visual tokens, one of 64 × 1, and records for two steps."""
    small, large = (_model(folder / str(width), width, layers) for width, layers in ((64, 1), (512, 8)))
    Image.new("RGB", (112, 112), "red").save(folder / "red.png")
    question, answer = "<image>\n" + "What is this? " * 10, "A red picture. " * 4
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    records = [{"id": str(n), "image": "red.png", "conversations": turns} for n in range(2 * EXAMPLES)]
    (folder / "records.json").write_text(json.dumps(records), encoding="utf-8")
    example = Example(records[0], (folder / "red.png",), 0)
    encoded = Examples((example,), processor_of(read_card(large)), max_length=512)[0]
    return Material(small, large, folder / "records.json", [encoded] * EXAMPLES)


def _model(folder: Path, width: int, layers: int) -> Path:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=112,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        vocab_size=16 * width,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    CLIPVisionModel(vision).save_pretrained(folder / "vision")
    LlamaForCausalLM(text).save_pretrained(folder / "language")
    byte_tokenizer().save_pretrained(folder / "language")
    assemble(folder / "vision", folder / "language", folder / "base", dtype=torch.float32, template=TEMPLATE)
    return folder / "base"


def overrides(name: str) -> list[str]:
    """Of memeworld's recipe for stage 2, in a case."""
    batch = [f"global_batch={EXAMPLES}", f"micro_batch={EXAMPLES}", "max_steps=2", "epochs=2"]
    return [*batch, f"template={TEMPLATE}", "precision=float32", *CASES[name]]


def plan(material: Material, name: str) -> float:
    """Bytes that are expected."""
    recipe = load_recipe("memeworld_instruct", overrides(name))
    config, row = config_of(read_card(material.large)), material.row(recipe.micro_batch)
    return plan_memory(config, recipe, row, gpu=False).peak


def measure(material: Material, name: str) -> float:
    """Bytes that a run took."""
    stage = load_recipe("memeworld_instruct", overrides(name)).stage
    where = [stage, str(material.small), str(material.large), str(material.data)]
    with tempfile.TemporaryDirectory() as folder:
        ran = subprocess.run(
            [sys.executable, "-c", SCRIPT, *where, "--recipe", "memeworld_instruct", *overrides(name)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"},
            capture_output=True,
            text=True,
            check=False,
        )
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    return float(ran.stdout.split("BYTES")[1])


if __name__ == "__main__":
    main()
