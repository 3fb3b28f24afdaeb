"""The language model as the engine runs it: one step reads tokens of several conversations, each into its own row.

A step takes a prompt, a part of one, or one token of each conversation, in any mixture, without padding. Two decoders
do the same: `LlamaDecoder` with the fewest operations that a token can have, on the weights of Llama and its kin;
`AnyDecoder` on transformers' own layers, for every other language model.

Shapes: N tokens of a step, B conversations, D width, H heads, K heads of keys and values, E width of a head, T tokens
of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

LLAMA_KIN = ("llama", "mistral", "qwen2", "qwen3")
STEADY_ROPE = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on how long the conversation is

# With up to so many rows a bfloat16 matrix on a CPU is bound by reading it, so that 8 bits win; above it, arithmetic
# is what counts, and bfloat16 has the instructions for it.
FEW_ROWS = 4


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


def make_decoder(model: PreTrainedModel, *, rows: int, length: int, eight_bit: bool = False) -> Decoder:
    """The fastest decoder for the language model of a LLaVA, with `rows` conversations of up to `length` tokens.

    It takes over the weights of the language model, which may not compute by itself afterwards. `eight_bit`: few rows
    at a time are multiplied by 8-bit copies of a bfloat16 model's matrices, on a CPU.
    """
    if is_llama_kin(model.config.text_config, length) and model.device.type != "mps":
        return LlamaDecoder(model, rows=rows, length=length, eight_bit=eight_bit)
    return AnyDecoder(model, rows=rows)


def is_llama_kin(config: PretrainedConfig, length: int) -> bool:
    """Whether `LlamaDecoder` computes what this language model does, for conversations of up to `length` tokens."""
    layer_types = getattr(config, "layer_types", None)  # Mistral has none: its window is for every layer
    windowed = layer_types is None or "sliding_attention" in layer_types
    window = getattr(config, "sliding_window", None) or length
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in LLAMA_KIN
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in STEADY_ROPE
        and not (windowed and window < length)
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
            inputs_embeds=embeds_SD[None], position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return hidden_1SD[:, -1]

    def copy(self, source: int, target: int, length: int) -> None:
        copied = DynamicCache()
        for number, layer in enumerate(self._rows[source].layers):
            copied.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), number)
        self._rows[target] = copied


def _crop(cache: DynamicCache, length: int) -> None:
    """Keep the first `length` tokens. `crop` with a positive number raises in transformers 5.23."""
    for layer in cache.layers:  # each by itself: a step that failed has written into some of them only
        surplus = layer.get_seq_length() - length
        if surplus > 0:
            layer.crop(-surplus)


Matrix = Callable[[Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class _Layer:
    before_attention: Norm
    query_key_value: Matrix
    query_norm: Norm | None
    key_norm: Norm | None
    out: Matrix
    before_mlp: Norm
    gate_up: Matrix
    down: Matrix
    keys_RKTE: Tensor
    values_RKTE: Tensor


@dataclass(frozen=True, eq=False)
class _Step:
    """What every layer of one step needs to know."""

    spans: Sequence[Span]
    rows_N: Tensor
    positions_N: Tensor
    cos_N1E: Tensor
    sin_N1E: Tensor  # its first half negated, so that rotating is rolling
    masks: list[Tensor | None]  # (S, T) bool of each span; None where it needs none


class LlamaDecoder:
    """Llama, Mistral, Qwen2 and Qwen3: keys and values preallocated, matrices that read the same input joined."""

    def __init__(self, model: PreTrainedModel, *, rows: int, length: int, eight_bit: bool = False) -> None:
        language, config = model.model.language_model, model.config.text_config
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._width = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._device = model.device
        matrix = partial(join, eight_bit=eight_bit)
        shape = (rows, self._kv_heads, length, self._width)
        self._layers = [self._adopt(layer, shape, matrix) for layer in language.layers]
        self._norm, self._head = _norm(language.norm), matrix(model.lm_head, keep=config.tie_word_embeddings)
        positions = torch.arange(length, device=self._device)[None]
        some = torch.empty(0, dtype=model.dtype, device=self._device)
        cos, sin = (table[0] for table in language.rotary_emb(some, positions))
        first_half = torch.arange(self._width, device=self._device) < self._width // 2
        self._cos_TE, self._sin_TE = cos, torch.where(first_half, -sin, sin)

    def _adopt(self, layer: Any, shape: tuple[int, ...], matrix: Callable[..., Matrix]) -> _Layer:
        attention, mlp, dtype = layer.self_attn, layer.mlp, layer.input_layernorm.weight.dtype
        has_norms = hasattr(attention, "q_norm")
        return _Layer(
            _norm(layer.input_layernorm),
            matrix(attention.q_proj, attention.k_proj, attention.v_proj),
            _norm(attention.q_norm) if has_norms else None,
            _norm(attention.k_norm) if has_norms else None,
            matrix(attention.o_proj),
            _norm(layer.post_attention_layernorm),
            matrix(mlp.gate_proj, mlp.up_proj),
            matrix(mlp.down_proj),
            torch.empty(shape, dtype=dtype, device=self._device),
            torch.empty(shape, dtype=dtype, device=self._device),
        )

    def step(self, embeds_ND: Tensor, spans: Sequence[Span]) -> Tensor:
        step = self._prepare(spans)
        hidden_ND = embeds_ND
        for layer in self._layers:
            hidden_ND = self._run(layer, hidden_ND, step)
        if len(hidden_ND) > len(spans):
            ends = torch.tensor([span.length for span in spans], device=self._device).cumsum(0) - 1
            hidden_ND = hidden_ND[ends]
        return self._head(self._norm(hidden_ND))

    def copy(self, source: int, target: int, length: int) -> None:
        for layer in self._layers:
            for cache in (layer.keys_RKTE, layer.values_RKTE):
                cache[target, :, :length] = cache[source, :, :length]

    def _prepare(self, spans: Sequence[Span]) -> _Step:
        rows = [span.row for span in spans for _ in range(span.length)]
        positions = [position for span in spans for position in range(span.start, span.end)]
        rows_N, positions_N = torch.tensor([rows, positions], device=self._device)
        cos_N1E, sin_N1E = self._cos_TE[positions_N][:, None], self._sin_TE[positions_N][:, None]
        masks = [self._mask(span) for span in spans]
        return _Step(spans, rows_N, positions_N, cos_N1E, sin_N1E, masks)

    def _mask(self, span: Span) -> Tensor | None:
        if span.length == 1 or span.start == 0:
            return None
        return torch.ones(span.length, span.end, dtype=torch.bool, device=self._device).tril(span.start)

    def _run(self, layer: _Layer, hidden_ND: Tensor, step: _Step) -> Tensor:
        joined = layer.query_key_value(layer.before_attention(hidden_ND))
        rotated_NHE, values_NKE = joined.view(len(joined), -1, self._width).split(
            (self._heads + self._kv_heads, self._kv_heads), dim=1
        )
        if layer.query_norm and layer.key_norm:
            queries_NHE, keys_NKE = rotated_NHE.split((self._heads, self._kv_heads), dim=1)
            rotated_NHE = torch.cat((layer.query_norm(queries_NHE), layer.key_norm(keys_NKE)), dim=1)
        rolled_NHE = rotated_NHE.roll(self._width // 2, dims=-1)
        rotated_NHE = torch.addcmul(rotated_NHE * step.cos_N1E, rolled_NHE, step.sin_N1E)
        layer.keys_RKTE[step.rows_N, :, step.positions_N] = rotated_NHE[:, self._heads :]
        layer.values_RKTE[step.rows_N, :, step.positions_N] = values_NKE
        hidden_ND = hidden_ND + layer.out(self._attend(layer, rotated_NHE[:, : self._heads], step))
        gate, up = layer.gate_up(layer.before_mlp(hidden_ND)).chunk(2, dim=-1)
        return hidden_ND + layer.down(F.silu(gate) * up)

    def _attend(self, layer: _Layer, queries_NHE: Tensor, step: _Step) -> Tensor:
        """(N, H·E): every span attends to its own row, so that nothing is padded."""
        spans = zip(queries_NHE.split([span.length for span in step.spans]), step.spans, step.masks, strict=True)
        attended = [self._attend_one(layer, queries_SHE, span, mask) for queries_SHE, span, mask in spans]
        return attended[0] if len(attended) == 1 else torch.cat(attended)

    def _attend_one(self, layer: _Layer, queries_SHE: Tensor, span: Span, mask: Tensor | None) -> Tensor:
        keys_1KTE = layer.keys_RKTE[span.row : span.row + 1, :, : span.end]
        values_1KTE = layer.values_RKTE[span.row : span.row + 1, :, : span.end]
        if span.length == 1:  # heads that share keys and values stand in the place of tokens: no copies of either
            queries_1KGE = queries_SHE.view(1, self._kv_heads, -1, self._width)
            return F.scaled_dot_product_attention(queries_1KGE, keys_1KTE, values_1KTE).reshape(1, -1)
        attended_1HSE = F.scaled_dot_product_attention(
            queries_SHE.transpose(0, 1)[None],
            keys_1KTE,
            values_1KTE,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self._heads != self._kv_heads,
        )
        return attended_1HSE[0].transpose(0, 1).flatten(1)


def _norm(module: Any) -> Norm:
    weight, epsilon = module.weight, module.variance_epsilon
    return lambda hidden: F.rms_norm(hidden, weight.shape, weight, epsilon)


def join(*linears: nn.Linear, eight_bit: bool = False, keep: bool = False) -> Matrix:
    """One multiplication in place of several linear layers that read the same input; their outputs side by side.

    The layers give up their weights to it, in float32 for views of the same memory, in bfloat16 on a CPU for nothing;
    with `keep`, for weights that others share, they keep them. Quantised layers run as they are.
    """
    if any(type(linear) is not nn.Linear for linear in linears):
        return lambda hidden_ND: torch.cat([linear(hidden_ND) for linear in linears], dim=-1)
    weight_OI = _side_by_side([linear.weight.data for linear in linears])
    bias_O = None if linears[0].bias is None else _side_by_side([linear.bias.data for linear in linears])
    on_cpu = weight_OI.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if on_cpu and weight_OI.dtype == torch.bfloat16:
        left, multiply = weight_OI.new_empty(0, weight_OI.shape[1]), _packed(weight_OI, bias_O, eight_bit=eight_bit)
    elif on_cpu and weight_OI.dtype == torch.float32:
        weight_IO = weight_OI.t().contiguous()
        left, multiply = weight_IO.t(), _transposed(weight_IO, bias_O)
    else:
        left, multiply = weight_OI, lambda hidden_ND: F.linear(hidden_ND, weight_OI, bias_O)
    if not keep:
        sizes = [len(linear.weight) if len(left) else 0 for linear in linears]
        for linear, part_OI in zip(linears, left.split(sizes), strict=True):
            linear.weight.data = part_OI
    return multiply


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _transposed(weight_IO: Tensor, bias_O: Tensor | None) -> Matrix:
    """torch.mm takes 0.4 to 0.7 times as long as the linear function (1 to 8 rows, float32, AVX-512)."""
    if bias_O is None:
        return lambda hidden_ND: torch.mm(hidden_ND, weight_IO)
    return lambda hidden_ND: torch.addmm(bias_O, hidden_ND, weight_IO)


def _packed(weight_OI: Tensor, bias_O: Tensor | None, *, eight_bit: bool) -> Matrix:
    """In the order that the CPU's bfloat16 instructions want, found once instead of at every call: half the time.

    `eight_bit`: few rows are multiplied by 8-bit copies instead, with one scale for each output.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
    if not eight_bit:
        return lambda hidden_ND: torch.ops.mkldnn._linear_pointwise(hidden_ND, packed, bias_O, "none", [], "")
    scale_O = (weight_OI.abs().amax(dim=1).float() / 127).clamp(min=1e-12).to(weight_OI.dtype)
    eight_OI = (weight_OI.float() / scale_O.float()[:, None]).round().clamp(-127, 127).to(torch.int8)

    def multiply(hidden_ND: Tensor) -> Tensor:
        if len(hidden_ND) > FEW_ROWS:
            return torch.ops.mkldnn._linear_pointwise(hidden_ND, packed, bias_O, "none", [], "")
        product_NO = torch._weight_int8pack_mm(hidden_ND, eight_OI, scale_O)
        return product_NO if bias_O is None else product_NO + bias_O

    return multiply
