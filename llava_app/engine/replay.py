"""The step that gives several conversations one token each, recorded once as a CUDA graph and then replayed.

Launching the thousand small kernels of a step one by one takes longer than running them. A graph has fixed sizes and
addresses: there is one for each number of conversations and each length of cache that is a power of two, and the
conversations that are being written lie in the first places of the cache.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from llava_app.engine.decoder import LlamaDecoder, Span

SHORTEST = 256  # tokens of cache that a graph reads at least
MOST_FAILURES = 3  # after which a decoder tries no more recordings

one_recording = threading.Lock()  # CUDA allows one at a time, and nobody may wait for the whole GPU meanwhile

logger = logging.getLogger(__name__)


class Padded:
    """One token for each of the first B places; all attend to `window` tokens, masked to those that they have."""

    def __init__(self, positions_B: Tensor, window: int, cache_LRCKTE: Tensor) -> None:
        self.positions_N = positions_B
        self._places_B = torch.arange(len(positions_B), device=positions_B.device)
        self._window = window
        self._cache = cache_LRCKTE

    def attend(self, layer: int, queries_NHE: Tensor, pairs_NCKE: Tensor) -> Tensor:
        cache_RCKTE = self._cache[layer]
        cache_RCKTE[self._places_B, :, :, self.positions_N] = pairs_NCKE
        size, _, kv_heads, width = pairs_NCKE.shape
        seen_BT = torch.arange(self._window, device=pairs_NCKE.device) <= self.positions_N[:, None]
        keys_BKTE, values_BKTE = cache_RCKTE[:size, :, :, : self._window].unbind(1)
        gathered_BKGE = F.scaled_dot_product_attention(
            queries_NHE.view(size, kv_heads, -1, width), keys_BKTE, values_BKTE, attn_mask=seen_BT[:, None, None]
        )
        return gathered_BKGE.reshape(size, -1)


@dataclass(frozen=True, eq=False)
class _Recording:
    graph: torch.cuda.CUDAGraph
    embeds_BD: Tensor
    positions_B: Tensor
    logits_BV: Tensor


class Replay:
    """Recordings of a decoder's step, made when they are first needed."""

    def __init__(self, decoder: "LlamaDecoder", *, rows: int, length: int) -> None:
        """The decoder's cache has one position more than `length`, for the tokens of places that nobody writes to."""
        self._decoder = decoder
        self._rows, self._length = rows, length
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._failures = 0
        self._aside: torch.cuda.Stream | None = None  # where recordings are made
        # Memory of what lives within a step, which all recordings may share: they are replayed one after the other.
        self._pool: Any = None  # a handle of torch

    def step(self, embeds_BD: Tensor, spans: Sequence["Span"]) -> Tensor | None:
        """Logits (B, V) after one token more for each of the spans; None where that could not be recorded."""
        places = self._bring_forward([span.row for span in spans])
        size = min(self._rows, _power_of_two(len(spans)))
        window = min(self._length, max(SHORTEST, _power_of_two(max(span.end for span in spans))))
        recording = self._recordings.get((size, window)) or self._try_to_record(embeds_BD, size, window)
        if recording is None:
            return None
        positions = [self._length] * size
        for place, span in zip(places, spans, strict=True):
            positions[place] = span.start
        recording.positions_B.copy_(torch.tensor(positions))
        recording.embeds_BD[places] = embeds_BD
        recording.graph.replay()
        return recording.logits_BV[places]

    def _bring_forward(self, rows: Sequence[int]) -> list[int]:
        """The places of these rows, after moving them into the first ones."""
        place = self._decoder.place
        free = [row for row in range(self._rows) if place[row] < len(rows) and row not in rows]
        for row in rows:
            if place[row] >= len(rows):
                self._decoder.swap(row, free.pop())
        return [place[row] for row in rows]

    def _try_to_record(self, embeds_BD: Tensor, size: int, window: int) -> _Recording | None:
        """None while another decoder records, and after a failure, which may be the doing of another thread."""
        if self._failures == MOST_FAILURES or not one_recording.acquire(blocking=False):
            return None
        try:
            recording = self._recordings[size, window] = self._record(embeds_BD, size, window)
        except RuntimeError:  # CUDA's are its children, and so is that of too little memory
            self._failures, self._pool = self._failures + 1, None  # torch may think that it still records into the pool
            logger.warning("A step was not recorded as a CUDA graph and is computed without one.", exc_info=True)
            return None
        finally:
            one_recording.release()
        return recording

    def _record(self, embeds_BD: Tensor, size: int, window: int) -> _Recording:
        embeds_BD = embeds_BD.new_zeros(size, embeds_BD.shape[1])
        positions_B = torch.full((size,), self._length, device=embeds_BD.device)
        attention = Padded(positions_B, window, self._decoder.cache_LRCKTE)
        aside = self._aside = self._aside or torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(aside):  # from which torch does not return when recording fails
            self._decoder.run(embeds_BD, attention)  # outside of the graph: libraries allocate what they need
            # Other threads load models and answer with them: what they do is no reason to end a recording.
            with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
                logits_BV = self._decoder.run(embeds_BD, attention)
        torch.cuda.current_stream().wait_stream(aside)
        self._pool = graph.pool()
        return _Recording(graph, embeds_BD, positions_B, logits_BV)


def _power_of_two(number: int) -> int:
    """The least one that is not below `number`."""
    return 1 << (number - 1).bit_length()
