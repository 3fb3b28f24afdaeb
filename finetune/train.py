"""The training of one stage: a plain loop on accelerate, for one process or many."""

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
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from finetune import checkpoint, precision
from finetune.adapters import add_adapters, rest
from finetune.checkpoint import Run
from finetune.collate import Batch, StepCollator, StepSampler
from finetune.data import Checked, Examples, check
from finetune.disk import settle, writing
from finetune.features import FeatureStore, tower_digest
from finetune.figures import Figures, memory_held, peak_of
from finetune.flops import mfu, sizes, step_flops
from finetune.held_out import Evaluation, answers, losses, split
from finetune.interrupt import Interrupted, StopSignal, ignore_in_worker
from finetune.log import TRACKED, Log, begin_tracking, refuse_missing, track
from finetune.optimise import learning_rate_at, make_optimizer, set_rate
from finetune.output import Output
from finetune.packing import check_length, use_packing
from finetune.processes import gathered, idle_passes, is_sharded, over_processes, share_out
from finetune.recipe import Recipe
from finetune.shortage import lighter, shortage_told
from finetune.stages import apply_stage, describe, trainable
from finetune.supervision import SupervisedLoss, compile_layers
from llava_app.checkpoints import Card, check_files, find, revision, write_card
from llava_app.errors import TrainingError
from llava_app.loading import load
from llava_app.processors import make_processor
from llava_app.prompts import end_tokens


@dataclass(frozen=True)
class Course:
    """What the loop works with, once everything is loaded and checked."""

    run: Run
    folder: Path
    accelerator: Accelerator
    model: nn.Module  # SupervisedLoss, as accelerate wrapped it
    optimizer: Optimizer
    examples: Examples
    learned: list[int]  # the examples that are learned from
    held_out: list[int]  # and those that are only measured on
    total: int  # steps
    features: FeatureStore | None = None

    @property
    def llava(self) -> LlavaForConditionalGeneration:
        """The model inside all wrapping."""
        return self.accelerator.unwrap_model(self.model).llava


def train(run: Run, folder: Path, *, resume: bool) -> Card:
    """Train one stage and leave a finished checkpoint in `folder`; returns its card.

    Raises UserError for anything a person can mend, and Interrupted after SIGINT or SIGTERM, with the state saved.
    """
    computed = precision.computed_in(run.recipe, bfloat16=precision.has_bfloat16())
    refuse_missing(run.track)
    accelerator = Accelerator(
        mixed_precision=precision.ACCELERATE[computed], log_with=run.track, project_dir=str(folder.parent / TRACKED)
    )
    alone = checkpoint.alone(folder, resume=resume) if accelerator.is_main_process else nullcontext()
    with alone, shortage_told(run.recipe):
        return _train(run, folder, accelerator=accelerator, computed=computed, resume=resume)


def _train(run: Run, folder: Path, *, accelerator: Accelerator, computed: torch.dtype, resume: bool) -> Card:
    recipe = run.recipe
    torch.manual_seed(recipe.seed)
    base = find(run.base)
    loaded = load(base, precision.loaded_in(base, recipe), advice=lighter(recipe))
    tokenizer, config = loaded.processor.tokenizer, loaded.model.config
    check_length(config, recipe.max_length)
    processor = make_processor(config, tokenizer, image_mode=recipe.image_mode, template_name=recipe.template)
    loaded.model.generation_config.eos_token_id = end_tokens(tokenizer, recipe.template)
    allowed, unopened = run.allow_refused, run.unopened
    checked = check(run.data, run.images, processor, recipe=recipe, allow_refused=allowed, unopened=unopened)
    output = Output(run, folder, base, Path(loaded.model.name_or_path), processor)
    learning = _prepare(loaded.model, recipe, computed)
    told = (checked.describe(), describe(loaded.model, learning), precision.describe(recipe, computed))
    accelerator.print(*told, sep="\n")
    if accelerator.is_main_process and not resume:
        output.try_saving(loaded.model)
    _begin(output, checked, accelerator=accelerator, resume=resume)
    parts = split(checked.examples.data.originals(), recipe.held_out, recipe.seed)
    examples = Examples(checked.examples, processor, max_length=recipe.max_length, allowed=allowed, learned=parts[0])
    course = _course(run, folder, accelerator=accelerator, model=loaded.model, examples=examples, parts=parts)
    begin_tracking(accelerator, run.track, run=run.name, settings=asdict(recipe))
    learns, optimizer = trainable(course.llava), course.optimizer
    _learn(course, checkpoint.restore(folder, learning=learns, optimizer=optimizer, accelerator=accelerator))
    if examples.skipped:
        accelerator.print(f"{examples.skipped} examples were skipped: a picture of theirs could not be read.")
    weights = {name.removeprefix("llava."): value for name, value in accelerator.get_state_dict(course.model).items()}
    card = output.card(checked)
    if accelerator.is_main_process:
        with writing(folder / "state" / "partial"):
            output.save(folder, course.llava, output.unrounded(course.llava, weights))
            settle(folder.glob("*"))
        write_card(folder, card)
        checkpoint.drop_states(folder)
    accelerator.wait_for_everyone()
    accelerator.print(f"{folder} is finished and in the page's model list.")
    return card


