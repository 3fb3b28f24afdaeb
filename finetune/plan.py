"""python -m finetune plan RECIPE: memory by part and expected time, before anything is loaded."""

import argparse
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, ProcessorMixin

from finetune import precision
from finetune.data.mixture import open_data, picture_root
from finetune.flops import GPUS, Device, Row, Sizes, find_device, sizes
from finetune.packing import check_length
from finetune.precision import computed_in, kept_in, whole_parts
from finetune.recipe import Recipe, inherit, named_recipe
from finetune.rows import Rows, assumed, measured
from finetune.shortage import lighter
from finetune.stages import part_of
from llava_app.checkpoints import Card, find
from llava_app.hub import here
from llava_app.loading import processor_of
from llava_app.memory import need
from llava_app.outlook import config_of
from llava_app.processors import make_processor

USUAL = {"align": 24, "instruct": 200}  # tokens of text of one example: about those of LLaVA-1.5's own data
UTILISATION = 0.27  # of the peak: LLaVA-1.5's published hours on A100s come to 24 to 30 % MFU
CUDA_CONTEXT = 0.6e9  # of the driver, cuBLAS and the allocator's rounding; differs by device and driver
SOFTMAX = 12  # bytes of each logit at most: float32 logits, their log-softmax, its gradient


def _shape(width: int, inner: int, layers: int, *, pixels: int) -> LlavaConfig:
    """CLIP ViT-L/14 and a Vicuna."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=pixels,
        patch_size=14,
        projection_dim=768,
    )
    heads = width // 128
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=32064,
        max_position_embeddings=4096,
    )
    return LlavaConfig(vision_config=vision, text_config=text)


SHAPES = {  # known without their files
    "7b": (4096, 11008, 32, 336),
    "13b": (5120, 13824, 40, 336),
    "v1-7b": (4096, 11008, 32, 224),
}
HUB = {"llava-hf/llava-1.5-7b-hf": "7b", "llava-hf/llava-1.5-13b-hf": "13b"}


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes on one device, by part, and at most at the same time."""

    weights: float
    gradients: float
    optimiser: float
    activations: float
    logits: float
    copies: float  # of float32 weights in the 16 bits that are computed in
    context: float
    peak: float


def plan_memory(config: LlavaConfig, recipe: Recipe, row: Row, *, gpu: bool, bfloat16: bool = True) -> Memory:
    """What steps of `recipe` take whose forward passes are `row`, on one device that holds the whole model.

    `bfloat16`: whether the device computes in it; else adapters on a quantised model are kept in float32.

    Of gradients and activations the one grows while the other shrinks: they count together only where several
    forward passes make a step, and but for what one layer keeps where layers are recomputed.
    """
    size = sizes(config)
    stored, learning = _weights(config, recipe)
    number = kept_in(".lora_", recipe, computed_in(recipe, bfloat16=bfloat16)).itemsize
    adapters = recipe.lora_rank * size.adapter_sides * size.layers
    gradients = 4.0 * learning + number * adapters
    states = 2.0 * (learning + adapters) if recipe.optimizer == "adamw8bit" else 8.0 * learning + 2 * number * adapters
    weights = stored + number * adapters
    per_layer = _kept_by_a_layer(size, recipe, gpu=gpu) * row.tokens
    if recipe.gradient_checkpointing:
        activations = _number(recipe) * size.width * row.tokens * size.layers + per_layer
    else:
        activations = per_layer * size.layers
    activations += _kept_by_the_tower(size, recipe, row) + _outside_the_layers(size, recipe, row)
    logits = float(SOFTMAX * row.supervised * size.vocabulary)
    copies = _copies(size, recipe, of_adapters=number == 4)
    context = CUDA_CONTEXT if gpu else 0.0
    backward = 4.0 * row.tokens * 4 * size.inner  # gradients inside one layer
    start = activations + copies + max(logits, backward) + (gradients if recipe.accumulation > 1 else 0)
    end = gradients + backward + (per_layer + copies if recipe.gradient_checkpointing else 0)
    peak = weights + states + context + max(start, end)
    return Memory(weights, gradients, states, activations, logits, copies, context, peak)


