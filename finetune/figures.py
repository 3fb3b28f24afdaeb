"""What is measured of every step."""

from dataclasses import dataclass

import psutil
import torch
from accelerate import Accelerator

from finetune.flops import Device, known_peak
from finetune.recipe import Recipe


@dataclass(frozen=True)
class Figures:
    """One line of the log."""

    step: int
    loss: float  # per supervised token
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    samples_per_second: float
    elapsed: float  # seconds since this process began to train
    memory: float  # GB of the first process: on its GPU, at most so far; without one, its resident set
    mfu: float | None  # model FLOPs utilisation, see flops.py; None where the device's peak is not known


def peak_of(accelerator: Accelerator, recipe: Recipe) -> Device | None:
    """This process's device, if the log can say how well it is used; prints why not."""
    if not torch.cuda.is_available():
        accelerator.print("MFU is not logged: the peak of a processor is not published.")
        return None
    name = torch.cuda.get_device_name(accelerator.device)
    device = known_peak(name, recipe)
    if device is None:
        accelerator.print(f"MFU is not logged: no peak of {name} in {recipe.precision} is known.")
    return device


def memory_held() -> float:
    """GB, as in Figures."""
    on_gpu = torch.cuda.is_available()
    return (torch.cuda.max_memory_reserved() if on_gpu else psutil.Process().memory_info().rss) / 1e9