def take_step(course: Course, batches: list[Batch], *, supervised: int, rate: float) -> tuple[float, float]:
    """One optimiser step over this process's micro-batches; returns the loss per token and the gradient norm.

    `supervised` counts the tokens of all processes. DistributedDataParallel averages gradients over the processes,
    so a sum divided by that count is first multiplied by their number.
    Raises TrainingError when the loss or a gradient is not finite; the weights have not moved then.
    """
    accelerator, idle = course.accelerator, idle_passes(course.accelerator, len(batches))
    last = len(batches) + idle - 1
    loss = torch.zeros((), device=accelerator.device)
    set_rate(course.optimizer, rate)
    for place, batch in enumerate([*batches, *[batches[-1]] * idle]):
        accelerator.sync_gradients = place == last
        if course.features:
            with accelerator.autocast():
                batch = course.features.fill(batch, course.llava)
        apart = place < last and not is_sharded(accelerator)  # shared out, unsummed gradients would take too much room
        with accelerator.no_sync(course.model) if apart else nullcontext():
            part = course.model(batch.to(accelerator.device)) * (place < len(batches)) / supervised
            accelerator.backward(part * accelerator.num_processes)
        loss += part.detach()
    value = float(accelerator.reduce(loss, "sum"))
    norm = float(accelerator.clip_grad_norm_(course.model.parameters(), course.run.recipe.gradient_clip))
    if not math.isfinite(value) or not (math.isfinite(norm) or accelerator.scaler):  # the scaler skips such a step
        raise TrainingError(
            f"the loss is {value} and the gradient's norm {norm}. Lower learning_rate ({rate:g} here) and start anew."
        )
    course.optimizer.step()
    course.optimizer.zero_grad()
    return value, norm


def _begin(output: Output, checked: Checked, *, accelerator: Accelerator, resume: bool) -> None:
    """Save the run's settings and what it starts from; on resuming, make sure first that this is as it was."""
    run, found = output.run, revision(output.source)
    if resume:
        run.refuse_changed(checked.summary(), found)
        check_files(output.base, output.source, weights=True)
    if accelerator.is_main_process:
        started = replace(run, checked=checked.summary(), base_revision=found, unopened=checked.unopened)
        started.save(output.folder)
    accelerator.wait_for_everyone()


def _prepare(model: LlavaForConditionalGeneration, recipe: Recipe, computed: torch.dtype) -> dict[str, int]:
    """Make the model learn as the recipe says; returns the number of learning parameters per part."""
    use_packing(model, recipe.max_length)
    if recipe.lora_rank:
        add_adapters(model, recipe)
    precision.keep(model, recipe, computed)
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if recipe.compile:
        compile_layers(model)
    return apply_stage(model, recipe)


def _course(
    run: Run,
    folder: Path,
    *,
    accelerator: Accelerator,
    model: LlavaForConditionalGeneration,
    examples: Examples,
    parts: tuple[list[int], list[int]],
) -> Course:
    recipe = run.recipe
    features = None
    if recipe.feature_cache:
        features = FeatureStore(folder.parent / "features" / tower_digest(model), recipe.feature_cache * 1e9)
    share_out(accelerator, model, recipe)
    loss = SupervisedLoss(model, compiled=recipe.compile)
    wrapped, optimizer = accelerator.prepare(loss.train(), make_optimizer(model, recipe))
    course = Course(run, folder, accelerator, wrapped, optimizer, examples, *parts, 0, features)
    per_epoch = _sampler(course).steps_per_epoch
    return replace(course, total=int(min(recipe.epochs * per_epoch, recipe.max_steps or math.inf)))


def _sampler(course: Course) -> StepSampler:
    recipe, index = course.run.recipe, course.examples.examples
    return StepSampler(
        lengths=index.lengths[course.learned].tolist(),
        has_images=index.pictured[course.learned].tolist(),
        global_batch=recipe.global_batch,
        total=course.total,
        grouped=not recipe.packing,
        seed=recipe.seed,
    )


def _collator(course: Course) -> StepCollator:
    recipe, processor = course.run.recipe, course.examples.processor
    return StepCollator(processor.tokenizer.pad_token_id, processor.image_token_id, recipe.micro_batch, recipe.packing)


