"""Training beside the usual way, in one run: python -m tests.benchmarks.training [--quick] [--json].

T is transformers' own `Trainer` with a padding collator, in the same precision unless a row says otherwise. Both sides
start each round from the same weights and take the same steps on the same examples; the losses must agree to four
digits in float32. Rounds alternate, the first step of each is ignored and the fastest of the others counts. How much
less there is to compute is said too, as the floating-point operations of a step's matrix products. Compiled: the
recipe's `compile`, which the built-in world's own stages set where there is a compiler. Both sides have one thread, and
seconds are those that the processor gave to it, so that other programs do not count. Absolute figures belong to the
machine, ratios travel. A full run writes results/training.json.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from finetune.checkpoint import Run
from finetune.collate import IGNORE, StepCollator
from finetune.data import Examples, check
from finetune.memeworld.dataset import make_dataset
from finetune.optimise import make_optimizer
from finetune.packing import use_packing
from finetune.recipe import Recipe, recipe_from
from finetune.stages import apply_stage
from finetune.supervision import SupervisedLoss, compile_layers
from finetune.train import Course, take_step
from llava_app.checkpoints import built_in
from llava_app.loading import Loaded, load
from llava_app.processors import make_processor
from llava_app.prompts import Encoded
from tests.benchmarks.engine import RESULTS, Row, random_llava

RATE = 1e-4
PEAK_BATCH = 8
TEMPLATES = {"align": "plain", "instruct": "vicuna_v1"}
PRECISIONS = {"float32": "no", "bfloat16": "bf16"}  # as accelerate calls them


@dataclass(frozen=True)
class Way:
    """One way to train here, and how many times as fast as T in `baseline` it is to be."""

    precision: str = "float32"
    compiled: bool = False
    at_least: float | None = None
    baseline: str = "float32"

    @property
    def name(self) -> str:
        against = "" if self.baseline == self.precision else f", against T in {self.baseline}"
        return self.precision + ", compiled" * self.compiled + against


@dataclass(frozen=True)
class Effort:
    rounds: int
    steps: int  # of each round, the first of which is ignored
    batch: int  # with 64 image tokens; a quarter of it with 576
    small: tuple[Way, ...]  # with 64 image tokens
    large: tuple[Way, ...]  # with 576
    checkpointed: bool  # whether memory is measured with gradient checkpointing too


FULL = Effort(
    rounds=3,
    steps=3,
    batch=32,
    small=(
        Way(), Way(compiled=True, at_least=3), Way("bfloat16", compiled=True, at_least=4.5),
        Way("bfloat16", compiled=True, baseline="bfloat16"),
    ),
    large=(Way(compiled=True, at_least=1.7), Way("bfloat16", compiled=True, at_least=1.7, baseline="bfloat16")),
    checkpointed=True,
)  # fmt: skip
QUICK = Effort(1, 2, 8, (Way(at_least=3), Way("bfloat16", at_least=4.5)), (Way(at_least=1.7),), checkpointed=False)


@dataclass(frozen=True)
class Steps:
    """What one side did in one round."""

    losses: list[float]
    seconds: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of small batches; no file")
    parser.add_argument("--json", action="store_true", help="print the rows as a list on the last line")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    for row in measure(QUICK if options.quick else FULL):
        rows.append(row)
        wanted = "" if row.at_least is None else f", at least {row.at_least:g}"
        print(f"{row.name}: {row.value:.4g} {row.unit} against {row.baseline:.4g}: {row.ratio:.2f}{wanted}", flush=True)
        if not options.quick:
            write(rows)  # as they come: a full run is long
    if options.json:
        print(json.dumps([{k: v for k, v in asdict(row).items() if k != "unit"} for row in rows]))


def write(rows: Sequence[Row]) -> None:
    machine = {
        "machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0], "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    written = {"measured_on": machine, "rows": [asdict(row) for row in rows]}
    (RESULTS / "training.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def measure(effort: Effort) -> Iterator[Row]:
    small = load(built_in(), "float32")
    yield from speeds("64 image tokens, instruct", small, effort.small, effort, batch=effort.batch)
    large = random_llava("576 image tokens", side=336, width=192, layers=6, inner=512)
    for stage in TEMPLATES:
        yield from speeds(f"576 image tokens, {stage}", large, effort.large, effort, batch=effort.batch // 4)
    usual, packed = in_a_new_process("usual"), in_a_new_process("packed")
    yield Row("peak memory of a step, 32k vocabulary", packed, usual, usual / packed, 2.4, "GB")
    if effort.checkpointed:
        least = in_a_new_process("checkpointed")
        yield Row("the same with gradient checkpointing", least, usual, usual / least, None, "GB")


def speeds(name: str, loaded: Loaded, ways: Sequence[Way], effort: Effort, *, batch: int) -> Iterator[Row]:
    """Samples per second, a row for each way. The stage is the last word of the name."""
    stage = name.split()[-1]
    examples = encoded_examples(loaded, recipe_for(stage, batch), batch * effort.steps)
    usual: dict[str, list[Steps]] = {way.baseline: [] for way in ways}
    ours: dict[tuple[str, bool], list[Steps]] = {(way.precision, way.compiled): [] for way in ways}
    for _ in range(effort.rounds):
        for precision, rounds in usual.items():
            rounds.append(usual_steps(loaded, recipe_for(stage, batch, precision=precision), examples))
        for (precision, compiled), rounds in ours.items():
            recipe = recipe_for(stage, batch, precision=precision, compile=compiled)
            rounds.append(our_steps(loaded, recipe, examples))
            if precision == "float32":
                agree(rounds[-1].losses, usual["float32"][-1].losses)
    mine, theirs = (
        gigaflops(lambda take=take: take(loaded, recipe_for(stage, batch), examples[:batch]))
        for take in (our_steps, usual_steps)
    )
    yield Row(f"{name}, matrix products of a step", mine, theirs, theirs / mine, None, "GFLOP")
    for way in ways:
        mine, theirs = (batch / fastest(side) for side in (ours[way.precision, way.compiled], usual[way.baseline]))
        yield Row(f"{name}, {way.name}", mine, theirs, mine / theirs, way.at_least, "samples/s")


def gigaflops(step: Callable[[], Steps]) -> float:
    """Of the matrix products in it; torch does not count attention on a CPU."""
    with FlopCounterMode(display=False) as counted:
        step()
    return counted.get_total_flops() / 1e9


def fastest(rounds: Sequence[Steps]) -> float:
    return min(min(steps.seconds[1:]) for steps in rounds)


def agree(ours: Sequence[float], usual: Sequence[float]) -> None:
    """Raise AssertionError unless the losses agree to four digits."""
    apart = max(abs(one - other) / other for one, other in zip(ours, usual, strict=True))
    assert apart < 1e-4, (ours, usual)


def recipe_for(stage: str, batch: int, **settings: Any) -> Recipe:
    return recipe_from(
        {
            "stage": stage, "template": TEMPLATES[stage], "image_mode": "pad", "learning_rate": RATE,
            "global_batch": batch, "micro_batch": batch, "max_length": 1024, "precision": "float32", **settings,
        }
    )  # fmt: skip


def encoded_examples(loaded: Loaded, recipe: Recipe, count: int) -> list[Encoded]:
    """Dialogues or captions of the built-in world, as the model of `loaded` sees them."""
    config, tokenizer = loaded.model.config, loaded.processor.tokenizer
    processor = make_processor(config, tokenizer, image_mode="pad", template_name=recipe.template)
    with tempfile.TemporaryDirectory() as folder:
        records = make_dataset(Path(folder), pictures=count, texts=0, processes=1)
        file = {"align": records.align, "instruct": records.instruct}[recipe.stage]
        checked = check(file, file.parent, processor, recipe=recipe)
        data = Examples(checked.examples, processor, max_length=recipe.max_length)
        return [data[place] for place in range(count)]


# Two ways to take the same steps


def our_steps(loaded: Loaded, recipe: Recipe, examples: list[Encoded]) -> Steps:
    """The training loop of this repository, without its files."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=PRECISIONS[recipe.precision])
    model = learning(loaded.model, recipe)
    use_packing(model, recipe.max_length)
    if recipe.compile:
        compile_layers(model)
    loss = SupervisedLoss(model, compiled=recipe.compile)
    wrapped, optimizer = accelerator.prepare(loss.train(), make_optimizer(model, recipe))
    run = Run("", "", Path(), Path(), recipe)
    course = Course(
        run, Path(), accelerator, wrapped, optimizer, Examples((), loaded.processor, max_length=1), [], [], 1
    )
    tokens = loaded.processor.tokenizer.pad_token_id, loaded.processor.image_token_id
    collator = StepCollator(*tokens, recipe.micro_batch, recipe.packing)
    losses, seconds = [], []
    for start in range(0, len(examples), recipe.global_batch):
        begun = time.process_time()
        batches = collator(examples[start : start + recipe.global_batch])
        supervised = sum(batch.supervised for batch in batches)
        losses.append(take_step(course, batches, supervised=supervised, rate=RATE)[0])
        seconds.append(time.process_time() - begun)
    return Steps(losses, seconds)


