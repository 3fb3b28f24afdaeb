"""The log of a run: JSON lines, each a step's figures or an evaluation. What is not known is left out."""

import json
import os
from dataclasses import asdict
from errno import ENOSPC
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from accelerate import Accelerator

from llava_app.errors import TrainingError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


TRACKERS = ("tensorboard", "trackio", "wandb")  # of those that accelerate knows
TRACKED = "tensorboard"  # the folder beside the runs where TensorBoard finds them


def refuse_missing(tracker: str | None) -> None:
    """Raise TrainingError unless `tracker` is one of TRACKERS and installed, or none is asked for."""
    if tracker is None:
        return
    if tracker not in TRACKERS:
        raise TrainingError(f"There is no tracker {tracker!r}. Give one of {', '.join(TRACKERS)}.")
    if find_spec(tracker) is None:
        raise TrainingError(f"{tracker} is not installed. Run pip install {tracker}, or leave --track out.")


def begin_tracking(accelerator: Accelerator, tracker: str | None, *, run: str, settings: dict[str, Any]) -> None:
    """Open the run in a tracker, if any: TensorBoard's has a folder of its own, the others' belong to a project."""
    if tracker is None:
        return
    alone = tracker == "tensorboard"
    known = {name: value for name, value in settings.items() if value is not None}
    accelerator.init_trackers(run if alone else "llava", known, {} if alone else {tracker: {"name": run}})


def track(accelerator: Accelerator, line: "DataclassInstance", step: int) -> None:
    """Give the line's numbers to the trackers that were begun, if any."""
    numbers = {name: value for name, value in asdict(line).items() if isinstance(value, float)}
    accelerator.log(numbers, step=step)


class Log:
    """Appends to a file, line by line; in a process that does not write, nothing."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self._file = path.open("ab", buffering=0) if writes else None  # what cannot be written is known at once

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._file:
            self._file.close()

    def write(self, line: "DataclassInstance") -> None:
        """Raises TrainingError when the disk is full."""
        if self._file is None:
            return
        known = {name: value for name, value in asdict(line).items() if value is not None}
        text = json.dumps(known, ensure_ascii=False).encode() + b"\n"
        try:
            if self._file.write(text) < len(text):  # the disk took a part of the line, which cut_log drops
                raise OSError(ENOSPC, os.strerror(ENOSPC))
        except OSError as error:
            raise TrainingError(
                f"{self._file.name} cannot be written ({error.strerror}). What was saved before is whole: make room, "
                "then go on with --resume."
            ) from error
