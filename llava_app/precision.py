"""In how many bits a model runs on which device of this machine."""

import logging
from functools import cache
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

from llava_app.errors import ModelError
from llava_app.memory import UNQUANTISED

PRECISIONS = ("auto", "4bit", "8bit", "bfloat16", "float16", "float32")

# Weights on disk below which a model counts as small: fewer bits on a GPU only cost conversions, a second CPU thread
# only costs handing over.
SMALL_BYTES = 200e6


logger = logging.getLogger(__name__)


def best_device() -> torch.device:
    """The one that computes fastest."""
    if torch.cuda.is_available() and not gpu_fault():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@cache
def gpu_fault() -> str | None:
    """Why the NVIDIA GPU cannot be used, if so: torch finds those too that it was not built for, or that are taken."""
    try:
        torch.ones(1, device="cuda").add(1).item()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        logger.warning("The GPU is not used: %s", reason)
        return reason
    return None


def choose_precision(asked: str, folder: Path | None, *, device: torch.device) -> tuple[str, str]:
    """The precision to load in, and why, as one sentence. Without a folder: for a published model, which is big.

    Raises ModelError for one that the device lacks.
    """
    if asked not in PRECISIONS:
        raise ModelError(f"There is no precision {asked}. Choose one of {', '.join(PRECISIONS)}.")
    if asked == "8bit" and device.type != "cpu":
        raise ModelError(f"8bit runs on CPUs only, and this machine has a {device.type.upper()} device. Choose 4bit.")
    if asked == "4bit" and device.type == "mps":
        raise ModelError("4bit runs on NVIDIA GPUs and CPUs, and this machine has an Apple GPU. Choose float16.")
    if asked != "auto":
        return asked, f"Runs in {asked} on the {device.type.upper()}, as asked."
    # Both are stable names since torch 2.6; the public torch.cpu.get_capabilities is younger than our lower bound.
    if device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return "8bit", "Runs on the CPU: reads in bfloat16, which it computes natively, and writes in 8 bit."
    if device.type == "cpu":
        return "float32", "Runs in float32 on the CPU, which has no native bfloat16."
    if folder and sum(file.stat().st_size for file in folder.glob("*.safetensors")) < SMALL_BYTES:
        return "float32", f"Runs in float32 on the {device.type.upper()}, which is fastest for a model this small."
    if device.type == "cuda":
        return "4bit", f"Runs in 4 bit on the GPU ({torch.cuda.get_device_name(device)}), which is fastest there."
    return "float16", "Runs in float16 on the Apple GPU, which has no 4 bit."


def quantisation(device: torch.device) -> BitsAndBytesConfig:
    """NF4 with quantised scales. Plain `load_in_4bit=True` would mean FP4 that computes in float32."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16 if old else torch.bfloat16,
        llm_int8_skip_modules=list(UNQUANTISED["4bit"]),
    )
