"""The optimiser of a run, and its learning rate at each step."""

import math

from torch import nn
from torch.optim import AdamW, Optimizer

from finetune.recipe import Recipe
from finetune.stages import part_of, trainable


def learning_rate_at(step: int, total: int, recipe: Recipe) -> float:
    """The rate of step 1…total: linear warm-up, then half a cosine towards zero."""
    warmup = math.ceil(total * recipe.warmup_ratio)
    if step <= warmup:
        return recipe.learning_rate * step / warmup
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup + 1)))


def make_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """AdamW over the learning weights. Each group's `scale` is its part's rate by `learning_rate`.

    Biases and norms do not decay.
    """
    rates = {"projector": recipe.projector_learning_rate, "vision_tower": recipe.vision_learning_rate}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, weight in trainable(model).items():
        rate = rates.get(part_of(name)) or recipe.learning_rate
        groups.setdefault((rate / recipe.learning_rate, weight.ndim > 1), []).append(weight)
    settings = [
        {"params": weights, "scale": scale, "weight_decay": recipe.weight_decay if decays else 0.0}
        for (scale, decays), weights in groups.items()
    ]
    if recipe.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(settings, lr=recipe.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    return AdamW(settings, lr=recipe.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Let every group learn at `rate`, times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
