"""What was answered, kept on disk by what was asked, so that nothing is asked twice."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llava_app.errors import DataError


class Ledger:
    """JSON lines that are only ever appended, each on disk before anything goes on. For any number of threads."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_bytes().split(b"\n") if file.exists() else []
        self._rows = {row["key"]: row for row in map(_parsed, lines) if row}
        self._file = file.open("ab")
        self._lock = threading.Lock()
        if lines and lines[-1]:  # a kill tore the last line
            self._file.write(b"\n")

    def get(self, key: str) -> dict[str, Any] | None:
        return self._rows.get(key)

    def add(self, key: str, row: dict[str, Any]) -> None:
        with self._lock:
            self._rows[key] = row
            self._file.write(json.dumps({"key": key, **row}, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other process that asks the same writes into `folder` meanwhile. Raises DataError where one does."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")  # the system lets go of it when the process dies
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise DataError(f"{folder} is being written by another run. Wait for it, or stop it.") from error
    try:
        yield
    finally:
        lock.release()


def key_of(*asked: Any) -> str:
    """The same for the same question, whatever is JSON; a change in anything gives another key."""
    return hashlib.sha256(json.dumps(asked, ensure_ascii=True, sort_keys=True).encode()).hexdigest()[:32]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "key" in found else None
