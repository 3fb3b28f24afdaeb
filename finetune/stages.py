"""What learns in each stage of training a LLaVA."""

from dataclasses import dataclass

from torch import nn
from transformers import LlavaForConditionalGeneration

from finetune.recipe import Recipe
from llava_app.errors import TrainingError


@dataclass(frozen=True)
class Stage:
    """One stage: the parts that learn, by their names in PARTS, and what it is for."""

    trains: tuple[str, ...]
    purpose: str


STAGES = {
    "align": Stage(trains=("projector",), purpose="the projector learns to put pictures into words' place"),
    "instruct": Stage(trains=("projector", "language_model"), purpose="both learn to answer about pictures"),
}

PARTS = {  # part: prefixes of its parameters in LlavaForConditionalGeneration
    "vision_tower": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.", "model.image_newline"),
    "language_model": ("model.language_model.", "lm_head."),
}


def learning_parts(recipe: Recipe) -> tuple[str, ...]:
    """The parts that learn: those of the stage that are not frozen, and the vision tower if it has a rate."""
    vision = ("vision_tower",) if recipe.vision_learning_rate else ()
    return tuple(part for part in STAGES[recipe.stage].trains if part != recipe.frozen) + vision


def apply_stage(model: LlavaForConditionalGeneration, recipe: Recipe) -> dict[str, int]:
    """Let exactly the recipe's parts learn and freeze the rest; returns the number of learning parameters per part.

    The vision tower learns as far as LLaVA reads it, a language model with adapters through them. The second layer of a
    linear projector is the identity and stays frozen (see `assemble`). Raises TrainingError when nothing would learn.
    """
    learning = dict.fromkeys(learning_parts(recipe), 0)
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad = part in learning and not _is_fixed(model, name)
        if parameter.requires_grad:
            learning[part] += parameter.numel()
    if not sum(learning.values()):
        raise TrainingError(f"Stage {recipe.stage} trains {', '.join(learning)}, but the model has no such weights.")
    return learning


def part_of(parameter_name: str) -> str:
    """The part that a parameter of LlavaForConditionalGeneration belongs to."""
    return next(part for part, prefixes in PARTS.items() if parameter_name.startswith(prefixes))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learning parameters by name, each tied one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def describe(model: nn.Module, learning: dict[str, int]) -> str:
    """One line: what learns, with counts, and how much is frozen."""
    total = sum(parameter.numel() for parameter in model.parameters())
    parts = ", ".join(f"{part} {count:,}" for part, count in learning.items())
    return f"learning: {parts} parameters; frozen: {total - sum(learning.values()):,}"


def used_layers(model: LlavaForConditionalGeneration) -> nn.ModuleList:
    """The layers of the vision tower up to the one whose output the projector reads."""
    layers, read = model.model.vision_tower.encoder.layers, model.config.vision_feature_layer
    return layers[: read if read >= 0 else len(layers) + 1 + read]


def _is_fixed(model: LlavaForConditionalGeneration, name: str) -> bool:
    part = part_of(name)
    if part == "language_model":
        return hasattr(model, "peft_config") and ".lora_" not in name
    if part == "vision_tower":
        behind = ("post_layernorm", "head.", *(f"encoder.layers.{n}." for n in _unused_layers(model)))
        return name.removeprefix("model.vision_tower.").startswith(behind)
    return (
        part == "projector"
        and model.config.projector_hidden_act == "linear"
        and name.startswith("model.multi_modal_projector.linear_2.")
    )


def _unused_layers(model: LlavaForConditionalGeneration) -> range:
    return range(len(used_layers(model)), len(model.model.vision_tower.encoder.layers))
