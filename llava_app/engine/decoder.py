"""The language model as the engine runs it: one step reads tokens of several conversations, each into its own row.

A step takes a prompt, a part of one, or one token of each conversation, in any mixture, without padding. Two decoders
do the same: `LlamaDecoder` with the fewest operations that a token can have, on the weights of Llama and its kin;
`AnyDecoder` on transformers' own layers, for every other language model.

Shapes: N tokens of a step, B conversations, D width, H heads, K heads of keys and values, E width of a head, T tokens
of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from llava_app.engine.replay import Replay
from llava_app.engine.weights import Layer, Matrices, Weights
from llava_app.memory import zeros

LLAMA_KIN = ("llama", "mistral", "qwen2", "qwen3")
STEADY_ROPE = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on how long the conversation is


@dataclass(frozen=True)
class Span:
    """What one conversation reads in a step: `length` tokens into `row`, which holds `start` tokens already."""

    row: int
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class Decoder(Protocol):
    """Keys and values of as many conversations as it has rows, and the step that reads more."""

    def step(self, embeds_ND: Tensor, spans: Sequence[Span]) -> Tensor:
        """Read the tokens of all spans, one after the other in `embeds_ND`; logits_BV after the last of each span."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Give row `target` the first `length` tokens of row `source`."""
        ...


def make_decoder(weights: Weights, model: PreTrainedModel | None = None, *, rows: int, length: int) -> Decoder:
    """The fastest decoder for the language model of a LLaVA, with `rows` conversations of up to `length` tokens.

    `model` is one with adapters beside `weights`; without it, it is the model that the weights are of.
    """
    model = model or weights.model
    if is_llama_kin(model.config.text_config) and model.device.type != "mps":
        return LlamaDecoder(model, weights.matrices(model), rows=rows, length=length)
    return AnyDecoder(model, rows=rows)


def is_llama_kin(config: PretrainedConfig) -> bool:
    """Whether `LlamaDecoder` computes what this language model does, as far as its positions go."""
    layer_types = getattr(config, "layer_types", None)  # Mistral has none: its window is for every layer
    windowed = layer_types is None or "sliding_attention" in layer_types
    positions = config.max_position_embeddings
    window = getattr(config, "sliding_window", None) or positions
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in LLAMA_KIN
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in STEADY_ROPE
        and not (windowed and window < positions)
    )


class AnyDecoder:
    """Any language model of transformers, one conversation after the other."""

    def __init__(self, model: PreTrainedModel, *, rows: int) -> None:
        self._model = model
        self._rows = [DynamicCache() for _ in range(rows)]

    def step(self, embeds_ND: Tensor, spans: Sequence[Span]) -> Tensor:
        last = [
            self._read(embeds_SD, span)
            for embeds_SD, span in zip(embeds_ND.split([span.length for span in spans]), spans, strict=True)
        ]
        return self._model.lm_head(torch.cat(last))

    def _read(self, embeds_SD: Tensor, span: Span) -> Tensor:
        cache = self._rows[span.row]
        _crop(cache, span.start)
        positions = torch.arange(span.start, span.end, device=embeds_SD.device)[None]
        hidden_1SD = self._model.model.language_model(
            inputs_embeds=embeds_SD[None], position_ids=positions, cache=cache, use_cache=True
        ).last_hidden_state
        return hidden_1SD[:, -1]

    def copy(self, source: int, target: int, length: int) -> None:
        copied = DynamicCache()
        for number, layer in enumerate(self._rows[source].layers):
            copied.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), number)
        self._rows[target] = copied


def _crop(cache: DynamicCache, length: int) -> None:
    """Keep the first `length` tokens. `crop` with a positive number raises in transformers 5."""
    for layer in cache.layers:  # each by itself: a step that failed has written into some of them only
        surplus = layer.get_seq_length() - length
        if surplus > 0:
            layer.crop(-surplus)


