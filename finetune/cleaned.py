"""What `check` writes: the good records, ready to be learned from, and the others with their reasons."""

import json
import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from finetune.data.mixture import Part
from finetune.data.records import image_names
from finetune.data.refusals import Refusal
from llava_app.errors import DataError


class Writer:
    """Writes the good records to NAME.clean.jsonl, and the others with their reasons to NAME.refused.jsonl.

    Makes the folder `out`. Raises DataError when nothing can be written there. Pictures are named so that the file of
    good records can be trained on where it lies, but for those in archives, whose folder `close` tells.
    """

    def __init__(self, part: Part, out: Path, name: str) -> None:
        self.out = out
        self.folder = part.pictures.folder
        self.elsewhere = self.folder.resolve() != out.resolve()
        self.archived = self.elsewhere and bool(part.pictures.given or part.pictures.near)
        self.left = False  # whether pictures keep names that are relative to their own folder
        self.pictures = out / f"{name}.pictures"  # of datasets that hold them as bytes
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.clean = (out / f"{name}.clean.jsonl").open("w", encoding="utf-8")
            self.refused = (out / f"{name}.refused.jsonl").open("w", encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"Nothing can be written to {out}: {error.strerror}. Give another folder as --out."
            ) from error

    def accept(self, record: dict[str, Any]) -> None:
        """Write a good record; encoded pictures become files."""
        names = [self._save(name) if isinstance(name, bytes) else self._name(name) for name in image_names(record)]
        changed = {"image": names[0] if isinstance(record["image"], str) else names} if names else {}
        self.clean.write(json.dumps(record | changed, ensure_ascii=False, default=_written) + "\n")

    def refuse(self, record: Any, refusal: Refusal) -> None:
        """Write why a record is refused, and the record."""
        told = {"reason": refusal.reason, "details": refusal.details, "record": record}
        self.refused.write(json.dumps(told, ensure_ascii=False, default=_written) + "\n")

    def close(self) -> str:
        """Close both; returns their names for a person."""
        self.clean.close()
        self.refused.close()
        told = f"; their pictures lie in archives: train with --images {self.folder}" if self.left else ""
        return f"written: {self.clean.name} and {self.refused.name}{told}"

    def _name(self, name: str) -> str:
        """Of a picture's file, as seen from the folder that is written to."""
        if self.archived or not self.elsewhere:
            self.left = self.archived
            return name
        return Path(os.path.relpath(self.folder / name, self.out)).as_posix()

    def _save(self, encoded: bytes) -> str:
        self.pictures.mkdir(exist_ok=True)
        path = self.pictures / blake2b(encoded, digest_size=16).hexdigest()
        path.write_bytes(encoded)
        return f"{self.pictures.name}/{path.name}"


def writers(parts: Sequence[Part], out: Path | None) -> Iterator[Writer]:
    """One for each part, to the folder `out` or beside the part; what would have the same name is numbered."""
    whole = [part.path if part.path.name.strip(".") else part.path.resolve() for part in parts]  # not "." or ".."
    wanted = [(out or path.parent, path.name if path.is_dir() else path.stem) for path in whole]
    for number, (part, (folder, name)) in enumerate(zip(parts, wanted, strict=True), 1):
        yield Writer(part, folder, name if wanted.count((folder, name)) == 1 else f"{name}-{number}")


def _written(value: Any) -> str:
    """What JSON has no form for, such as the dates and bytes of a dataset's other columns."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
