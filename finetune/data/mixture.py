"""What a run learns from: one file or folder of records, or a mixture of several."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml

from finetune.data.pictures import Pictures, Place, find_pictures
from finetune.data.records import METADATA, Records, dataset_files, image_names, open_records
from llava_app.errors import DataError

END = 1 << 16  # bytes: more than what Parquet says of its columns
MIXTURES = (".yaml", ".yml")
FIELDS = {"data", "images", "weight", "count", "seed"}  # of a part of a mixture
WANTED = "Give it as seed: 0 and parts:, a list of data, images and weight or count."


@dataclass(frozen=True)
class Part:
    """The records of one file or folder, and their pictures."""

    path: Path
    records: Records
    pictures: Pictures

    def places(self, record: dict[str, Any]) -> tuple[Place, ...]:
        """Where the pictures of one of its records are, in order."""
        return tuple(self.pictures.place(name) for name in image_names(record))


@dataclass(frozen=True)
class Data:
    """N records out of one or several parts."""

    parts: tuple[Part, ...]
    part: np.ndarray  # (N,) int16, the part in which each record lies
    number: np.ndarray  # (N,) int64, which of the part's records it is

    def __len__(self) -> int:
        return len(self.number)

    def read(self, index: int) -> tuple[Any, Part]:
        """A record, and the part it is of. Raises DataError where the file holds no JSON."""
        part = self.parts[self.part[index]]
        return part.records[int(self.number[index])], part

    def originals(self) -> np.ndarray:
        """(N,) int64: which record each one is, 0…R-1; the copies of a weighted part have one number."""
        every = self.part.astype(np.int64) << 48 | self.number
        return np.unique(every, return_inverse=True)[1]

    def take(self, indices: np.ndarray | slice) -> Self:
        """Those records only."""
        return replace(self, part=self.part[indices], number=self.number[indices])


def open_data(path: Path, images: Path | None = None) -> Data:
    """The records of `path`: a data file, a folder or a mixture; `images` is where their pictures are.

    Without `images` pictures are beside the data. Raises DataError.
    """
    if path.suffix in MIXTURES:
        return _mix(path)
    part = _open_part(path, images)
    count = len(part.records)
    return Data((part,), np.zeros(count, np.int16), np.arange(count))


def picture_root(path: Path, images: Path | None) -> Path:
    """Where the pictures of `path` are: `images`, or beside the data. Raises DataError for `images` of a mixture."""
    if images and path.suffix in MIXTURES:
        raise DataError(f"{path} is a mixture, whose parts say where their pictures are. Take --images away.")
    return images or (path if path.is_dir() else path.parent)


def digest(path: Path) -> str:
    """SHA-256, hex, of a data file; of a mixture's file and its parts; of a dataset's folder, by its tables.

    Of each table, which may hold gigabytes of pictures, count the size and the end; of files beside the tables nothing.
    """
    if path.suffix in MIXTURES:
        parts = "".join(digest(path.parent / str(settings["data"])) for settings in _settings(path)[1])
        return hashlib.sha256(path.read_bytes() + parts.encode()).hexdigest()
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if (path / METADATA).is_file():
        return digest(path / METADATA)
    tables = [(file.relative_to(path).as_posix(), file.stat().st_size, _end(file)) for file in dataset_files(path)]
    return hashlib.sha256(repr(tables).encode()).hexdigest()


def _end(file: Path) -> bytes:
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - END))
        return opened.read()


def _open_part(path: Path, images: Path | None) -> Part:
    return Part(path, open_records(path), find_pictures(picture_root(path, images)))


def _mix(path: Path) -> Data:
    seed, settings = _settings(path)
    parts, drawn = [], []
    for place, part in enumerate(settings):
        images = path.parent / str(part["images"]) if "images" in part else None
        parts.append(_open_part(path.parent / str(part["data"]), images))
        drawn.append(_draw(len(parts[-1].records), part, seed=part.get("seed", seed + place)))
    which = np.repeat(np.arange(len(parts), dtype=np.int16), [len(numbers) for numbers in drawn])
    return Data(tuple(parts), which, np.concatenate(drawn))


def _settings(path: Path) -> tuple[int, Sequence[dict[str, Any]]]:
    """The seed and the parts of a mixture file. Raises DataError where it is not what it should be."""
    try:
        mixture = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as YAML: {error}. {WANTED}") from error
    parts = mixture.get("parts") if isinstance(mixture, dict) else None
    if not isinstance(parts, list) or not parts or set(mixture) - {"parts", "seed"}:
        raise DataError(f"{path} is no mixture. {WANTED}")
    _check_seed(mixture, str(path))
    for number, part in enumerate(parts, 1):
        if not isinstance(part, dict) or "data" not in part or {"weight", "count"} <= set(part) or set(part) - FIELDS:
            raise DataError(
                f"{path}, part {number}: {part}. It must have data, and can have images, seed, and one of "
                "weight (how often each record comes) and count (how many are drawn)."
            )
        if Path(str(part["data"])).suffix in MIXTURES:
            raise DataError(
                f"{path}, part {number}: {part['data']} is a mixture, and a part cannot be one. Write its parts here."
            )
        _check_seed(part, f"{path}, part {number}")
        sizes = [part.get(name, 1) for name in ("weight", "count")]
        if not all(isinstance(size, int | float) and 0 < size < math.inf for size in sizes) or not isinstance(
            sizes[1], int
        ):
            raise DataError(f"{path}, part {number}: weight must be a number and count a whole number, above 0.")
    return mixture.get("seed", 0), parts


def _check_seed(settings: dict[str, Any], where: str) -> None:
    seed = settings.get("seed", 0)
    if type(seed) is not int or seed < 0:
        raise DataError(f"{where}: seed is {seed!r}; it must be a whole number, 0 or above.")


def _draw(records: int, part: dict[str, Any], *, seed: int) -> np.ndarray:
    """Which records come, in order: all of them as often as they fit, and the rest drawn without repeats."""
    wanted = part["count"] if "count" in part else round(records * part.get("weight", 1))
    if not records:
        return np.zeros(0, np.int64)
    copies, rest = divmod(wanted, records)
    drawn = np.random.default_rng(seed).permutation(records)[:rest]
    return np.sort(np.concatenate([np.tile(np.arange(records), copies), drawn]))