def describe(recipe: Recipe, usual: Memory, worst: Memory, device: Device) -> str:
    """For a person: a line per part, the peaks, and whether the higher one fits."""
    parts = (
        ("weights", "weights"),
        ("gradients", "gradients"),
        (f"optimiser ({recipe.optimizer})", "optimiser"),
        (f"activations{' (recomputed)' if recipe.gradient_checkpointing else ''}", "activations"),
        ("logits", "logits"),
        ("copies in 16 bits", "copies"),
        ("CUDA context", "context"),
    )
    lines = [f"  {'':24} {'usually':>11} {'at worst':>11}"]
    for told, name in parts:
        both = getattr(usual, name), getattr(worst, name)
        lines += [f"  {told:24} {both[0] / 1e9:8.2f} GB {both[1] / 1e9:8.2f} GB"] if both[1] else []
    fits = f"fits into the {device.memory / 1e9:.0f} GB of {device.name}"
    if worst.peak > device.memory:
        fits = (
            f"does not fit into the {device.memory / 1e9:.0f} GB of {device.name}"
            f"{', though what is usual does' if usual.peak <= device.memory else ''}. {lighter(recipe)}"
        )
    lines.append(f"  {'at once, usually':24} {usual.peak / 1e9:8.2f} GB")
    return "\n".join([*lines, f"  {'at most at once':24} {worst.peak / 1e9:8.2f} GB, which {fits}"])


def describe_time(recipe: Recipe, rows: Rows, device: Device) -> str:
    """For a person: how long an example takes, and all of them."""
    told = f"time: {rows.flops / 1e12:.3g} TFLOP for an example of {rows.tokens:,.0f} tokens"
    if device.flops is None:
        return f"{told}; how long that takes is not known here, because the peak of {device.name} is not"
    seconds = rows.flops / (device.flops * UTILISATION)
    lines = [f"{told}, {seconds:.2g} s at {UTILISATION:.0%} MFU"]
    learned = [
        count for count in (rows.examples * recipe.epochs, (recipe.max_steps or 0) * recipe.global_batch) if count
    ]
    if learned:
        counts = [f"{rows.examples:,} examples, {recipe.epochs} epochs"] if rows.examples else []
        counts += [f"at most {recipe.max_steps:,} steps of {recipe.global_batch}"] if recipe.max_steps else []
        whole = seconds * min(learned)
        lines.append(f"  {', '.join(counts)}: {_duration(whole)} on one, {_duration(whole / 8)} on eight")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Print the plan."""
    options = _parser().parse_intermixed_args(arguments)
    named = named_recipe(options.recipe, options.overrides)
    recipe, device, base = named.recipe, find_device(options.device), options.base or named.size
    config, card = base_config(base), None if base in SHAPES else find(base)
    check_length(config, recipe.max_length)
    if card:
        recipe, _ = inherit(recipe, card)
    if options.data:
        data = open_data(options.data, picture_root(options.data, options.images))
        rows = measured(data, sizes(config), recipe, _processor(config, card, recipe))
    else:
        text = options.tokens or USUAL[recipe.stage]
        rows = assumed(sizes(config), recipe, text=text, examples=options.examples or 0)
    gpu, half = device.name != "this processor", device.bfloat16
    usual, worst = (plan_memory(config, recipe, row, gpu=gpu, bfloat16=half) for row in (rows.usual, rows.worst))
    peak = f"{device.flops / 1e12:.2f} TFLOP/s at most: " if device.flops else ""
    print(f"{named.name} on {device.name} ({peak}{device.source})")
    print(f"memory for {rows.usual.examples} examples at a time, {rows.usual.tokens:,} tokens ({rows.source}):")
    print(precision.describe(recipe, computed_in(recipe, bfloat16=half)))
    print(describe(recipe, usual, worst, device))
    print(describe_time(recipe, rows, device))
    return 0


def base_config(base: str) -> LlavaConfig:
    """The config of a model: one of SHAPES, or of a folder or the model list. Raises ModelError."""
    shape = SHAPES.get(base)
    if shape is None:
        card = find(base)
        shape = SHAPES.get(HUB.get(card.source, ""))
        if shape is None:
            return config_of(card)
    width, inner, layers, pixels = shape
    return _shape(width, inner, layers, pixels=pixels)


def _weights(config: LlavaConfig, recipe: Recipe) -> tuple[float, int]:
    """Bytes of all weights as they are kept, and how many of them learn as a whole."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(deepcopy(config))
    counts = {name: weight.numel() for name, weight in model.named_parameters()}
    learning = sum(count for name, count in counts.items() if part_of(name) in whole_parts(recipe))
    if recipe.quantise == "none":
        frozen = sum(counts.values()) - learning
        return 4.0 * learning + (4.0 if recipe.precision == "float32" else 2.0) * frozen, learning
    return need(config, recipe.quantise).weights + 2.0 * learning, learning  # the projector becomes float32


