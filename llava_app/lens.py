"""How much of a model's context one picture takes, where a model's parameters are, and what the published ones need."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_app.errors import ModelError, UserError
from llava_app.presets import PRESETS, Preset

CONTEXTS = (2048, 4096, 32768, 131072)  # tokens
MOST_SIDE = 100_000
PARTS = {  # part: what it is in the classes of transformers
    "vision tower": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.", "model.image_newline"),
    "language model": ("model.language_model.", "lm_head."),
}
TRAINED = {"align": ("projector",), "instruct": ("projector", "language model")}  # stage: the parts that learn


@dataclass(frozen=True)
class Share:
    """What a picture of one size takes under one family."""

    family: str
    width: int
    height: int
    tiles: int  # the overview included
    visual_tokens: int
    share: dict[str, float]  # of each of CONTEXTS, by its number of tokens; above 1 where it does not fit


@dataclass(frozen=True)
class Economy:
    """One part of a model, and whether each stage trains it."""

    part: str
    parameters: int
    of_all: float
    trained: dict[str, bool]


@dataclass(frozen=True)
class Published:
    """A published model and what it needs."""

    name: str
    source: str  # Hub id
    parameters: int
    context: int  # tokens
    licence: str
    template: str
    memory: dict[str, float]  # bytes with one conversation of full length, by precision


def shares(family: str, sizes: Sequence[tuple[int, int]]) -> list[Share]:
    """What pictures of these sizes (width, height) take. Raises ModelError for an unknown family."""
    from llava_app.memory import published_config
    from llava_app.tiles import tiling_of

    preset = next((preset for preset in PRESETS if preset.family == family), None)
    if preset is None:
        raise ModelError(f"There is no family {family}. Choose one of {', '.join(families())}.")
    tiling = tiling_of(published_config(preset))
    return [
        Share(family, width, height, tiling.tiles(width, height), tokens, _of_contexts(tokens))
        for width, height in sizes
        for tokens in [tiling.tokens(width, height)]
    ]


def families() -> list[str]:
    """The families that the lens knows."""
    return list(dict.fromkeys(preset.family for preset in PRESETS))


def economy(model: str) -> list[Economy]:
    """Where the parameters of a preset, a model of the list or a folder are. Raises ModelError for no such model."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from llava_app.checkpoints import find
    from llava_app.memory import published_config

    card = find(model)
    preset = next((preset for preset in PRESETS if preset.source == card.source), None)
    if preset is None and not (Path(card.source) / "config.json").is_file():
        raise ModelError(f"{model} is not on this machine. Load it once, or choose a model of the list.")
    config = published_config(preset) if preset else AutoConfig.from_pretrained(card.source, local_files_only=True)
    with torch.device("meta"):
        weights = dict(AutoModelForImageTextToText.from_config(config).named_parameters())
    total = sum(weight.numel() for weight in weights.values())
    rows = []
    for part, prefixes in PARTS.items():
        count = sum(weight.numel() for name, weight in weights.items() if name.startswith(prefixes))
        trained = {stage: part in parts for stage, parts in TRAINED.items()}
        rows.append(Economy(part, count, count / total, trained))
    return rows


def published() -> list[Published]:
    """The published models, smallest first, and what they need."""
    return [
        Published(each.name, each.source, each.parameters, each.context, each.licence, each.template, memory(each))
        for each in PRESETS
    ]


def memory(preset: Preset) -> dict[str, float]:
    """Bytes that a model takes with one conversation of full length, by precision."""
    from llava_app.memory import comfortable, needs, published_config

    return {precision: comfortable(wanted) for precision, wanted in needs(published_config(preset)).items()}


def size_of(text: str) -> tuple[int, int]:
    """Width and height of "1344x672". Raises UserError."""
    found = re.fullmatch(r"(\d{1,6})[x×](\d{1,6})", text.strip())
    if not found or not all(1 <= int(side) <= MOST_SIDE for side in found.groups()):
        raise UserError(f"{text} is no size. Write WIDTHxHEIGHT in pixels, from 1 to {MOST_SIDE:,}, as 1344x672.")
    return int(found[1]), int(found[2])


def _of_contexts(tokens: int) -> dict[str, float]:
    return {str(context): round(tokens / context, 4) for context in CONTEXTS}
