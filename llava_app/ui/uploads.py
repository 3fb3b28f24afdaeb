"""Where the page keeps what visitors send it, and the bounds of that.

Each process has a folder of its own and, beside it, a lock for as long as it lives. One that was killed leaves its
folder behind, and no lock on it, by which the next to start knows what to remove.
"""

import os
import secrets
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

from filelock import FileLock, Timeout

MOST_BYTES = 4_000_000_000
LOOK = 30.0  # s between two looks at how much there is
UNFINISHED = 3600.0  # s without a further byte after which nobody sends the rest of an upload


class Uploads:
    """The folder of this process; Gradio finds it by the environment."""

    def __init__(self, parent: Path, *, most_bytes: int = MOST_BYTES) -> None:
        """Makes the folder below `parent`, and removes those of processes that are gone."""
        parent.mkdir(parents=True, exist_ok=True)
        for other in [path for path in parent.glob("page-*") if path.is_dir()]:
            with suppress(Timeout), _lock(other).acquire(timeout=0):  # else its process lives
                _remove(other)
        self.folder = (parent / f"page-{secrets.token_hex(8)}").absolute()
        self._lock = _lock(self.folder)
        self._lock.acquire()
        self.folder.mkdir(mode=0o700)  # only now: a folder without a lock belongs to nobody
        self._most_bytes = most_bytes
        self._own: set[Path] = set()
        os.environ["GRADIO_TEMP_DIR"] = str(self.folder)

    def settle(self) -> None:
        """What lies there now belongs to the page itself and stays."""
        self._own = set(_files(self.folder))

    def watch(self) -> None:
        """Keep the bound from now on."""
        Thread(target=self._watch, name="uploads", daemon=True).start()

    def bound(self) -> None:
        """Delete what is left of uploads that broke off, and the oldest files until the rest is as small as it must."""
        files = {path: about for path, about in _files(self.folder).items() if path not in self._own}
        for path in [path for path in files if path.parent == self.folder]:  # where they lie until they are whole
            if time.time() - files[path].st_mtime > UNFINISHED:
                path.unlink(missing_ok=True)
                del files[path]
        total = sum(about.st_size for about in files.values())
        for path in sorted(files, key=lambda path: files[path].st_mtime):
            if total <= self._most_bytes:
                break
            path.unlink(missing_ok=True)
            total -= files[path].st_size

    def remove(self) -> None:
        """Remove the folder, at the end."""
        _remove(self.folder)
        self._lock.release()

    def _watch(self) -> None:
        while True:
            self.bound()
            time.sleep(LOOK)


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.with_suffix(".lock"), thread_local=False)


def _remove(folder: Path) -> None:
    """The folder and its lock, which whoever calls this holds."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # Windows keeps a file that is open
        folder.with_suffix(".lock").unlink(missing_ok=True)


def _files(folder: Path) -> dict[Path, os.stat_result]:
    found = {}
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # gone since
            found[path] = path.stat()
    return {path: about for path, about in found.items() if stat.S_ISREG(about.st_mode)}
