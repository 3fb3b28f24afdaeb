"""Ctrl-C and SIGTERM, noted and obeyed between two steps."""

import signal
from types import FrameType
from typing import Self


class Interrupted(Exception):
    """The run was asked to stop; its state after `step` is saved."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


class StopSignal:
    """Within it, SIGINT and SIGTERM set `asked` instead of ending the process; a second one ends it."""

    def __enter__(self) -> Self:
        self.asked = False
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self._before[signal.Signals(number)])


def ignore_in_worker(_: int) -> None:
    """For the loader's processes: a signal to the whole group reaches them too, and the last step still needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
