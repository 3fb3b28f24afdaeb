"""Files that are whole on the disk, or not there at all."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from llava_app.errors import TrainingError


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


def settle(paths: Iterable[Path]) -> None:
    """Have the system bring these files and folders to the disk: no power cut takes them after that."""
    for path in paths:
        _sync(path)


def put(written: Path, place: Path) -> None:
    """Rename a file or folder once it is on the disk, and see that its new name is there too."""
    _sync(written)
    written.replace(place)
    _sync(place.parent)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":  # Windows opens no folder
        return
    file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)
