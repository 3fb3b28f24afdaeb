"""Which row of the cache holds which conversation, so that nothing that was read once is read again."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

# What a row may lose without being copied first, beside what it keeps: the end of an answer, whose tokens are others
# when its text is read again.
LOST = 1 / 8


@dataclass(frozen=True)
class Place:
    """Where a prompt goes: its first `length` tokens are those of row `source`, and the rest is to be read."""

    row: int
    source: int
    length: int


@dataclass(eq=False)
class _Row:
    held: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # (S,) what the cache holds, by content
    busy: bool = False
    used: int = 0  # when it was taken last, in takes


class Slots:
    """Bookkeeping of rows; the keys and values themselves are the decoder's.

    Tokens are numbers that stand for content: two pictures have different numbers though both are image tokens.
    """

    def __init__(self, rows: int) -> None:
        self._rows = [_Row() for _ in range(rows)]
        self._clock = count(1)

    @property
    def busy(self) -> int:
        """How many rows are being written."""
        return sum(row.busy for row in self._rows)

    @property
    def free(self) -> bool:
        return self.busy < len(self._rows)

    @property
    def tokens(self) -> int:
        """How many tokens all rows hold."""
        return sum(len(row.held) for row in self._rows)

    def take(self, wanted: Sequence[int]) -> Place:
        """A free row for the prompt `wanted`, with as much of it as any row holds; at least one token is left to read.

        A row whose conversation the prompt goes on with is taken as it is, and when no row is empty, also one that
        would keep more than it loses. Other rows keep what they have: the common part is to be copied. IndexError when
        every row is busy.
        """
        if not self.free:
            raise IndexError(f"all {len(self._rows)} rows are busy")
        prompt = np.asarray(wanted, np.int64)
        common = [_common(row.held, prompt) for row in self._rows]
        source = max(range(len(common)), key=lambda number: (common[number], not self._rows[number].busy))
        length = min(common[source], len(prompt) - 1)
        row = source if length and self._goes_on(self._rows[source], length) else self._oldest_free()
        self._rows[row].held = prompt[:length]
        self._rows[row].busy = True
        self._rows[row].used = next(self._clock)
        return Place(row, source if length else row, length)

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """Note that the cache of `row` now holds `tokens` more."""
        self._rows[row].held = np.append(self._rows[row].held, np.asarray(tokens, np.int64))

    def release(self, row: int) -> None:
        """The conversation in `row` rests; its tokens stay until the row is needed."""
        self._rows[row].busy = False

    def drop(self, row: int) -> None:
        """`row` is free and holds nothing: what was to come into it did not."""
        self._rows[row].busy, self._rows[row].held = False, self._rows[row].held[:0]

    def _goes_on(self, row: _Row, length: int) -> bool:
        """Whether a prompt that shares `length` tokens with `row` may take it over."""
        lost = len(row.held) - length
        no_row_is_empty = all(len(other.held) for other in self._rows)
        return not row.busy and (lost <= length * LOST or (no_row_is_empty and lost <= length))

    def _oldest_free(self) -> int:
        free = [number for number, row in enumerate(self._rows) if not row.busy]
        return min(free, key=lambda number: (len(self._rows[number].held) > 0, self._rows[number].used))


def _common(held: np.ndarray, prompt: np.ndarray) -> int:
    """How many tokens both begin with."""
    shorter = min(len(held), len(prompt))
    differs = held[:shorter] != prompt[:shorter]
    return int(differs.argmax()) if differs.any() else shorter