class Attention(Protocol):
    """Where the tokens of one step go, and what they attend to."""

    positions_N: Tensor

    def attend(self, layer: int, queries_NHE: Tensor, pairs_NCKE: Tensor) -> Tensor:
        """Keep keys and values in their rows; (N, H·E), what each token gathers from its own row."""
        ...


class Ragged:
    """Every span attends to its own row, so that nothing is padded."""

    def __init__(self, spans: Sequence[Span], cache_LRCKTE: Tensor) -> None:
        device = cache_LRCKTE.device
        rows = [span.row for span in spans for _ in range(span.length)]
        positions = [position for span in spans for position in range(span.start, span.end)]
        self._rows_N, self.positions_N = torch.tensor([rows, positions], device=device)
        self._spans = spans
        self._lengths = [span.length for span in spans]
        self._masks = [_mask(span, device) for span in spans]
        self._cache = cache_LRCKTE.unbind()
        # Cut once for all layers: a view costs as much as a small addition.
        seen = [cache_LRCKTE[:, span.row : span.row + 1, :, :, : span.end].unbind(2) for span in spans]
        self._keys = list(zip(*(keys_L1KTE.unbind() for keys_L1KTE, _ in seen), strict=True))
        self._values = list(zip(*(values_L1KTE.unbind() for _, values_L1KTE in seen), strict=True))

    def attend(self, layer: int, queries_NHE: Tensor, pairs_NCKE: Tensor) -> Tensor:
        self._cache[layer][self._rows_N, :, :, self.positions_N] = pairs_NCKE
        queries = queries_NHE.split(self._lengths) if len(self._spans) > 1 else (queries_NHE,)
        parts = zip(queries, self._keys[layer], self._values[layer], self._masks, strict=True)
        attended = [_attend(*part) for part in parts]
        return attended[0] if len(attended) == 1 else torch.cat(attended)


def _mask(span: Span, device: torch.device) -> Tensor | None:
    """(S, T) bool of what the span may see; None where all of it, or where plain causality says so."""
    if span.length == 1 or span.start == 0:
        return None
    return torch.ones(span.length, span.end, dtype=torch.bool, device=device).tril(span.start)


def _attend(queries_SHE: Tensor, keys_1KTE: Tensor, values_1KTE: Tensor, mask: Tensor | None) -> Tensor:
    heads, kv_heads = queries_SHE.shape[1], keys_1KTE.shape[1]
    if len(queries_SHE) == 1:  # heads that share keys and values stand in the place of tokens: no copies of either
        queries_1KGE = queries_SHE.view(1, kv_heads, -1, queries_SHE.shape[-1])
        return F.scaled_dot_product_attention(queries_1KGE, keys_1KTE, values_1KTE).view(1, -1)
    attended_1HSE = F.scaled_dot_product_attention(
        queries_SHE.transpose(0, 1)[None],
        keys_1KTE,
        values_1KTE,
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=heads != kv_heads,
    )
    return attended_1HSE[0].transpose(0, 1).flatten(1)


