"""What is recorded as a CUDA graph, run here without one: the graph alone needs a GPU."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llava_app.engine.decoder import LlamaDecoder, Span
from llava_app.engine.replay import MOST_FAILURES, Padded, Replay, one_recording
from llava_app.loading import Loaded

ROWS, LENGTH = 5, 400


class Eager(Replay):
    """Computes where a graph would be replayed."""

    def _record(self, embeds_BD: Tensor, size: int, window: int) -> "Repeated":
        self.sizes = [*getattr(self, "sizes", []), (size, window)]
        positions_B = torch.full((size,), self._length)
        recording = Repeated(self._decoder, embeds_BD.new_zeros(size, embeds_BD.shape[1]), positions_B, window)
        self._recordings[size, window] = recording  # type: ignore[assignment]
        return recording


class Repeated:
    """As a recording: what it reads and what it writes stay where they are."""

    def __init__(self, decoder: LlamaDecoder, embeds_BD: Tensor, positions_B: Tensor, window: int) -> None:
        self._decoder, self._window = decoder, window
        self.embeds_BD, self.positions_B, self.graph = embeds_BD, positions_B, self
        self.logits_BV = self._compute()

    def _compute(self) -> Tensor:
        attention = Padded(self.positions_B, self._window, self._decoder.cache_LRCKTE)
        return self._decoder.run(self.embeds_BD, attention)

    def replay(self) -> None:
        self.logits_BV.copy_(self._compute())


@pytest.fixture
def decoders(tiny_loaded: Loaded) -> tuple[LlamaDecoder, LlamaDecoder]:
    """One that replays, and one that does not."""
    matrices = tiny_loaded.weights.matrices(tiny_loaded.model)
    replaying = LlamaDecoder(tiny_loaded.model, matrices, rows=ROWS, length=LENGTH + 1)
    replaying._replay = Eager(replaying, rows=ROWS, length=LENGTH)
    return replaying, LlamaDecoder(tiny_loaded.model, matrices, rows=ROWS, length=LENGTH)


def both(decoders: Sequence[LlamaDecoder], embeds: Tensor, spans: list[Span]) -> None:
    replayed, computed = (decoder.step(embeds, spans) for decoder in decoders)
    assert torch.allclose(replayed, computed, atol=1e-4)


@torch.inference_mode()
def test_replayed_steps_equal_computed_ones_in_whichever_rows(decoders: tuple[LlamaDecoder, LlamaDecoder]) -> None:
    torch.manual_seed(0)
    lengths = [3, 250, 90, 7, 30]
    for row, length in enumerate(lengths):
        both(decoders, torch.randn(length, 64), [Span(row, 0, length)])
    for rows in ([4], [1, 3], [0, 1, 2, 3, 4], [2, 4, 1], [0], [1]):
        for _ in range(4):
            both(decoders, torch.randn(len(rows), 64), [Span(row, lengths[row], 1) for row in rows])
            lengths = [length + (row in rows) for row, length in enumerate(lengths)]
        both(decoders, torch.randn(6, 64), [Span(rows[0], lengths[rows[0]], 6)])  # a prompt in between
        lengths[rows[0]] += 6
    assert sorted(decoders[0].place) == list(range(ROWS))
    assert decoders[0].place != list(range(ROWS))


@torch.inference_mode()
def test_a_copied_row_is_found_wherever_it_lies(decoders: tuple[LlamaDecoder, LlamaDecoder]) -> None:
    both(decoders, torch.randn(20, 64), [Span(4, 0, 20)])
    both(decoders, torch.randn(1, 64), [Span(4, 20, 1)])  # brought forward
    for decoder in decoders:
        decoder.copy(4, 2, 15)
    both(decoders, torch.randn(1, 64), [Span(2, 15, 1)])


@torch.inference_mode()
def test_there_are_few_recordings(decoders: tuple[LlamaDecoder, LlamaDecoder]) -> None:
    for length in (1, 100, 255, 256, 300):
        for people in (1, 2, 3, 4, 5):
            decoders[0].step(torch.randn(people, 64), [Span(row, length, 1) for row in range(people)])
    replay = decoders[0]._replay
    assert isinstance(replay, Eager)
    assert sorted(replay.sizes) == [(size, window) for size in (1, 2, 4, 5) for window in (256, 400)]


class Failing(Eager):
    """As when CUDA refuses to record."""

    tries = 0

    def _record(self, embeds_BD: Tensor, size: int, window: int) -> "Repeated":
        self.tries += 1
        raise torch.OutOfMemoryError("operation not permitted when stream is capturing")


@torch.inference_mode()
def test_what_cannot_be_recorded_is_computed(
    decoders: tuple[LlamaDecoder, LlamaDecoder], caplog: pytest.LogCaptureFixture
) -> None:
    decoders[0]._replay = failing = Failing(decoders[0], rows=ROWS, length=LENGTH)
    for row in range(ROWS):
        both(decoders, torch.randn(5, 64), [Span(row, 0, 5)])
    for length in range(5, 12):
        both(decoders, torch.randn(2, 64), [Span(row, length, 1) for row in (4, 1)])
    assert failing.tries == MOST_FAILURES == len(caplog.messages)
    assert decoders[0].place != list(range(ROWS))


@torch.inference_mode()
def test_while_another_model_is_recorded_steps_are_computed(decoders: tuple[LlamaDecoder, LlamaDecoder]) -> None:
    both(decoders, torch.randn(5, 64), [Span(0, 0, 5)])
    with one_recording:
        both(decoders, torch.randn(1, 64), [Span(0, 5, 1)])
        assert not decoders[0]._replay._recordings
    both(decoders, torch.randn(1, 64), [Span(0, 6, 1)])
    assert decoders[0]._replay._recordings


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not any(made is given for given in args) and not made._is_view():
            self.bytes = max(self.bytes, made.nbytes)
        return made


@torch.no_grad()
def test_rows_change_places_layer_by_layer(tiny_loaded: Loaded) -> None:
    decoder = LlamaDecoder(tiny_loaded.model, tiny_loaded.weights.matrices(tiny_loaded.model), rows=2, length=64)
    first, second = (decoder.cache_LRCKTE[:, row].normal_().clone() for row in (0, 1))
    with Largest() as largest:
        decoder.swap(0, 1)
    assert torch.equal(decoder.cache_LRCKTE[:, 0], second)
    assert torch.equal(decoder.cache_LRCKTE[:, 1], first)
    assert largest.bytes == (first.nbytes + second.nbytes) / len(decoder.cache_LRCKTE)
