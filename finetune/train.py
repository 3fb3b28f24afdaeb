"""The training of one stage: a plain loop on accelerate, for one process or many."""

import json
import math
import os
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from finetune import checkpoint
from finetune.checkpoint import Run
from finetune.collate import IGNORE, Batch, StepCollator, StepSampler
from finetune.data import Checked, Examples, check
from finetune.interrupt import Interrupted, StopSignal, ignore_in_worker
from finetune.recipe import Recipe
from finetune.stages import STAGES, apply_stage, describe, trainable
from llava_app.checkpoints import Card, find, write_card
from llava_app.errors import TrainingError
from llava_app.loading import load, make_processor

MIXED_PRECISION = {"bfloat16": "bf16", "float32": "no"}
ABOUT = {
    "align": "Stage 1 only: it captions a picture in a few words and cannot chat. From {base}, {count:,} examples.",
    "instruct": "Both stages: it answers about pictures. From {base}, {count:,} examples.",
}


class SupervisedLoss(nn.Module):
    """A LLaVA and the sum of its losses, in one module, so that accelerate wraps forward pass and loss together."""

    def __init__(self, llava: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.llava = llava

    def forward(self, input_ids: Tensor, labels: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Cross entropy summed over the supervised tokens, float32, shape (). Logits are made for those tokens only."""
        hidden_BSD = self.llava.model(input_ids=input_ids, pixel_values=pixel_values, use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        taught = targets != IGNORE
        logits_NV = self.llava.lm_head(hidden_BSD[:, :-1][taught]).float()
        loss = functional.cross_entropy(logits_NV, targets[taught], reduction="sum")
        if pixel_values is not None:
            return loss
        projector = self.llava.model.multi_modal_projector.parameters()
        return loss + 0 * sum(weight.sum() for weight in projector)  # every process needs a gradient for every weight


@dataclass(frozen=True)
class Course:
    """What the loop works with, once everything is loaded and checked."""

    run: Run
    folder: Path
    accelerator: Accelerator
    model: nn.Module  # SupervisedLoss, as accelerate wrapped it
    optimizer: Optimizer
    examples: Examples
    total: int  # steps

    @property
    def llava(self) -> LlavaForConditionalGeneration:
        """The model inside all wrapping."""
        return self.accelerator.unwrap_model(self.model).llava


@dataclass(frozen=True)
class Figures:
    """One line of the log."""

    step: int
    loss: float  # per supervised token
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    samples_per_second: float
    elapsed: float  # seconds since this process began to train


def train(run: Run, folder: Path, *, resume: bool) -> Card:
    """Train one stage and leave a finished checkpoint in `folder`; returns its card.

    Raises UserError for anything a person can mend, and Interrupted after SIGINT or SIGTERM, with the state saved.
    """
    recipe = run.recipe
    accelerator = Accelerator(mixed_precision=MIXED_PRECISION[recipe.precision])
    torch.manual_seed(recipe.seed)
    base = find(run.base)
    loaded = load(base, "float32")
    tokenizer, config = loaded.processor.tokenizer, loaded.model.config
    processor = make_processor(config, tokenizer, image_mode=recipe.image_mode, template_name=recipe.template)
    loaded.model.generation_config.eos_token_id = end_tokens(tokenizer, recipe.template)
    checked = check(run.data, run.images, processor, recipe=recipe, allow_refused=run.allow_refused)
    learning = apply_stage(loaded.model, recipe.stage)
    source = Path(loaded.model.name_or_path)
    dtype = checkpoint.stored_dtype(source)
    accelerator.print(checked.describe(), describe(loaded.model, learning), sep="\n")
    if accelerator.is_main_process and not resume:
        checkpoint.try_saving(folder, loaded.model, processor=processor, dtype=dtype)
    _begin(run, folder, accelerator=accelerator, checked=checked, resume=resume)
    examples = Examples(checked.examples, processor, max_length=recipe.max_length)
    course = _course(run, folder, accelerator=accelerator, model=loaded.model, examples=examples)
    _learn(course, _resumed_step(course))
    weights = {name.removeprefix("llava."): value for name, value in accelerator.get_state_dict(course.model).items()}
    card = replace(_card(run, folder, base=base, checked=checked), base_revision=checkpoint.revision(source))
    if accelerator.is_main_process:
        checkpoint.save_model(folder, course.llava, weights, processor=processor, dtype=dtype)
        write_card(folder, card)
        checkpoint.drop_states(folder)
    accelerator.wait_for_everyone()
    accelerator.print(f"{folder} is finished and in the page's model list.")
    return card


def end_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """The tokens that end an answer in a template: the end token and, where captions are lines, the newline."""
    ends = ["\n"] if template == "plain" else []
    return [tokenizer.eos_token_id, *(tokenizer.encode(end, add_special_tokens=False)[-1] for end in ends)]


def learning_rate_at(step: int, total: int, recipe: Recipe) -> float:
    """The rate of step 1…total: linear warm-up, then half a cosine towards zero."""
    warmup = math.ceil(total * recipe.warmup_ratio)
    if step <= warmup:
        return recipe.learning_rate * step / warmup
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup + 1)))


def take_step(course: Course, batches: list[Batch], *, supervised: int, rate: float) -> tuple[float, float]:
    """One optimiser step over this process's micro-batches; returns the loss per token and the gradient norm.

    `supervised` counts the tokens of all processes. DistributedDataParallel averages gradients over the processes,
    so a sum divided by that count is first multiplied by their number.
    Raises TrainingError when the loss or a gradient is not finite; the weights have not moved then.
    """
    accelerator, last = course.accelerator, len(batches) - 1
    loss = torch.zeros((), device=accelerator.device)
    for place, batch in enumerate(batches):
        batch = batch.to(accelerator.device)
        with accelerator.no_sync(course.model) if place < last else nullcontext():
            part = course.model(batch.input_ids, batch.labels, batch.pixel_values) / supervised
            accelerator.backward(part * accelerator.num_processes)
        loss += part.detach()
    value = float(accelerator.reduce(loss, "sum"))
    norm = float(accelerator.clip_grad_norm_(course.model.parameters(), course.run.recipe.gradient_clip))
    if not math.isfinite(value + norm):
        raise TrainingError(
            f"the loss is {value} and the gradient's norm {norm}. Lower learning_rate ({rate:g} here) and start anew."
        )
    for group in course.optimizer.param_groups:
        group["lr"] = rate
    course.optimizer.step()
    course.optimizer.zero_grad()
    return value, norm


def _begin(run: Run, folder: Path, *, accelerator: Accelerator, checked: Checked, resume: bool) -> None:
    """Save the run's settings or, on resuming, make sure that they still hold."""
    if resume and run.checked != checked.summary():
        raise TrainingError(f"{run.data} or its pictures changed since {run.name} started. Start a new run.")
    if accelerator.is_main_process and not resume:
        replace(run, checked=checked.summary()).save(folder)
    if accelerator.is_main_process and resume:
        newest = checkpoint.newest_state(folder)
        checkpoint.cut_log(folder, checkpoint.step_of(newest) if newest else 0)
    accelerator.wait_for_everyone()


def _course(
    run: Run, folder: Path, *, accelerator: Accelerator, model: LlavaForConditionalGeneration, examples: Examples
) -> Course:
    recipe = run.recipe
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if recipe.compile:
        for layer in model.model.language_model.layers:  # one by one: they share one graph, compiled once
            layer.compile(dynamic=True)
    wrapped, optimizer = accelerator.prepare(SupervisedLoss(model).train(), _optimizer(model, recipe))
    per_epoch = _sampler(examples, recipe, total=0).steps_per_epoch
    total = min(recipe.epochs * per_epoch, recipe.max_steps or math.inf)
    return Course(run, folder, accelerator, wrapped, optimizer, examples, int(total))


def _optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    weights = list(trainable(model).values())
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)


def _sampler(examples: Examples, recipe: Recipe, *, total: int) -> StepSampler:
    return StepSampler(
        lengths=[example.length for example in examples.examples],
        has_images=[bool(example.images) for example in examples.examples],
        global_batch=recipe.global_batch,
        total=total,
        seed=recipe.seed,
    )


def _loader(course: Course, start: int) -> DataLoader[Any]:
    recipe, accelerator = course.run.recipe, course.accelerator
    whole = _sampler(course.examples, recipe, total=course.total)
    processes = accelerator.num_processes
    return DataLoader(
        course.examples,
        batch_sampler=replace(whole, start=start, process=accelerator.process_index, processes=processes),
        collate_fn=StepCollator(course.examples.processor.tokenizer.pad_token_id, recipe.micro_batch),
        num_workers=max(1, min(8, (os.cpu_count() or 1) // (2 * processes))),
        worker_init_fn=ignore_in_worker,
        generator=torch.Generator().manual_seed(recipe.seed),  # else it would draw from the run's random numbers
    )


def _resumed_step(course: Course) -> int:
    state = checkpoint.newest_state(course.folder)
    if state is None:
        return 0
    learning = trainable(course.llava)
    checkpoint.load_state(state, learning=learning, optimizer=course.optimizer, accelerator=course.accelerator)
    course.accelerator.print(f"going on after step {checkpoint.step_of(state)}")
    return checkpoint.step_of(state)


def _learn(course: Course, start: int) -> None:
    """Steps start+1 … total, logged and saved. Raises Interrupted and TrainingError."""
    recipe, main = course.run.recipe, course.accelerator.is_main_process
    bar = tqdm(total=course.total, initial=start, unit="step", disable=not main, desc=recipe.stage)
    with StopSignal() as stop, bar, (course.folder / "log.jsonl").open("a", encoding="utf-8") as log:
        for figures, stopping in _steps(course, start, stop=stop):
            if main:
                log.write(json.dumps(asdict(figures)) + "\n")
                log.flush()
                bar.set_postfix_str(f"loss {figures.loss:.3f}, {figures.samples_per_second:.0f} samples/s")
                bar.update()
            if stopping or figures.step % recipe.save_every == 0 or figures.step == course.total:
                _save_state(course, figures.step)
            if stopping and figures.step < course.total:
                raise Interrupted(figures.step)


def _steps(course: Course, start: int, *, stop: StopSignal) -> Iterable[tuple[Figures, bool]]:
    """Take the steps one by one; with each come its figures and whether any process was asked to stop."""
    accelerator = course.accelerator
    began = before = time.perf_counter()
    for step, batches in enumerate(_loader(course, start), start + 1):
        supervised = sum(batch.supervised for batch in batches)
        tokens = sum(batch.tokens for batch in batches)
        samples = sum(len(batch.input_ids) for batch in batches)
        supervised, tokens, samples = _over_processes(accelerator, supervised, tokens, samples)
        rate = learning_rate_at(step, course.total, course.run.recipe)
        try:
            loss, norm = take_step(course, batches, supervised=supervised, rate=rate)
        except TrainingError as error:
            raise TrainingError(f"Step {step} of {course.total}: {error}") from error
        (asked,) = _over_processes(accelerator, int(stop.asked))
        now = time.perf_counter()
        seconds, before = now - before, now
        yield Figures(step, loss, rate, norm, tokens / seconds, samples / seconds, now - began), asked > 0


def _over_processes(accelerator: Accelerator, *counts: int) -> list[int]:
    """The sums of counts over all processes."""
    return accelerator.reduce(torch.tensor(counts, device=accelerator.device), "sum").tolist()


def _save_state(course: Course, step: int) -> None:
    learning, optimizer = trainable(course.llava), course.optimizer
    checkpoint.save_state(course.folder, step, learning=learning, optimizer=optimizer, accelerator=course.accelerator)


def _card(run: Run, folder: Path, *, base: Card, checked: Checked) -> Card:
    recipe = run.recipe
    return Card(
        name=run.name,
        source=str(folder),
        kind="run",
        stage=recipe.stage,
        template=recipe.template,
        image_mode=recipe.image_mode,
        trained=STAGES[recipe.stage].trains,
        base=base.name,
        data=checked.summary(),
        recipe=asdict(recipe),
        about=ABOUT[recipe.stage].format(base=base.name, count=len(checked.examples)),
    )
