"""Too little memory, told in a way that a person can act on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from finetune.recipe import Recipe
from llava_app.errors import TrainingError


def lighter(recipe: Recipe) -> str:
    """What makes a run take less memory than it does with `recipe`."""
    fields = [] if recipe.gradient_checkpointing else ["gradient_checkpointing=true"]
    if recipe.stage == "instruct" and recipe.quantise == "none":
        fields.append("quantise=4bit" if recipe.lora_rank else "quantise=4bit lora_rank=64")
    fields.append(f"micro_batch={recipe.micro_batch // 2}" if recipe.micro_batch > 1 else "a lower max_length")
    return (
        f"Set {', '.join(fields)}, or share the model among several GPUs; python -m finetune plan says what it takes."
    )


@contextmanager
def shortage_told(recipe: Recipe) -> Iterator[None]:
    """Within it, a lack of GPU memory is a TrainingError that names what would take less than the recipe does."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". GPU")[0].rstrip(".")
        raise TrainingError(
            f"{reason}. What was saved before is whole: if something else took the memory, end that and go on with "
            f"--resume. Else start a new run. {lighter(recipe)}"
        ) from error