def _loader(course: Course, start: int) -> DataLoader[Any]:
    accelerator, processes = course.accelerator, course.accelerator.num_processes
    return DataLoader(
        Subset(course.examples, course.learned),
        batch_sampler=replace(_sampler(course), start=start, process=accelerator.process_index, processes=processes),
        collate_fn=_collator(course),
        num_workers=max(1, min(8, (os.cpu_count() or 1) // (2 * processes))),
        worker_init_fn=ignore_in_worker,
        generator=torch.Generator().manual_seed(course.run.recipe.seed),  # else it would draw from the run's numbers
    )


def _learn(course: Course, start: int) -> None:
    """Steps start+1 … total, logged, measured on the held-out examples and saved. Raises Interrupted, TrainingError."""
    recipe, main = course.run.recipe, course.accelerator.is_main_process
    bar = tqdm(total=course.total, initial=start, unit="step", disable=not main, desc=recipe.stage)
    with StopSignal() as stop, bar, Log(course.folder / "log.jsonl", writes=main) as log:
        if start == 0:
            _evaluate(course, 0, log)
        for figures, stopping in _steps(course, start, stop=stop):
            log.write(figures)
            track(course.accelerator, figures, figures.step)
            bar.set_postfix_str(f"loss {figures.loss:.3f}, {figures.samples_per_second:.0f} samples/s")
            bar.update()
            due = figures.step % recipe.save_every == 0 or figures.step == course.total
            if due:
                _evaluate(course, figures.step, log)
            if due or stopping:
                _save_state(course, figures.step)
            if stopping and figures.step < course.total:
                raise Interrupted(figures.step)


def _evaluate(course: Course, step: int, log: Log) -> None:
    """Measure the held-out examples, shared among the processes, and log what the model says to some of them."""
    if not course.held_out:
        return
    accelerator, llava = course.accelerator, course.llava
    model = accelerator.unwrap_model(course.model)
    rest(model)
    sharded = is_sharded(accelerator)
    share = course.held_out if sharded else course.held_out[accelerator.process_index :: accelerator.num_processes]
    with accelerator.autocast():
        loss, tokens = losses(model, course.examples, _collator(course), places=share)
        with gathered(model):
            said = answers(llava, course.examples, course.held_out) if sharded or accelerator.is_main_process else []
    model.train()
    loss, tokens = accelerator.reduce(torch.tensor([loss, tokens], device=accelerator.device), "sum").tolist()
    if not tokens:
        return
    measured = Evaluation(step, loss / tokens, said)
    log.write(measured)
    track(accelerator, measured, step)
    if said and accelerator.is_main_process:
        tqdm.write(f"step {step}: held-out loss {loss / tokens:.3f}; {said[0].question!r}: {said[0].answer!r}")


def _steps(course: Course, start: int, *, stop: StopSignal) -> Iterable[tuple[Figures, bool]]:
    """Take the steps one by one; with each come its figures and whether any process was asked to stop."""
    accelerator = course.accelerator
    recipe, size, device = course.run.recipe, sizes(course.llava.config), peak_of(accelerator, course.run.recipe)
    began = before = time.perf_counter()
    for step, batches in enumerate(course.examples.watch(_loader(course, start)), start + 1):
        supervised = sum(batch.supervised for batch in batches)
        tokens = sum(batch.tokens for batch in batches)
        samples = sum(len(batch.lengths) for batch in batches)
        flops = int(step_flops(size, recipe, batches))
        counts = (supervised, tokens, samples, flops, course.examples.skipped)
        supervised, tokens, samples, flops, skipped = over_processes(accelerator, *counts)
        course.examples.unite(skipped, accelerator)
        rate = learning_rate_at(step, course.total, recipe)
        try:
            loss, norm = take_step(course, batches, supervised=supervised, rate=rate)
        except TrainingError as error:
            raise TrainingError(f"Step {step} of {course.total}: {error}") from error
        (asked,) = over_processes(accelerator, int(stop.asked))
        now = time.perf_counter()
        seconds = now - before
        used = mfu(flops, seconds, device, devices=accelerator.num_processes) if device else None
        speed = (tokens / seconds, samples / seconds, now - began)
        yield Figures(step, loss, rate, norm, *speed, memory_held(), used), asked > 0
        before = time.perf_counter()  # what is measured and saved between two steps is not the steps' time


def _save_state(course: Course, step: int) -> None:
    learning, optimizer = trainable(course.llava), course.optimizer
    checkpoint.save_state(course.folder, step, learning=learning, optimizer=optimizer, accelerator=course.accelerator)