def _number(recipe: Recipe) -> int:
    """Bytes of a number in what one layer of the language model hands to the next: those of its embeddings."""
    return 4 if recipe.precision == "float32" or "language_model" in whole_parts(recipe) else 2


def _kept_by_a_layer(size: Sizes, recipe: Recipe, *, gpu: bool) -> float:
    """Bytes per token that one layer of the language model keeps for its backward pass.

    Both norms keep what they read, in float32, and what they made of it where they learn. Attention keeps queries,
    keys, values and its result, a CPU's in float32; the feed-forward part keeps gate, its activation and the other
    factor. A matrix keeps what it reads where it learns, and under autocast each of them a copy of its own; an adapter
    keeps what it reads and which of it was dropped, a byte each; a CPU keeps what it was multiplied by, in the numbers
    of the adapter.
    """
    half = recipe.precision == "bfloat16"
    number = 2 if half else 4
    attended = (number if gpu else 4) * (2 * size.queries + 2 * size.keys)
    kept = 8.0 * size.width + attended + number * 3 * size.inner
    reads = 3 * size.width + size.queries + 2 * size.width + size.inner  # of the seven matrices
    if recipe.lora_rank:
        dropped = 1 if gpu else kept_in(".lora_", recipe, computed_in(recipe, bfloat16=True)).itemsize
        return kept + (number + dropped) * reads + 7 * recipe.lora_rank * number
    if "language_model" in whole_parts(recipe):
        kept += 8.0 * size.width + number * (reads if half else reads - 3 * size.width)
    return kept


def _kept_by_the_tower(size: Sizes, recipe: Recipe, row: Row) -> float:
    """Bytes that the vision tower keeps for its backward pass, where it learns.

    As in `_kept_by_a_layer`, but for a feed-forward part of two matrices and what quick GELU multiplies between them.
    """
    if "vision_tower" not in whole_parts(recipe):
        return 0.0
    tokens, number = row.pictures * (size.patches + 1), 2 if recipe.precision == "bfloat16" else 4
    layer = (8.0 + number * (10 - number)) * size.tower_width + 3.0 * number * size.tower_inner
    if recipe.gradient_checkpointing:
        return tokens * (4.0 * size.tower_width * size.tower_layers + layer)
    return tokens * layer * size.tower_layers


def _outside_the_layers(size: Sizes, recipe: Recipe, row: Row) -> float:
    """Bytes of pixels, features, projector, embeddings and the last norm."""
    number = _number(recipe)
    pixels = 4.0 * row.pictures * size.patches * (size.patch_numbers + size.tower_width)
    projector = number * row.pictures * size.patches * 3 * size.width
    return pixels + projector + number * row.tokens * 5 * size.width


def _copies(size: Sizes, recipe: Recipe, *, of_adapters: bool) -> float:
    """Bytes of the layers' matrices in 16 bits that are kept for the backward pass, where float32 learns."""
    if recipe.precision == "float32":
        return 0.0
    learning, once = whole_parts(recipe), recipe.gradient_checkpointing
    layer = size.layer_weights if "language_model" in learning else 0
    layer += recipe.lora_rank * size.adapter_sides if of_adapters else 0
    eyes = size.tower_layer_weights if "vision_tower" in learning else 0
    return 2.0 * (layer * (1 if once else size.layers) + eyes * (1 if once else size.tower_layers))


def _processor(config: LlavaConfig, card: Card | None, recipe: Recipe) -> ProcessorMixin | None:
    """That of the run, where the model's tokenizer is on this machine."""
    if card is None or not here(card):
        return None
    tokenizer = processor_of(card).tokenizer
    return make_processor(config, tokenizer, image_mode=recipe.image_mode, template_name=recipe.template)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 3600 else f"{seconds / 3600:,.1f} hours"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m finetune plan")
    parser.add_argument("recipe", help="name or YAML file")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="changes to it")
    parser.add_argument("--base", help=f"model: {', '.join(SHAPES)}, a folder or a name of the model list")
    parser.add_argument("--device", help=f"{', '.join(GPUS)} or cpu (default: this machine's)")
    parser.add_argument("--data", type=Path, help="records that will be learned from: their number and lengths count")
    parser.add_argument("--images", type=Path, help="folder of their pictures")
    parser.add_argument(
        "--tokens", type=int, help="of text in one example (default: LLaVA-1.5's own, about 24 and 200)"
    )
    parser.add_argument("--examples", type=int, help="how many there are")
    return parser