def learning(model: LlavaForConditionalGeneration, recipe: Recipe) -> LlavaForConditionalGeneration:
    """A copy of the model, in which the parts of the recipe's stage learn."""
    copied = deepcopy(model)
    apply_stage(copied, recipe)
    if recipe.gradient_checkpointing:
        copied.activation_checkpointing_enable()
    return copied


def usual_steps(loaded: Loaded, recipe: Recipe, examples: list[Encoded]) -> Steps:
    """T."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, per_device_train_batch_size=recipe.micro_batch, max_steps=len(examples) // recipe.micro_batch,
            learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=recipe.gradient_clip, logging_steps=1,
            save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False, use_cpu=True,
            dataloader_pin_memory=False, train_sampling_strategy="sequential",
            bf16=recipe.precision == "bfloat16",
        )  # fmt: skip
        clock = StepClock()
        trainer = Trainer(
            learning(loaded.model, recipe),
            settings,
            data_collator=padding(loaded.processor.tokenizer.pad_token_id),
            train_dataset=examples,
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return Steps([line["loss"] for line in trainer.state.log_history if "loss" in line], clock.seconds)


class StepClock(TrainerCallback):
    """Seconds of each step, its batch included: from the end of the one before."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *_: object, **__: object) -> None:
        self._last = time.process_time()

    def on_step_end(self, *_: object, **__: object) -> None:
        now = time.process_time()
        self.seconds.append(now - self._last)
        self._last = now


