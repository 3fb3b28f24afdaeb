"""A LoRA run's folder: adapters and a projector, which are put onto the base that they were trained on."""

import copy
import json
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel

from llava_app.checkpoints import Card, find, revision
from llava_app.errors import ModelError

ADAPTER = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in PEFT's files
PROJECTOR = f"{PREFIX}model.multi_modal_projector."
OTHER = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")  # settings that change the sum


class LowRank(nn.Module):
    """What an adapter adds to the outputs of a linear layer (Hu et al. 2021, equation 3); the scale is in `up_OR`."""

    def __init__(self, down_RI: Tensor, up_OR: Tensor) -> None:
        super().__init__()
        self.down_RI, self.up_OR = nn.Parameter(down_RI, requires_grad=False), nn.Parameter(up_OR, requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(F.linear(hidden, self.down_RI), self.up_OR)


def base_of(card: Card, folder: Path) -> Card | None:
    """The model that the adapter in `folder` belongs to; None where `folder` holds no adapter.

    It is looked for by its name, then where it lay when the adapter was trained. Raises ModelError without it, or when
    the card and the adapter's settings name two models.
    """
    if not (folder / ADAPTER).is_file():
        return None
    stored = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    found = [base for name in (card.base, stored) if name and (base := _found(name))]
    if not found:
        raise ModelError(
            f"{card.name} is an adapter of {card.base}, which is not here. Put it back, or merge by export."
        )
    if len({revision(Path(base.source)) for base in found}) > 1:
        raise ModelError(
            f"The card of {card.name} says that its base is {found[0].name}, and its {ADAPTER} says {found[1].name}. "
            "Copy the folder again, or train again."
        )
    return found[0]


def check_base(card: Card, base_folder: Path) -> None:
    """Raise ModelError unless the base is what the adapter was trained on."""
    found = revision(base_folder)
    if found != card.base_revision:
        raise ModelError(
            f"{card.name} was trained on {card.base} as it was then (revision {str(card.base_revision)[:12]}); the one "
            f"here is {found[:12]}. Put the old one back, or train again."
        )


def adapted(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model of an adapter: its own projector and adapters, unmerged, on weights that it shares with `base`.

    Raises ValueError when they do not fit, key by key.
    """
    model = _twin(base)
    weights = load_file(folder / WEIGHTS)
    projector = {name.removeprefix(PROJECTOR): value for name, value in weights.items() if name.startswith(PROJECTOR)}
    adapters = {name.removeprefix(PREFIX): value for name, value in weights.items() if not name.startswith(PROJECTOR)}
    scale = _scale(json.loads((folder / ADAPTER).read_text(encoding="utf-8")))
    for name in sorted({name.rsplit(".lora_", 1)[0] for name in adapters}):
        try:
            linear = model.get_submodule(name)
            down, up = adapters.pop(f"{name}.lora_A.weight"), scale * adapters.pop(f"{name}.lora_B.weight")
            _put_beside(linear, down, up, like=model.model.multi_modal_projector.linear_1.weight)
        except (AttributeError, KeyError, ValueError) as error:
            raise ValueError(f"its adapter of {name} does not fit the base") from error
    if adapters:
        raise ValueError(f"{len(adapters)} of its adapters do not fit the base, such as {min(adapters)}")
    try:
        if projector:  # one that was frozen is the base's
            model.model.multi_modal_projector.load_state_dict(projector)
    except RuntimeError as error:
        raise ValueError(f"its projector does not fit the base: {error}") from error
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def merge(model: PreTrainedModel) -> None:
    """Add the adapters to the weights beside them, as copies of the shared ones, and take them away."""
    for linear in [module for module in model.modules() if hasattr(module, "low_rank")]:
        linear.weight = nn.Parameter(linear.weight + linear.low_rank.up_OR @ linear.low_rank.down_RI)
        linear._forward_hooks.clear()
        del linear.low_rank


def _found(name: str) -> Card | None:
    try:
        return find(name)
    except ModelError:
        return None


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """A second model on the same weights, but for the projector."""
    own = {id(tensor) for tensor in model.model.multi_modal_projector.parameters()}
    tensors = (tensor for tensor in chain(model.parameters(), model.buffers()) if id(tensor) not in own)
    scales = (module.quant_state for module in model.modules() if hasattr(module, "quant_state"))  # of bitsandbytes
    return copy.deepcopy(model, {id(shared): shared for shared in chain(tensors, scales)})


def _scale(config: dict[str, Any]) -> float:
    strange = [name for name in OTHER if config.get(name)]
    if strange:
        raise ValueError(f"it was trained with {', '.join(strange)}, which this app does not know")
    return config["lora_alpha"] / config["r"]


def _put_beside(linear: Any, down_RI: Tensor, up_OR: Tensor, *, like: Tensor) -> None:
    """Let the layer add what the adapter says. Raises ValueError when it reads or writes something else."""
    if (linear.in_features, linear.out_features) != (down_RI.shape[1], len(up_OR)):
        raise ValueError(f"{tuple(down_RI.shape)} and {tuple(up_OR.shape)} beside {linear}")
    linear.low_rank = LowRank(down_RI.to(like), up_OR.to(like))
    linear.register_forward_hook(lambda module, inputs, output: output + module.low_rank(inputs[0]))
