"""A GPU whose memory is full, told in a way that a person can act on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from finetune.recipe import Recipe
from llava_app.errors import TrainingError


@contextmanager
def shortage_told(recipe: Recipe) -> Iterator[None]:
    """Within it, a lack of GPU memory is a TrainingError that names what would take less than the recipe does."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". GPU")[0].rstrip(".")
        raise TrainingError(
            f"{reason}. What was saved before is whole: if something else took the memory, end that and go on with "
            f"--resume. Else start a new run with {' or '.join(_smaller(recipe))}; python -m finetune plan says what "
            "that takes."
        ) from error


def _smaller(recipe: Recipe) -> list[str]:
    """Settings that take less memory, those that cost least first."""
    settings = [f"micro_batch={recipe.micro_batch // 2}"] * (recipe.micro_batch > 1)
    settings += ["gradient_checkpointing=true"] * (not recipe.gradient_checkpointing)
    if recipe.stage == "instruct" and recipe.quantise == "none":
        settings += ["quantise=4bit"] if recipe.lora_rank else ["lora_rank=128", "lora_rank=128 quantise=4bit"]
    return settings or ["a smaller base"]