def padding(pad_id: int) -> Callable[[Sequence[Encoded]], dict[str, Tensor]]:
    """Right padding to the longest example, with an attention mask, as most training scripts do it."""

    def collate(examples: Sequence[Encoded]) -> dict[str, Tensor]:
        ids = [example.input_ids for example in examples]
        labels = [example.input_ids.where(example.supervised, IGNORE) for example in examples]
        pixels = [example.pixel_values for example in examples if example.pixel_values is not None]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id)
        lengths = torch.tensor([len(tokens) for tokens in ids])
        return {
            "input_ids": padded,
            "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long(),
            "labels": nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE),
            "pixel_values": torch.cat(pixels),
        }

    return collate


# Memory


def in_a_new_process(side: str) -> float:
    """GB that a step takes at most, weights and optimiser included, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak, side).result() / 1e9


def peak(side: str) -> float:
    """Bytes above what the process has before it makes a model, at the peak of two steps of 8 samples."""
    warnings.simplefilter("ignore")
    multiprocessing.set_start_method("fork", force=True)  # of the pool that draws: spawned, it would load torch again
    recipe = recipe_for("instruct", PEAK_BATCH, gradient_checkpointing=side == "checkpointed")
    sizes = {"side": 336, "width": 192, "layers": 6, "inner": 512}
    examples = encoded_examples(random_llava("576 image tokens", **sizes), recipe, 2 * PEAK_BATCH)
    before = psutil.Process().memory_info().rss
    loaded = random_llava("32k vocabulary", **sizes, vocabulary=32_000)
    (usual_steps if side == "usual" else our_steps)(loaded, recipe, examples)
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # getrusage starts from the parent's peak
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) - before


if __name__ == "__main__":
    main()
