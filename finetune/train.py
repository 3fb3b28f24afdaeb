"""The training of one stage: a plain loop on accelerate, for one process or many."""

import json
import math
import os
import signal
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from finetune import checkpoint
from finetune.checkpoint import Run
from finetune.collate import IGNORE, Batch, StepCollator, StepSampler
from finetune.data import Checked, Examples, check
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


class Interrupted(Exception):
    """The run was asked to stop; its state up to `step` is saved."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


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
    """What the log says of one step."""

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
    model = load(base, "float32")
    processor = make_processor(
        model.model.config, model.processor.tokenizer, image_mode=recipe.image_mode, template_name=recipe.template
    )
    model.model.generation_config.eos_token_id = end_tokens(processor.tokenizer, recipe.template)
    checked = check(run.data, run.images, processor, recipe=recipe, allow_refused=run.allow_refused)
    learning = apply_stage(model.model, recipe.stage)
    dtype = checkpoint.stored_dtype(base.source)
    accelerator.print(checked.describe(), describe(model.model, learning), sep="\n")
    if accelerator.is_main_process and not resume:
        checkpoint.start_folder(folder)
        checkpoint.try_saving(folder, model.model, processor=processor, dtype=dtype)
        run.save(folder)
    accelerator.wait_for_everyone()
    course = _course(run, folder, accelerator=accelerator, model=model.model, processor=processor, checked=checked)
    _learn(course, _resumed_step(course))
    weights = {name.removeprefix("llava."): value for name, value in accelerator.get_state_dict(course.model).items()}
    card = _card(run, folder, base=base, checked=checked)
    if accelerator.is_main_process:
        checkpoint.save_model(folder, course.llava, weights, processor=processor, dtype=dtype)
        write_card(folder, card)
        checkpoint.drop_states(folder)
    accelerator.wait_for_everyone()
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
    if not math.isfinite(value):
        raise TrainingError(f"The loss is {value}. Lower learning_rate or gradient_clip, then start the run anew.")
    norm = accelerator.clip_grad_norm_(course.model.parameters(), course.run.recipe.gradient_clip)
    for group in course.optimizer.param_groups:
        group["lr"] = rate
    course.optimizer.step()
    course.optimizer.zero_grad()
    return value, float(norm)


class StopSignal:
    """Within it, SIGINT and SIGTERM are noted instead of ending the process; a second one ends it."""

    def __enter__(self) -> "StopSignal":
        self.asked = False
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self._before[signal.Signals(number)])


def _course(
    run: Run,
    folder: Path,
    *,
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    checked: Checked,
) -> Course:
    recipe = run.recipe
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    examples = Examples(checked.examples, processor, max_length=recipe.max_length)
    wrapped, optimizer = accelerator.prepare(SupervisedLoss(model).train(), _optimizer(model, recipe))
    total = recipe.epochs * _sampler(examples, recipe, total=0).steps_per_epoch
    return Course(run, folder, accelerator, wrapped, optimizer, examples, min(total, recipe.max_steps or total))


def _optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    weights = list(trainable(model).values())
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)


def _sampler(
    examples: Examples, recipe: Recipe, *, total: int, start: int = 0, process: int = 0, processes: int = 1
) -> StepSampler:
    return StepSampler(
        lengths=[example.length for example in examples.examples],
        has_images=[bool(example.images) for example in examples.examples],
        global_batch=recipe.global_batch,
        total=total,
        seed=recipe.seed,
        start=start,
        process=process,
        processes=processes,
    )


def _resumed_step(course: Course) -> int:
    state = checkpoint.newest_state(course.folder)
    if state is None:
        return 0
    learning = trainable(course.llava)
    step = checkpoint.load_state(state, learning=learning, optimizer=course.optimizer, accelerator=course.accelerator)
    course.accelerator.print(f"resumed after step {step}")
    return step


def _loader(course: Course, start: int) -> DataLoader[Any]:
    recipe, accelerator = course.run.recipe, course.accelerator
    tokenizer = course.examples.processor.tokenizer
    sampler = _sampler(
        course.examples,
        recipe,
        total=course.total,
        start=start,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    return DataLoader(
        course.examples,
        batch_sampler=sampler,
        collate_fn=StepCollator(tokenizer.pad_token_id, recipe.micro_batch),
        num_workers=max(1, min(8, (os.cpu_count() or 1) // (2 * accelerator.num_processes))),
        worker_init_fn=_ignore_interrupts,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator().manual_seed(recipe.seed),  # else it would draw from the run's random numbers
    )


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the main one finishes its step and needs its workers for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _learn(course: Course, start: int) -> None:
    """Steps start+1 … total, logged and saved. Raises Interrupted and TrainingError."""
    accelerator, recipe = course.accelerator, course.run.recipe
    main = accelerator.is_main_process
    if main:
        checkpoint.cut_log(course.folder, start)
    began = time.perf_counter()
    bar = tqdm(total=course.total, initial=start, unit="step", disable=not main, desc=recipe.stage)
    with StopSignal() as stop, bar, (course.folder / "log.jsonl").open("a", encoding="utf-8") as log:
        for step, batches in enumerate(_loader(course, start), start + 1):
            figures, stopping = _step(course, step, batches=batches, began=began, stop=stop)
            if main:
                log.write(json.dumps(asdict(figures)) + "\n")
                log.flush()
                bar.set_postfix_str(
                    f"loss {figures.loss:.3f}, {figures.samples_per_second:.0f} samples/s", refresh=False
                )
                bar.update()
            if stopping or step % recipe.save_every == 0 or step == course.total:
                _save(course, step)
            if stopping and step < course.total:
                raise Interrupted(step)


def _step(course: Course, step: int, *, batches: list[Batch], began: float, stop: StopSignal) -> tuple[Figures, bool]:
    started = time.perf_counter()
    counts = [
        sum(batch.supervised for batch in batches),
        sum(batch.tokens for batch in batches),
        sum(len(batch.input_ids) for batch in batches),
        int(stop.asked),
    ]
    accelerator = course.accelerator
    supervised, tokens, samples, stopping = accelerator.reduce(torch.tensor(counts, device=accelerator.device)).tolist()
    rate = learning_rate_at(step, course.total, course.run.recipe)
    try:
        loss, norm = take_step(course, batches, supervised=supervised, rate=rate)
    except TrainingError as error:
        raise TrainingError(f"Step {step} failed. {error}") from error
    now = time.perf_counter()
    seconds = now - started
    return Figures(step, loss, rate, norm, tokens / seconds, samples / seconds, now - began), bool(stopping)


def _save(course: Course, step: int) -> None:
    learning = trainable(course.llava)
    checkpoint.save_state(
        course.folder, step, learning=learning, optimizer=course.optimizer, accelerator=course.accelerator
    )


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
