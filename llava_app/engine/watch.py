"""What an engine is doing, in figures."""

import statistics
import time
from collections import deque
from dataclasses import dataclass

WINDOW = 128  # steps, and answers, that the rates are taken over


@dataclass(frozen=True)
class Wait:
    """Where a request stands among those that wait for a row."""

    ahead: int  # requests that come before it
    seconds: float | None  # until its turn, roughly; None until an answer has ended that says how long one takes


@dataclass(frozen=True)
class Snapshot:
    """An engine at one moment."""

    queued: int  # requests that wait for a row
    answering: int  # conversations that are being read or answered
    rows: int  # conversations that the cache has room for
    tokens_held: int  # in the cache, resting conversations included
    tokens_read: int  # of prompts, computed since the start
    tokens_reused: int  # of prompts, found in the cache since the start
    tokens_written: int  # since the start
    pictures_seen: int  # by the vision tower, since the start
    pictures_reused: int  # found in the cache or in a conversation's row, since the start
    tokens_per_second: float | None  # of all conversations together, over the last steps
    seconds_to_first: float | None  # median over the last answers, from the question to its first token
    cache_bytes: int  # of keys, values and pictures' features


class Meter:
    """Counts for the engine's thread; `rate` and `wait` may be read from any."""

    def __init__(self) -> None:
        self.read = self.reused = self.written = self.seen = self.recalled = 0
        self._steps: deque[tuple[float, int]] = deque(maxlen=WINDOW)  # seconds, tokens written
        self._waits: deque[float] = deque(maxlen=WINDOW)
        self._lengths: deque[float] = deque(maxlen=WINDOW)  # seconds that a row was taken

    def step(self, begun: float, written: int) -> None:
        """A step that began at `begun` on the monotonic clock has written so many tokens."""
        self.written += written
        self._steps.append((time.monotonic() - begun, written))

    def first_token(self, seconds: float) -> None:
        self._waits.append(seconds)

    def row_free(self, seconds: float) -> None:
        """An answer has ended, or was given up, that held its row so long."""
        self._lengths.append(seconds)

    def until(self, ahead: int, *, rows: int) -> Wait:
        """For a request with so many before it: of `rows` that are taken, one gets free every `rows`-th of what an
        answer takes."""
        lengths = list(self._lengths)
        return Wait(ahead, (ahead + 1) * statistics.median(lengths) / rows if lengths else None)

    @property
    def rate(self) -> float | None:
        steps = list(self._steps)
        seconds = sum(duration for duration, _ in steps)
        return sum(written for _, written in steps) / seconds if seconds else None

    @property
    def wait(self) -> float | None:
        waits = list(self._waits)
        return statistics.median(waits) if waits else None
