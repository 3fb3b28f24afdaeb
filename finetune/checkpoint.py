"""A run's folder: its settings, the states to resume from, and the finished model.

runs/NAME/            the finished model; card.json is written last
runs/NAME/run.yaml    base and data
runs/NAME/recipe.yaml how it trained; --recipe reads it
runs/NAME/log.jsonl   one line per step
runs/NAME/state/      step-N folders, the newest KEEP of them, until the run is finished
"""

import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer
from transformers import AutoConfig, PreTrainedModel, ProcessorMixin

from finetune.disk import put, settle, writing
from finetune.processes import is_sharded, over_processes
from finetune.recipe import Recipe, load_recipe, save_recipe
from llava_app.checkpoints import CARD_NAME, LOCK_NAME
from llava_app.errors import TrainingError

KEEP = 2
LET_GO = 7.0  # s; the loader's processes of a run that was killed may hold its lock for 5


@dataclass(frozen=True)
class Run:
    """One training run: where it starts, what it learns from, and how."""

    name: str
    base: str
    data: Path
    images: Path
    recipe: Recipe
    allow_refused: float = 0.01
    track: str | None = None  # where the log goes as well, one of finetune.log.TRACKERS
    checked: dict[str, Any] = field(default_factory=dict)  # what the data was when the run started
    base_revision: str | None = None  # and the base, as a card names it
    unopened: list[int] | None = None  # and the examples refused for their pictures, as `finetune.data.check` has them

    def save(self, folder: Path) -> None:
        """Write recipe.yaml, then run.yaml, by which a started run is known."""
        settings = {**asdict(self), "data": str(self.data), "images": str(self.images)}
        del settings["recipe"]
        partial = folder / "run.partial"  # half a run.yaml could neither be resumed nor started anew
        save_recipe(self.recipe, partial)
        put(partial, folder / "recipe.yaml")
        partial.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        put(partial, folder / "run.yaml")

    def refuse_changed(self, checked: dict[str, Any], base_revision: str) -> None:
        """Raise TrainingError unless a started run still has the data and the base that it had."""
        if self.checked != checked:
            raise TrainingError(f"{self.data} changed since {self.name} started. Start a new run, or put it back.")
        if self.base_revision not in (None, base_revision):
            raise TrainingError(
                f"The base {self.base} changed since {self.name} started: it was {self.base_revision:.12}, it is "
                f"{base_revision:.12}. Put it back, or start a new run."
            )


def load_run(folder: Path) -> Run:
    """The settings of a started run. Raises TrainingError when there is none in `folder`, or they are damaged."""
    path = folder / "run.yaml"
    if not path.is_file():
        raise TrainingError(f"There is no run to resume in {folder}. Start it without --resume.")
    recipe = load_recipe(str(folder / "recipe.yaml"))
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        paths = {"data": Path(settings["data"]), "images": Path(settings["images"])}
        return Run(**{**settings, **paths, "recipe": recipe})
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        raise TrainingError(
            f"{path} is damaged, so the run cannot go on. Restore that file, or start a new run with another --name."
        ) from error


def is_finished(folder: Path) -> bool:
    """Whether a run ended and its model is whole."""
    return (folder / CARD_NAME).exists()


def refuse_taken(folder: Path) -> None:
    """Raise TrainingError unless a new run can have `folder`."""
    if is_finished(folder):
        raise TrainingError(f"The run {folder.name} is finished. Choose another --name, or delete {folder}.")
    if (folder / "run.yaml").exists():
        raise TrainingError(f"The run {folder.name} was started already. Add --resume, or delete {folder}.")


