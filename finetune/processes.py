"""Many processes: what they count together, and what none may do alone where the model is shared out among them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from finetune.precision import ACCELERATE
from finetune.recipe import Recipe
from llava_app.errors import TrainingError


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process holds the whole model, so that every forward pass needs all of them."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def over_processes(accelerator: Accelerator, *counts: int) -> list[int]:
    """The sums of counts over all processes."""
    return accelerator.reduce(torch.tensor(counts, device=accelerator.device), "sum").tolist()


def idle_passes(accelerator: Accelerator, count: int) -> int:
    """How many forward passes more than this process's `count` another one makes, if that concerns this process."""
    if not is_sharded(accelerator):
        return 0
    return int(accelerator.gather(torch.tensor([count], device=accelerator.device)).max()) - count


def share_out(accelerator: Accelerator, model: nn.Module, recipe: Recipe) -> None:
    """Tell accelerate how to share the model out, if that is asked of it, before it is prepared.

    The layers of the language model are gathered one by one; tower, projector and embeddings all together, so that a
    process whose batch has no picture asks for the same as the others. Raises TrainingError for what cannot be shared
    out.
    """
    if not is_sharded(accelerator):
        return
    if recipe.quantise != "none" or recipe.optimizer != "adamw" or recipe.feature_cache:
        raise TrainingError(
            "A model that is shared out among devices learns without quantise, adamw8bit and feature_cache. Set "
            "quantise=none optimizer=adamw feature_cache=0, or launch with ddp.yaml: there every device has a copy."
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = [type(model.get_submodule("model.language_model.layers.0")).__name__]
        if accelerator.mixed_precision != "no":  # accelerate's own would round the loss, and sum gradients in 16 bits
            computed = next(dtype for dtype, name in ACCELERATE.items() if name == accelerator.mixed_precision)
            plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=torch.float32)
    else:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = recipe.micro_batch
        settings["gradient_clipping"] = recipe.gradient_clip


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within it, parts of a model that was shared out can be called without the whole."""
    if isinstance(model, FSDPModule):
        model.unshard()
    try:
        yield
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()
