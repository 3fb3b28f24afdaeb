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
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer
from transformers import AutoConfig, PreTrainedModel, ProcessorMixin

from finetune.processes import is_sharded
from finetune.recipe import Recipe, load_recipe, save_recipe
from llava_app.checkpoints import CARD_NAME
from llava_app.errors import TrainingError

KEEP = 2


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

    def save(self, folder: Path) -> None:
        """Write recipe.yaml, then run.yaml, by which a started run is known."""
        save_recipe(self.recipe, folder / "recipe.yaml")
        settings = {**asdict(self), "data": str(self.data), "images": str(self.images)}
        del settings["recipe"]
        partial = folder / "run.partial"  # half a run.yaml could neither be resumed nor started anew
        partial.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        partial.replace(folder / "run.yaml")


def load_run(folder: Path) -> Run:
    """The settings of a started run. Raises TrainingError when there is none in `folder`."""
    path = folder / "run.yaml"
    if not path.is_file():
        raise TrainingError(f"There is no run to resume in {folder}. Start it without --resume.")
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    paths = {"data": Path(settings["data"]), "images": Path(settings["images"])}
    return Run(**{**settings, **paths, "recipe": load_recipe(str(folder / "recipe.yaml"))})


def is_finished(folder: Path) -> bool:
    """Whether a run ended and its model is whole."""
    return (folder / CARD_NAME).exists()


def refuse_taken(folder: Path) -> None:
    """Raise TrainingError unless a new run can have `folder`."""
    if is_finished(folder):
        raise TrainingError(f"The run {folder.name} is finished. Choose another --name, or delete {folder}.")
    if (folder / "run.yaml").exists():
        raise TrainingError(f"The run {folder.name} was started already. Add --resume, or delete {folder}.")


def newest_state(folder: Path) -> Path | None:
    """The state with the most steps in a run's folder."""
    states = [path for path in (folder / "state").glob("step-*") if path.is_dir()]
    return max(states, key=step_of, default=None)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Files are written in it. A full disk, which torch calls a RuntimeError, becomes a TrainingError; what was begun
    in `folder` is deleted, since it takes the room that is lacking."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free / 1e6
        reason = str(error).splitlines()[0]
        if "inline_container" in reason:  # torch's name for a file that the disk took a part of only
            reason = "a file was cut short"
        raise TrainingError(
            f"{folder.parent} cannot be written ({reason}); {free:,.0f} MB are free there. What was saved before is "
            "whole: make room, then go on with --resume."
        ) from error


def save_state(
    folder: Path, step: int, *, learning: Mapping[str, Tensor], optimizer: Optimizer, accelerator: Accelerator
) -> None:
    """Write all that the next steps depend on: float32 weights, optimiser, random numbers. Keeps the newest KEEP.

    Written beside its place and renamed, so a kill at any moment leaves whole states only. Every process calls this.
    A model that is shared out among the processes is written by all of them, as accelerate does it.
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
        temporary.rename(folder / "state" / f"step-{step}")
        for old in sorted((folder / "state").glob("step-*"), key=step_of)[:-KEEP]:
            shutil.rmtree(old)


def _write(folder: Path, learning: Mapping[str, Tensor], optimizer: Optimizer, scaler: GradScaler | None) -> None:
    weights = {name: weight.detach().contiguous() for name, weight in learning.items()}
    save_file(weights, folder / "weights.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    if scaler:
        torch.save(scaler.state_dict(), folder / "scaler.pt")


def load_state(state: Path, *, learning: Mapping[str, Tensor], optimizer: Optimizer, accelerator: Accelerator) -> None:
    """Put a saved state back into the weights, the optimiser and the random numbers. Raises TrainingError."""
    if is_sharded(accelerator) == (state / "weights.safetensors").is_file():
        raise TrainingError(f"{state} was saved by other processes. Resume with the accelerate config it started with.")
    if is_sharded(accelerator):
        accelerator.load_state(str(state))
        return
    weights = load_file(state / "weights.safetensors")
    if weights.keys() != learning.keys():
        raise TrainingError(f"{state} holds other weights than this stage trains. Start a new run.")
    with torch.no_grad():
        for name, weight in learning.items():
            weight.copy_(weights[name])
    optimizer.load_state_dict(torch.load(state / "optimizer.pt", map_location="cpu", weights_only=True))
    if accelerator.scaler and (state / "scaler.pt").is_file():
        accelerator.scaler.load_state_dict(torch.load(state / "scaler.pt", weights_only=True))
    random = state / f"random-{accelerator.process_index}.pt"
    if random.is_file():  # absent where more processes resume than were stopped
        _restore_random_states(torch.load(random, weights_only=True))


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
    """Delete the states of a finished run; they take several times the model's room."""
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


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else states


def _restore_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