class LlamaDecoder:
    """Llama, Mistral, Qwen2 and Qwen3: keys and values preallocated, matrices that read the same input joined."""

    def __init__(self, model: PreTrainedModel, matrices: Matrices, *, rows: int, length: int) -> None:
        config = model.config.text_config
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._width = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._device = model.device
        replays = self._device.type == "cuda"
        self._replay = Replay(self, rows=rows, length=length) if replays else None
        self.place = list(range(rows))  # where in the cache a row lies; replaying moves them
        length += replays
        self._layers, self._norm, self._head = matrices.layers, matrices.norm, matrices.head
        shape = (len(self._layers), rows, 2, self._kv_heads, length, self._width)  # 2: keys and values
        # A masked token weighs 0, but 0 x NaN is NaN.
        self.cache_LRCKTE = zeros(shape, model.dtype, self._device)
        rotary = model.model.language_model.rotary_emb
        self._cos_TXE, self._sin_TXE = self._rotation(rotary, length, model.dtype)

    def _rotation(self, rotary: Any, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What a token's heads are multiplied by to turn them to its position, and their halves changed over. Values,
        which lie beside queries and keys, stay as they are."""
        positions = torch.arange(length, device=self._device)[None]
        cos, sin = (table[0] for table in rotary(torch.empty(0, dtype=dtype, device=self._device), positions))
        first_half = torch.arange(self._width, device=self._device) < self._width // 2
        turned, kept = (length, self._heads + self._kv_heads, -1), (length, self._kv_heads, self._width)
        cos_TXE = torch.cat((cos[:, None].expand(turned), cos.new_ones(kept)), dim=1)
        sin_TXE = torch.cat((torch.where(first_half, -sin, sin)[:, None].expand(turned), sin.new_zeros(kept)), dim=1)
        return cos_TXE, sin_TXE

    def step(self, embeds_ND: Tensor, spans: Sequence[Span]) -> Tensor:
        if self._replay and all(span.length == 1 for span in spans):
            logits_BV = self._replay.step(embeds_ND, spans)
            if logits_BV is not None:
                return logits_BV
        if self._replay:
            spans = [replace(span, row=self.place[span.row]) for span in spans]
        ends = None
        if len(embeds_ND) > len(spans):
            ends = torch.tensor([span.length for span in spans], device=self._device).cumsum(0) - 1
        return self.run(embeds_ND, Ragged(spans, self.cache_LRCKTE), ends)

    def run(self, embeds_ND: Tensor, attention: Attention, ends_B: Tensor | None = None) -> Tensor:
        """Logits after the tokens `ends_B`, or after all of them."""
        cos_NXE, sin_NXE = self._cos_TXE[attention.positions_N], self._sin_TXE[attention.positions_N]
        hidden_ND = embeds_ND
        for number, layer in enumerate(self._layers):
            turned_NXE = self._project(layer, hidden_ND, cos_NXE, sin_NXE)
            pairs_NCKE = turned_NXE[:, self._heads :].view(-1, 2, self._kv_heads, self._width)
            hidden_ND = hidden_ND + layer.out(attention.attend(number, turned_NXE[:, : self._heads], pairs_NCKE))
            gate, up = layer.gate_up(layer.before_mlp(hidden_ND)).chunk(2, dim=-1)
            hidden_ND = hidden_ND + layer.down(F.silu(gate).mul_(up))
        return self._head(self._norm(hidden_ND if ends_B is None else hidden_ND[ends_B]))

    def _project(self, layer: Layer, hidden_ND: Tensor, cos_NXE: Tensor, sin_NXE: Tensor) -> Tensor:
        """Queries, keys and values side by side in heads (N, X, E), turned to their positions."""
        joined_NXE = layer.query_key_value(layer.before_attention(hidden_ND)).view(cos_NXE.shape)
        if layer.query_norm and layer.key_norm:
            queries, keys, values = joined_NXE.split((self._heads, self._kv_heads, self._kv_heads), dim=1)
            joined_NXE = torch.cat((layer.query_norm(queries), layer.key_norm(keys), values), dim=1)
        return torch.addcmul(joined_NXE * cos_NXE, joined_NXE.roll(self._width // 2, dims=-1), sin_NXE)

    def copy(self, source: int, target: int, length: int) -> None:
        source, target = self.place[source], self.place[target]
        self.cache_LRCKTE[:, target, :, :, :length] = self.cache_LRCKTE[:, source, :, :, :length]

    def swap(self, one: int, other: int) -> None:
        """Let two rows lie in each other's places."""
        places = torch.tensor([self.place[one], self.place[other]], device=self._device)
        for cache_RCKTE in self.cache_LRCKTE:  # one by one: no plan has room for copies of two whole rows
            cache_RCKTE[places] = cache_RCKTE[places.flip(0)]
        self.place[one], self.place[other] = self.place[other], self.place[one]
