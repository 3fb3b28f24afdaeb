"""Attention for several examples in one row: each token sees the earlier tokens of its own example only."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llava_app.errors import TrainingError

NAME = "packed"


def use_packed_attention(model: LlavaForConditionalGeneration, max_length: int) -> None:
    """Let the language model attend within examples of up to `max_length` tokens.

    Raises TrainingError where its own attention would look back on fewer tokens than that.
    """
    window = getattr(model.config.text_config, "sliding_window", None) or max_length
    if window < max_length:
        raise TrainingError(f"The model looks back on {window} tokens. Set max_length={window} or less.")
    AttentionInterface.register(NAME, packed_attention)
    model.model.language_model.set_attn_implementation(NAME)


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    lengths: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """(1, H, S, E) → (1, S, H, E), where the row holds examples of `lengths` tokens; without them, plain causality.

    One call per example: a mask for the whole row would cost S² instead of the sum of the squares, and keep the fused
    kernels (on a GPU, flash attention) from being used.
    """
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, None, **settings)
    parts = zip(*(states.split(lengths.tolist(), dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, None, **settings)[0] for part in parts], dim=1), None
