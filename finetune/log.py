"""The log of a run: JSON lines, each a step's figures or an evaluation. What is not known is left out."""

import json
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Log:
    """Appends to a file, line by line; in a process that does not write, nothing."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self._file = path.open("a", encoding="utf-8") if writes else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._file:
            self._file.close()

    def write(self, line: "DataclassInstance") -> None:
        if self._file:
            known = {name: value for name, value in asdict(line).items() if value is not None}
            self._file.write(json.dumps(known, ensure_ascii=False) + "\n")
            self._file.flush()