@contextmanager
def alone(folder: Path, *, resume: bool) -> Iterator[None]:
    """Within it no other process trains in `folder`; the system ends it when this process dies.

    Raises TrainingError where another one does, or took the name before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=LET_GO)
    except Timeout as error:
        raise TrainingError(
            f"{folder.name} is being trained by another process. Wait for its end, or stop it and go on with --resume."
        ) from error
    try:
        if is_finished(folder) or not resume:
            refuse_taken(folder)
        yield
    finally:
        if [path.name for path in folder.glob("*")] == [LOCK_NAME]:  # it ended before there was anything to keep
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def save_state(
    folder: Path, step: int, *, learning: Mapping[str, Tensor], optimizer: Optimizer, accelerator: Accelerator
) -> None:
    """Write all that the next steps depend on: float32 weights, optimiser, random numbers. Keeps the newest KEEP.

    Written beside its place, brought to the disk and renamed, so a kill or a power cut at any moment leaves whole
    states only, and a log that reaches as far. Every process calls this. A model that is shared out among the processes
    is written by all of them, as accelerate does it.
    """
    temporary = folder / "state" / "partial"
    with writing(temporary):
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        if is_sharded(accelerator):
            accelerator.save_state(str(temporary))
        elif accelerator.is_main_process:
            _write(temporary, learning, optimizer, accelerator.scaler)
        accelerator.wait_for_everyone()
        torch.save(_random_states(), temporary / f"random-{accelerator.process_index}.pt")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            settle([*folder.glob("log.jsonl"), *temporary.rglob("*")])
    if accelerator.is_main_process:
        shutil.rmtree(folder / "state" / f"step-{step}", ignore_errors=True)  # a damaged one that was passed over
        put(temporary, folder / "state" / f"step-{step}")
        for old in _states(folder)[KEEP:]:
            shutil.rmtree(old)


def _write(folder: Path, learning: Mapping[str, Tensor], optimizer: Optimizer, scaler: GradScaler | None) -> None:
    weights = {name: weight.detach().contiguous() for name, weight in learning.items()}
    save_file(weights, folder / "weights.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    if scaler:
        torch.save(scaler.state_dict(), folder / "scaler.pt")


class Damaged(TrainingError):
    """A file of a saved state that cannot be read."""


def restore(folder: Path, *, learning: Mapping[str, Tensor], optimizer: Optimizer, accelerator: Accelerator) -> int:
    """Go back to the newest saved state that is whole, and cut the log to it; returns its step, 0 where none is saved.

    A damaged state is named and passed over. Every process calls this. Raises TrainingError when none is whole.
    """
    damaged: list[str] = []
    for state in _states(folder):
        told = ""
        try:
            load_state(state, learning=learning, optimizer=optimizer, accelerator=accelerator)
        except Damaged as error:
            told = str(error)
        if any(over_processes(accelerator, int(bool(told)))):
            damaged.append(told or f"{state} is damaged")
            accelerator.print(damaged[-1])
            continue
        if accelerator.is_main_process:
            cut_log(folder, step_of(state))
        accelerator.wait_for_everyone()
        accelerator.print(f"going on after step {step_of(state)}")
        return step_of(state)
    if damaged:
        raise TrainingError(
            f"No saved state of {folder.name} is whole: {'; '.join(damaged)}. Delete {folder / 'state'}, and --resume "
            "begins at the first step."
        )
    if accelerator.is_main_process:
        cut_log(folder, -1)
    accelerator.wait_for_everyone()
    return 0


def load_state(state: Path, *, learning: Mapping[str, Tensor], optimizer: Optimizer, accelerator: Accelerator) -> None:
    """Put a saved state back into the weights, the optimiser and the random numbers.

    Raises TrainingError; Damaged when a file cannot be read, and then nothing was put back.
    """
    if is_sharded(accelerator) == (state / "weights.safetensors").is_file():
        raise TrainingError(f"{state} was saved by other processes. Resume with the accelerate config it started with.")
    if is_sharded(accelerator):
        accelerator.load_state(str(state))
        return
    weights = _read(state / "weights.safetensors", load_file)
    moments = _read(state / "optimizer.pt", _load)
    scaling, random = state / "scaler.pt", state / f"random-{accelerator.process_index}.pt"
    scale = _read(scaling, _load) if accelerator.scaler and scaling.is_file() else None
    drawn = _read(random, _load) if random.is_file() else None  # absent where more processes resume than were stopped
    if weights.keys() != learning.keys():
        raise TrainingError(f"{state} holds other weights than this stage trains. Start a new run.")
    with torch.no_grad():
        for name, weight in learning.items():
            weight.copy_(weights[name])
    optimizer.load_state_dict(moments)
    if scale:
        accelerator.scaler.load_state_dict(scale)
    if drawn:
        _restore_random_states(drawn)


def _read(path: Path, load: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        return load(path)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise Damaged(f"{path} is damaged ({str(error).partition(chr(10))[0] or type(error).__name__})") from error


def _load(path: Path) -> dict[str, Any]:
    stored: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return stored


def save_model(
    folder: Path, model: PreTrainedModel, weights: dict[str, Tensor], *, processor: ProcessorMixin, dtype: torch.dtype
) -> None:
    """Write a standard folder: `weights` as safetensors in `dtype`, configs, processor and chat template.

    The model itself stays as it is.
    """
    with torch.device("meta"):
        shell = type(model)(copy.deepcopy(model.config))
    shell.load_state_dict({name: weight.detach().to("cpu", dtype) for name, weight in weights.items()}, assign=True)
    shell.tie_weights()
    shell.generation_config = model.generation_config
    shell.save_pretrained(folder)
    processor.save_pretrained(folder)


def stored_dtype(source: Path) -> torch.dtype:
    """The precision in which a checkpoint lies on disk; what is trained from it is stored in the same."""
    return AutoConfig.from_pretrained(source).dtype or torch.float32


def drop_states(folder: Path) -> None:
    """Delete the states of a finished run, once it is on the disk; they take several times the model's room."""
    settle((*folder.glob("*"), folder))
    shutil.rmtree(folder / "state", ignore_errors=True)


def cut_log(folder: Path, step: int) -> None:
    """Drop the log's lines after `step`: a resumed run writes them again. That takes no room on the disk."""
    path = folder / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = takewhile(lambda line: line.endswith(b"\n") and json.loads(line)["step"] <= step, lines)
    if lines:
        os.truncate(path, sum(map(len, kept)))


def step_of(state: Path) -> int:
    """After how many steps a state was saved."""
    return int(state.name.removeprefix("step-"))


def _states(folder: Path) -> list[Path]:
    """The saved states of a run, the newest first."""
    states = [path for path in (folder / "state").glob("step-*") if path.is_dir()]
    return sorted(states, key=step_of, reverse=True)


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else states


def _restore_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
