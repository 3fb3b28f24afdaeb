"""LoRA: small matrices beside those of the language model, which learn in their place; and the folder of such a run.

adapter_config.json and adapter_model.safetensors are PEFT's own format, with the projector in it as a whole unless it
was frozen: PEFT and `llava_app.loading` put them onto the base. PEFT, and bitsandbytes with it, takes as long to import
as torch itself: that is for runs that need it.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, ProcessorMixin

from finetune.precision import whole_parts
from finetune.recipe import Recipe
from finetune.stages import learning_parts, part_of

if TYPE_CHECKING:
    from peft import LoraConfig

TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"  # all matrices of its layers; "all-linear" has CLIP's too
ADAPTER = "default"
PREFIX = "base_model.model."  # of every name in PEFT's files


def add_adapters(model: LlavaForConditionalGeneration, recipe: Recipe) -> None:
    """Put untrained adapters, which change nothing yet, onto the language model."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(lora_config(recipe), model, adapter_name=ADAPTER)


def rest(model: nn.Module) -> None:
    """Evaluation mode, from which a model can go back to learning.

    On a CPU, bitsandbytes repacks a 4-bit layer for good at its first use in evaluation mode, and no gradient passes
    through it any more. So these layers, which compute the same in both modes, stay in training mode.
    """
    model.eval()
    if "bitsandbytes" not in sys.modules:  # then nothing is in 4 bits
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.training = True


def lora_config(recipe: Recipe, base: str | None = None) -> "LoraConfig":
    """PEFT's settings for a recipe, on the model `base`."""
    from peft import LoraConfig

    return LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=TARGETS,
        modules_to_save=["multi_modal_projector"] if base and "projector" in learning_parts(recipe) else None,
        base_model_name_or_path=base,
    )


def save_adapter(
    folder: Path,
    model: LlavaForConditionalGeneration,
    weights: dict[str, Tensor],
    *,
    recipe: Recipe,
    base: str,
    processor: ProcessorMixin,
) -> None:
    """Write adapters, and a projector that learned, as float32 safetensors, with the processor; the rest is `base`."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        PREFIX + name.replace(f".{ADAPTER}.", "."): weight.detach().float().cpu().contiguous()
        for name, weight in weights.items()
        if ".lora_" in name or part_of(name) in whole_parts(recipe)
    }
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    lora_config(recipe, base).save_pretrained(str(folder))
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
