"""`python -m finetune …` as a process: the page starts and watches what it may not import."""

import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).parents[1]  # where the commands run


def told(command: Sequence[str]) -> list[str]:
    """A command of finetune as it runs here."""
    return [sys.executable, "-m", "finetune", *command]


def without_folders(text: str) -> str:
    """Of every path only the last name: where things lie is nobody's business on a page."""
    return re.sub(r"(?:/[^\s/:'\"]+)+/(?=[^\s/])", "", text)


def _emptied(file: Path) -> BinaryIO:
    """An empty file for appending: whoever an earlier page left writing there leaves no hole in it."""
    file.write_bytes(b"")
    return file.open("ab")


class Background:
    """A command that runs on while the page does other things, one at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str], *, out: Path, problems: Path | None = None) -> None:
        """Begin; what it says goes into `out`, and what it complains of into `problems`, or there too."""
        with ExitStack() as files:
            stdout = files.enter_context(_emptied(out))
            stderr = files.enter_context(_emptied(problems)) if problems else stdout
            self._process = subprocess.Popen(
                told(command), cwd=ROOT, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def stop(self) -> None:
        """Ask it to end, as Ctrl-C does. Windows cannot ask: there it ends, and what it had written by then is kept."""
        if self._process and self.is_running:
            self._process.send_signal(signal.SIGTERM if sys.platform == "win32" else signal.SIGINT)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """None before its end, and before it was started."""
        return self._process.returncode if self._process else None
