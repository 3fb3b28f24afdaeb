"""Several examples in one row: each token sees its own example only, and what teaches nothing is not computed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaForConditionalGeneration, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llava_app.engine.decoder import LLAMA_KIN
from llava_app.errors import TrainingError

NAME = "packed"


def check_length(config: PretrainedConfig, max_length: int) -> None:
    """Raises TrainingError where the language model was not made for examples of `max_length` tokens."""
    text = config.text_config
    window = getattr(text, "sliding_window", None) or max_length
    if window < max_length:
        raise TrainingError(f"The model looks back on {window} tokens. Set max_length={window} or less.")
    positions = text.max_position_embeddings
    if positions < max_length:
        raise TrainingError(
            f"max_length is {max_length}, and the model was made for {positions} tokens. Set max_length={positions} "
            "or less."
        )


def use_packing(model: LlavaForConditionalGeneration, max_length: int) -> None:
    """Let the language model read rows of several examples, each of up to `max_length` tokens.

    It then takes `parts` and `taught` (see `collate.Batch`), and returns hidden states at the taught tokens only,
    (1, T, D). Raises TrainingError as `check_length`.
    """
    check_length(model.config, max_length)
    AttentionInterface.register(NAME, packed_attention)
    model.model.language_model.set_attn_implementation(NAME)
    last = model.model.language_model.layers[-1]
    trimmed = _llama_layer if model.config.text_config.model_type in LLAMA_KIN else _any_layer
    last.forward = partial(trimmed, last, last.forward)


def _any_layer(
    layer: nn.Module, whole: Any, hidden: Tensor, *, taught: Tensor | None = None, **settings: Any
) -> Tensor:
    """The last layer of any language model, at the taught tokens where a row is packed."""
    hidden = whole(hidden, **settings)
    return hidden if taught is None else hidden[:, taught]


def _llama_layer(layer: Any, whole: Any, hidden: Tensor, *, taught: Tensor | None = None, **settings: Any) -> Tensor:
    """The last layer of Llama and its kin. Of the tokens that teach nothing, only keys and values are of use in it."""
    if taught is None:
        return whole(hidden, **settings)
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), queries=taught, **settings)
    hidden_1TD = hidden[:, taught] + attended[:, taught]
    return hidden_1TD + layer.mlp(layer.post_attention_layernorm(hidden_1TD))


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    parts: Tensor | None = None,
    queries: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """(1, H, S, E) → (1, S, H, E), where the row has the `parts` of a packed batch; without them, plain causality.

    Zeros where a token is not among `queries`, (T,), if they are given. One call per example: a mask for the whole row
    would cost S² instead of the sum of the squares, and keep the fused kernels (on a GPU, flash attention) from being
    used. A CPU attends in float32, because its backward pass takes twice as long in bfloat16.
    """
    attend = partial(sdpa_attention_forward, module, **settings)
    if parts is None:
        return attend(query, key, value, None)
    states = [some.float() if some.device.type == "cpu" else some for some in (query, key, value)]
    with torch.autocast("cpu", enabled=False):  # that of a GPU stays on
        if queries is None:
            attended = _attend_within(attend, states, parts)
        else:
            attended = _attend_at(attend, states, parts, queries)
    return attended.to(value.dtype), None


def _attend_within(attend: Callable[..., Any], states: Sequence[Tensor], parts: Tensor) -> Tensor:
    """Each example by itself, with what all begin with before it. That is kept from the first example only."""
    beginning, *examples = zip(*(some.split(parts.tolist(), dim=2) for some in states), strict=True)
    attended: list[Tensor] = []
    for example in examples:
        whole = (torch.cat(pair, dim=2) for pair in zip(beginning, example, strict=True))
        attended.append(attend(*whole, None)[0][:, int(parts[0]) if attended else 0 :])
    return torch.cat(attended, dim=1)


def _attend_at(attend: Callable[..., Any], states: Sequence[Tensor], parts: Tensor, queries: Tensor) -> Tensor:
    """As above, for some of the tokens, none of which is in the beginning that all share."""
    query, *seen = states
    beginning, *examples = zip(*(some.split(parts.tolist(), dim=2) for some in seen), strict=True)
    ends = parts.cumsum(0)
    counts = torch.searchsorted(queries.cpu(), ends).diff().tolist()
    asking, places = query[:, :, queries].split(counts, dim=2), queries.split(counts)
    attended = []
    for example, rows, asked, end in zip(examples, asking, places, ends[1:], strict=True):
        keys, values = (torch.cat(pair, dim=2) for pair in zip(beginning, example, strict=True))
        before = asked - end + keys.shape[2]  # how many tokens of its example stand before it
        mask = torch.arange(keys.shape[2], device=keys.device) <= before[:, None]
        attended.append(attend(rows, keys, values, mask[None, None])[0])
    taught = torch.cat(attended, dim=1)
    return taught.new_zeros(query.transpose(1, 2).shape).index_copy(1, queries, taught)
