"""In which numbers a run computes, and in which it keeps its weights.

What learns is kept in float32: in 16 bits, most steps would be smaller than the distance to the next number. What is
frozen is kept in the 16 bits that are computed in, so that it takes half the room and need not be converted each time.
"""

from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from finetune.recipe import Recipe
from finetune.stages import learning_parts, part_of
from llava_app.adapters import ADAPTER
from llava_app.checkpoints import Card
from llava_app.errors import TrainingError
from llava_app.outlook import config_of

ACCELERATE = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}  # its names; fp16 scales gradients


def has_bfloat16() -> bool:
    """Whether this machine computes in bfloat16: GPUs from compute capability 8.0 on, and every CPU."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def computed_in(recipe: Recipe, *, bfloat16: bool) -> torch.dtype:
    """The numbers of forward and backward pass: as the recipe says, or float16 where there is no bfloat16."""
    if recipe.precision == "float32":
        return torch.float32
    return torch.bfloat16 if bfloat16 else torch.float16


def loaded_in(base: Card, recipe: Recipe) -> str:
    """The precision to load a base in: as it is stored, so that nothing is rounded before `keep` copies what learns.

    Raises TrainingError for an adapter, which no further run can start from.
    """
    if (Path(base.source) / ADAPTER).is_file():
        raise TrainingError(
            f"{base.name} is an adapter on {base.base}. Merge them with python -m finetune export, then start from it."
        )
    if recipe.quantise != "none" or recipe.precision == "float32":
        return "float32" if recipe.quantise == "none" else recipe.quantise
    return str(config_of(base).dtype or torch.float32).removeprefix("torch.")


def keep(model: LlavaForConditionalGeneration, recipe: Recipe, computed: torch.dtype) -> None:
    """Put every weight that is not quantised into the numbers of `kept_in`, one by one."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(kept_in(name, recipe, computed))


def kept_in(name: str, recipe: Recipe, computed: torch.dtype) -> torch.dtype:
    """The numbers in which the weight of that name is kept, while forward and backward pass are `computed`.

    Adapters on a quantised model are bfloat16 (Dettmers et al. 2023, QLoRA), but for float16, whose scaled gradients
    need float32.
    """
    if ".lora_" in name:
        return computed if recipe.quantise != "none" and computed == torch.bfloat16 else torch.float32
    return torch.float32 if part_of(name) in whole_parts(recipe) else computed


def whole_parts(recipe: Recipe) -> set[str]:
    """The parts that learn themselves, not through adapters."""
    return set(learning_parts(recipe)) - ({"language_model"} if recipe.lora_rank else set())


def describe(recipe: Recipe, computed: torch.dtype) -> str:
    """One line for a person."""
    name = str(computed).removeprefix("torch.")
    if computed == torch.float32:
        return "computing in float32"
    why = ", with scaled gradients, since this GPU has no bfloat16" if computed == torch.float16 else ""
    half = "adapters and what is frozen" if kept_in(".lora_", recipe, computed) == computed else "what is frozen"
    return f"computing in {name}{why}; what learns is kept in float32, {half} in {name}"
