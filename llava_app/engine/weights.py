"""The matrices of a language model as the engine multiplies by them, made once for all models that share them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from llava_app.engine.matrices import Matrix, beside, join
from llava_app.memory import give_back

Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Layer:
    """The weights of a layer of Llama."""

    before_attention: Norm
    query_key_value: Matrix
    query_norm: Norm | None
    key_norm: Norm | None
    out: Matrix
    before_mlp: Norm
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True, eq=False)
class Matrices:
    """The weights of a language model of Llama's kin."""

    layers: tuple[Layer, ...]
    norm: Norm
    head: Matrix


class Weights:
    """A model on its device, which engines may share: engines of itself, and of adapters beside it."""

    def __init__(self, model: PreTrainedModel, *, eight_bit: bool = False) -> None:
        """`eight_bit`: few rows at a time are multiplied by 8-bit copies of a bfloat16 model's matrices, on a CPU."""
        self.model = model
        self._join = partial(join, eight_bit=eight_bit)

    def matrices(self, model: PreTrainedModel) -> Matrices:
        """Those of `model`, which is the model itself or one with adapters beside it.

        They take over the weights of the language model, which may not compute by itself afterwards.
        """
        if model is self.model:
            return self._matrices
        layers = zip(self._matrices.layers, model.model.language_model.layers, strict=True)
        return Matrices(tuple(_adapted(own, layer) for own, layer in layers), self._matrices.norm, self._matrices.head)

    @cached_property
    def _matrices(self) -> Matrices:
        language, tied = self.model.model.language_model, self.model.config.text_config.tie_word_embeddings
        layers = tuple(self._adopt(layer) for layer in language.layers)
        made = Matrices(layers, _norm(language.norm), self._join(self.model.lm_head, keep=tied))
        give_back()
        return made

    def _adopt(self, layer: Any) -> Layer:
        give_back()
        attention, mlp = layer.self_attn, layer.mlp
        has_norms = hasattr(attention, "q_norm")
        return Layer(
            _norm(layer.input_layernorm),
            self._join(attention.q_proj, attention.k_proj, attention.v_proj),
            _norm(attention.q_norm) if has_norms else None,
            _norm(attention.k_norm) if has_norms else None,
            self._join(attention.o_proj),
            _norm(layer.post_attention_layernorm),
            self._join(mlp.gate_proj, mlp.up_proj),
            self._join(mlp.down_proj),
        )


def _adapted(own: Layer, layer: Any) -> Layer:
    """A layer of the shared weights with what the adapters of `layer` add."""
    attention, mlp = layer.self_attn, layer.mlp
    return replace(
        own,
        query_key_value=beside(own.query_key_value, attention.q_proj, attention.k_proj, attention.v_proj),
        out=beside(own.out, attention.o_proj),
        gate_up=beside(own.gate_up, mlp.gate_proj, mlp.up_proj),
        down=beside(own.down, mlp.down_proj),
    )


def _norm(module: Any) -> Norm:
    """RMS norm (Zhang and Sennrich 2019). On a CPU torch makes eight operations of it, each with a cost of its own."""
    weight, epsilon = module.weight, module.variance_epsilon
    if weight.device.type != "cpu":
        return lambda hidden: F.rms_norm(hidden, weight.shape, weight, epsilon)
    floor = torch.tensor(epsilon * len(weight))
    scaled = weight.float() * len(weight) ** 0.5

    def norm(hidden: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
        normed = (hidden * scaled).mul_(torch.addcmul(floor, length, length).rsqrt_())
        return normed if normed.dtype == hidden.dtype else normed.to(hidden.dtype)

    return norm
