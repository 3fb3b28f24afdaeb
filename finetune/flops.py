"""How much computing training is, and how much a device can do."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlavaConfig

from finetune.collate import Batch
from finetune.recipe import Recipe
from finetune.stages import learning_parts
from llava_app.errors import RecipeError
from llava_app.tiles import tiling_of


@dataclass(frozen=True)
class Device:
    """What one device has: dense matrix FLOP/s in the precision that training computes in, and bytes of memory."""

    name: str
    flops: float | None  # None where its peak is not known
    memory: float
    source: str
    bfloat16: bool = True


WITHOUT_BFLOAT16 = ("t4", "v100-16gb", "v100-32gb")
GPUS = {  # by name for the command line
    key: Device(name, teraflops * 1e12, gigabytes * 1e9, source, bfloat16=key not in WITHOUT_BFLOAT16)
    for key, name, teraflops, gigabytes, source in (
        (
            "b200",
            "NVIDIA B200",
            2250,
            180,
            "HGX B200 datasheet, bfloat16, a sixteenth of the figure with sparsity",
        ),
        ("h200", "NVIDIA H200", 989, 141, "H200 datasheet, bfloat16, half of the figure with sparsity"),
        ("h200-nvl", "NVIDIA H200 NVL", 835, 141, "H200 datasheet, bfloat16, half of the figure with sparsity"),
        ("h100", "NVIDIA H100 SXM", 989, 80, "H100 datasheet, bfloat16, half of the figure with sparsity"),
        ("h100-nvl", "NVIDIA H100 NVL", 835, 94, "H100 datasheet, bfloat16, half of the figure with sparsity"),
        ("h100-pcie", "NVIDIA H100 PCIe", 756, 80, "H100 datasheet, bfloat16, half of the figure with sparsity"),
        ("a100-80gb", "NVIDIA A100 80GB", 312, 80, "A100 datasheet, bfloat16"),
        ("a100-40gb", "NVIDIA A100 40GB", 312, 40, "A100 datasheet, bfloat16"),
        ("a40", "NVIDIA A40", 149.7, 48, "A40 datasheet, bfloat16"),
        ("a30", "NVIDIA A30", 165, 24, "A30 datasheet, bfloat16"),
        ("l40s", "NVIDIA L40S", 362, 48, "L40S datasheet, bfloat16, half of the figure with sparsity"),
        ("l40", "NVIDIA L40", 181, 48, "L40 datasheet, bfloat16, half of the figure with sparsity"),
        ("a10", "NVIDIA A10", 125, 24, "A10 datasheet, bfloat16"),
        ("l4", "NVIDIA L4", 121, 24, "L4 datasheet, bfloat16, half of the figure with sparsity"),
        ("rtx6000-ada", "NVIDIA RTX 6000 Ada", 364, 48, "its datasheet, a quarter of the FP8 figure with sparsity"),
        ("rtx-a6000", "NVIDIA RTX A6000", 154.8, 48, "its datasheet, half of the figure with sparsity"),
        ("rtx-a5000", "NVIDIA RTX A5000", 111.1, 24, "its datasheet, half of the figure with sparsity"),
        ("rtx5090", "NVIDIA RTX 5090", 209.5, 32, "RTX Blackwell whitepaper, bfloat16 summed in float32"),
        ("rtx5080", "NVIDIA RTX 5080", 112.6, 16, "RTX Blackwell whitepaper, bfloat16 summed in float32"),
        ("rtx5070ti", "NVIDIA RTX 5070 Ti", 87.9, 16, "RTX Blackwell whitepaper, bfloat16 summed in float32"),
        ("rtx5070", "NVIDIA RTX 5070", 61.7, 12, "RTX Blackwell whitepaper, bfloat16 summed in float32"),
        ("rtx4090", "NVIDIA RTX 4090", 165, 24, "Ada whitepaper, bfloat16 summed in float32"),
        ("rtx4080", "NVIDIA RTX 4080", 97.5, 16, "Ada whitepaper, bfloat16 summed in float32"),
        ("rtx4070ti", "NVIDIA RTX 4070 Ti", 80.2, 12, "twice its 40.1 of plain float32, as in the Ada whitepaper"),
        ("rtx4070", "NVIDIA RTX 4070", 58.3, 12, "twice its 29.15 of plain float32, as in the Ada whitepaper"),
        ("rtx3090", "NVIDIA RTX 3090", 71, 24, "GA102 whitepaper, bfloat16 summed in float32"),
        ("t4", "NVIDIA T4", 65, 16, "T4 datasheet, float16 (it has no bfloat16)"),
        ("v100-32gb", "NVIDIA V100 SXM2 32GB", 125, 32, "V100 datasheet, float16 (it has no bfloat16)"),
        ("v100-16gb", "NVIDIA V100 SXM2 16GB", 125, 16, "V100 datasheet, float16 (it has no bfloat16)"),
    )
}
REPORTED = {  # as the driver calls them, letter by letter: a V100 PCIe or an RTX 4090 D has another peak
    "NVIDIA B200": "b200",
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": "h200-nvl",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA A40": "a40",
    "NVIDIA A30": "a30",
    "NVIDIA L40S": "l40s",
    "NVIDIA L40": "l40",
    "NVIDIA A10": "a10",
    "NVIDIA L4": "l4",
    "NVIDIA RTX 6000 Ada Generation": "rtx6000-ada",
    "NVIDIA RTX A6000": "rtx-a6000",
    "NVIDIA RTX A5000": "rtx-a5000",
    "NVIDIA GeForce RTX 5090": "rtx5090",
    "NVIDIA GeForce RTX 5080": "rtx5080",
    "NVIDIA GeForce RTX 5070 Ti": "rtx5070ti",
    "NVIDIA GeForce RTX 5070": "rtx5070",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 4080": "rtx4080",
    "NVIDIA GeForce RTX 4070 Ti": "rtx4070ti",
    "NVIDIA GeForce RTX 4070": "rtx4070",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "Tesla T4": "t4",
    "Tesla V100-SXM2-32GB": "v100-32gb",
    "Tesla V100-SXM2-16GB": "v100-16gb",
}
AMPERE = 8  # the first compute capability with bfloat16


@dataclass(frozen=True)
class Row:
    """What one forward pass takes in: examples of equal length, together `tokens` long."""

    examples: int
    tokens: int  # the pictures' included
    pictures: int  # their tiles, where a model sees tiles
    supervised: int  # tokens that have a loss


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that FLOPs and activations follow from."""

    width: int
    inner: int
    layers: int
    queries: int  # width of all heads' queries
    keys: int  # width of all heads' keys
    vocabulary: int
    tower_width: int
    tower_inner: int
    tower_layers: int  # as many as LLaVA reads
    patches: int
    patch_numbers: int  # in one patch
    tiles: int  # of a picture, at most
    picture_tokens: int  # at most

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of one layer of the language model."""
        return 2 * self.width * (self.queries + self.keys) + 3 * self.width * self.inner

    @property
    def tower_layer_weights(self) -> int:
        """Weights of the matrices of one layer of the vision tower."""
        return 4 * self.tower_width**2 + 2 * self.tower_width * self.tower_inner

    @property
    def adapter_sides(self) -> int:
        """Inputs and outputs of these seven matrices: times the rank, the weights of their adapters."""
        return 3 * (self.width + self.inner) + 2 * (2 * self.width + self.queries + self.keys)

    @property
    def projector_weights(self) -> int:
        """Weights of the projector's two matrices."""
        return self.width * (self.tower_width + self.width)


