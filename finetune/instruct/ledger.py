"""The ledger of a generation: JSON lines that are only ever appended, each on disk before anything goes on.

A line says that a question was `asked` (with what it may use at most), was `replied` to, or `failed`. What was asked
and has neither reply nor failure was cut off; it may have been billed, so it counts in full.
"""

import json
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from finetune.instruct.budget import Usage
from llava_app.errors import DataError


class Ledger:
    """Writes lines; one process at a time. Raises DataError when another one has the file."""

    def __init__(self, file: Path) -> None:
        self._lock = threading.Lock()
        self._alone = FileLock(file.with_suffix(".lock"))  # the system lets go of it when the process dies
        try:
            self._alone.acquire(blocking=False)
        except Timeout as error:
            raise DataError(f"{file.parent} is being written by another run. Wait for it, or stop it.") from error
        self._file = file.open("ab")
        if _is_torn(file):
            self._append(b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self._alone.release()

    def write(self, event: str, key: str, usage: Usage, **fields: Any) -> None:
        """Append a line; it is on disk when this returns."""
        line = {"event": event, "key": key, "prompt_tokens": usage.prompt, "answer_tokens": usage.answer, **fields}
        with self._lock:
            self._append(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())


def read_ledger(file: Path) -> list[dict[str, Any]]:
    """The lines in order, without those that a crash tore."""
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")
    return [line for line in map(_parsed, lines) if line is not None]


def spent(lines: list[dict[str, Any]]) -> Usage:
    """What was used in all; what was asked and never came to an end counts in full."""
    total, open_questions = Usage(), dict[str, Usage]()
    for line in lines:
        usage = Usage(line["prompt_tokens"], line["answer_tokens"])
        if line["event"] == "asked":
            total += open_questions.pop(line["key"], Usage())
            open_questions[line["key"]] = usage
        else:
            open_questions.pop(line["key"], None)
            total += usage
    return sum(open_questions.values(), total)


def replies(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The reply to each question that has one, by key."""
    return {line["key"]: line for line in lines if line["event"] == "replied"}


def _is_torn(file: Path) -> bool:
    with file.open("rb") as read:
        read.seek(max(0, file.stat().st_size - 1))
        return read.read() not in (b"", b"\n")


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