def sizes(config: LlavaConfig) -> Sizes:
    """The sizes in a model's config."""
    text, vision = config.text_config, config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    keys = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    layer, tiling = int(config.vision_feature_layer), tiling_of(config)
    return Sizes(
        width=text.hidden_size,
        inner=text.intermediate_size,
        layers=text.num_hidden_layers,
        queries=head * text.num_attention_heads,
        keys=head * keys,
        vocabulary=text.vocab_size,
        tower_width=vision.hidden_size,
        tower_inner=vision.intermediate_size,
        tower_layers=vision.num_hidden_layers + 1 + layer if layer < 0 else layer,
        patches=(vision.image_size // vision.patch_size) ** 2,
        patch_numbers=3 * vision.patch_size**2,
        tiles=tiling.most_tiles,
        picture_tokens=tiling.most_tokens,
    )


def model_flops(size: Sizes, recipe: Recipe, row: Row) -> float:
    """FLOPs that one forward and backward pass must do, without recomputation: what MFU is counted by.

    A matrix of N weights costs 2 N per token forward, 2 N for the gradient of its input, and 2 N for its own where it
    learns; attention 4 times its width per pair of tokens forward and twice that backward (Chowdhery et al. 2022,
    PaLM, appendix B, where causality is not taken off). The vision tower does not count where its features are kept.
    """
    learning = learning_parts(recipe)
    full = "language_model" in learning and not recipe.lora_rank
    vision, projector = "vision_tower" in learning, "projector" in learning
    matrices = 2 * size.layer_weights * row.tokens
    attention = 4 * size.queries * row.tokens**2 / row.examples
    head = 2 * size.width * size.vocabulary * row.supervised
    adapters = 3 * 2 * recipe.lora_rank * size.adapter_sides * row.tokens
    language = size.layers * (matrices * (3 if full else 2) + attention * 3 + adapters) + head * (3 if full else 2)
    first, second = 1 + projector + vision, 1 + projector + (projector or vision)  # forward, weights, inputs
    bridge = 2 * row.pictures * size.patches * size.width * (first * size.tower_width + second * size.width)
    tower = 0.0 if recipe.feature_cache else _tower_flops(size, row) * (3 if vision else 1)
    return float(language + bridge + tower)


def step_flops(size: Sizes, recipe: Recipe, batches: Sequence[Batch]) -> float:
    """`model_flops` of batches whose examples differ in length, without their padding."""
    alone = sum(
        model_flops(size, recipe, Row(1, length, 0, 0)) for batch in batches for length in batch.lengths.tolist()
    )
    pictures = sum(len(batch.pixel_values) for batch in batches if batch.pixel_values is not None)
    return alone + model_flops(size, recipe, Row(1, 0, pictures, sum(batch.supervised for batch in batches)))


def mfu(flops: float, seconds: float, device: Device, *, devices: int = 1) -> float | None:
    """Model FLOPs utilisation: the share of the devices' peak that went into `model_flops` (PaLM, appendix B).

    None where the peak is not known.
    """
    return flops / (seconds * device.flops * devices) if device.flops else None


def known_peak(reported: str, recipe: Recipe) -> Device | None:
    """The device that its driver calls so, if its peak in the recipe's precision is known."""
    return GPUS.get(REPORTED.get(reported, "")) if recipe.precision == "bfloat16" else None


def find_device(name: str | None) -> Device:
    """A device by its name in GPUS; without a name this machine's, whose memory the driver tells.

    Raises RecipeError with the names there are.
    """
    if name is None and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        memory = float(found.total_memory)
        if found.name in REPORTED:
            return replace(GPUS[REPORTED[found.name]], name=found.name, memory=memory)
        return Device(found.name, None, memory, "its peak is not known here", bfloat16=found.major >= AMPERE)
    if name in (None, "cpu"):
        return _this_processor()
    if name not in GPUS:
        raise RecipeError(f"The device {name!r} is not known. Give one of {', '.join(GPUS)}, cpu.")
    return GPUS[name]


def _this_processor() -> Device:
    """This machine without a GPU; its peak is the best of five products of two matrices, in float32."""
    import psutil

    side, best = 1024, float("inf")
    factor: Any = torch.randn(side, side)
    for _ in range(5):
        began = time.perf_counter()
        factor @ factor
        best = min(best, time.perf_counter() - began)
    memory = float(psutil.virtual_memory().total)
    return Device("this processor", 2 * side**3 / best, memory, "measured just now with a product of two matrices")


def _tower_flops(size: Sizes, row: Row) -> float:
    """Forward, for all pictures."""
    seen = size.patches + 1
    layer = 2 * seen * size.tower_layer_weights
    attention = 4 * size.tower_width * seen**2
    patches = 2 * size.patches * size.patch_numbers * size.tower_width
    return float(row.pictures * (size.tower_layers * (layer + attention) + patches))
