"""What a model would take of this machine, and which one to start with, before anything is loaded."""

from functools import cache
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

from llava_app.adapters import base_of
from llava_app.checkpoints import HUB_PRESETS, Card, Outlook, built_in
from llava_app.errors import ModelError
from llava_app.hub import folder_of, here, hub_answers, no_room
from llava_app.memory import (
    CLASSES,
    Need,
    Plan,
    comfortable,
    free_bytes,
    make_plan,
    need,
    parameters,
    published_config,
    smallest,
)
from llava_app.precision import best_device, choose_precision
from llava_app.presets import PRESETS, Preset

BIG, LIGHT = "LLaVA-1.5-7B", "LLaVA-OneVision-0.5B"  # for a GPU, and for a computer without one

# Tokens per second of a language model of 551 million parameters in bfloat16, measured on 2 CPU cores with AMX.
LIGHT_SPEED = 20


def outlook(
    card: Card, precision: str = "auto", *, share: float = 1.0, given_back: float = 0.0, advice: str = ""
) -> Outlook | None:
    """What `card` would take of this machine, in a share of its free memory and of what would be `given_back`, bytes.

    `advice` as in `planned`. None where nothing is known before the download, and for a model on a server. Raises
    ModelError as `load`.
    """
    folder, device = here(card), best_device()
    base = base_of(card, folder) if folder else None
    if base:
        return outlook(base, precision, share=share, given_back=given_back, advice=advice)
    if card.kind == "server" or not (folder or card in HUB_PRESETS):
        return None
    config = published_config(_preset(card)) if card in HUB_PRESETS else config_of(card)
    chosen, _ = choose_precision(precision, folder, device=device)
    wanted, count = _measured(card, chosen)
    free, download = share * (free_bytes(device) + given_back), 0 if folder else 2 * count
    refusal = no_room(download, name=card.name)
    try:
        planned(wanted, free, name=card.name, precision=chosen, advice=advice)
    except ModelError as error:
        refusal = str(error)
    least = smallest(wanted)
    return Outlook(config.model_type, count, wanted.positions, chosen, least, free, download, refusal)


def config_of(card: Card) -> PretrainedConfig:
    """The model's config, without its weights. Raises ModelError as `load`."""
    try:
        return read_config(folder_of(card))
    except (OSError, ValueError) as error:
        raise ModelError(f"{card.name} has no config that can be read: {error}. Restore its files.") from error


def read_config(folder: Path) -> PretrainedConfig:
    """Raises OSError without one, ValueError for a model that this app does not know."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError("its folder has no config.json")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in CLASSES:
        raise ValueError(f"it is a {config.model_type} model, and this app knows {', '.join(CLASSES)}")
    return config


def default_card() -> tuple[Card, str]:
    """The model to start with on this machine, and the reason as one sentence for the page."""
    if best_device().type != "cuda":
        lack = "PyTorch cannot use the NVIDIA GPU" if torch.cuda.is_available() else "No NVIDIA GPU"
        return built_in(), f"{lack} here, so this is the small built-in model. {_offer()}"
    big = next(card for card in HUB_PRESETS if card.name == BIG)
    free, _ = torch.cuda.mem_get_info()
    needed = comfortable(need(published_config(_preset(big)), "4bit"))
    room = f"The GPU has {free / 1e9:.1f} GB free and {big.name} needs {needed / 1e9:.1f} GB"
    if free < needed:
        return built_in(), f"{room}, so this is the small built-in model."
    if not here(big) and not hub_answers(big):
        return built_in(), f"{big.name} is not on this machine and the Hub is out of reach: the small built-in model."
    return big, f"{room}."


def why_precision(card: Card) -> str | None:
    """Which precision `load` would choose here, and why; None for a Hub model that has not been downloaded."""
    folder = here(card)
    return choose_precision("auto", folder, device=best_device())[1] if folder else None


@cache
def _measured(card: Card, precision: str) -> tuple[Need, int]:
    """What it needs, and its parameters; that takes a moment, and the page asks it of every model."""
    config = published_config(_preset(card)) if card in HUB_PRESETS else config_of(card)
    return need(config, precision), parameters(config)


def planned(wanted: Need, free: float, *, name: str, precision: str, advice: str = "") -> Plan:
    """As `make_plan`; what does not fit is refused with the name of one that does.

    With `advice`, for who holds no conversation, the weights alone must fit; it is said where they do not.
    """
    if advice:
        if wanted.weights > free:
            room = f"{wanted.weights / 1e9:.1f} GB for its weights in {precision} and {free / 1e9:.1f} GB are free"
            raise ModelError(f"{name} needs {room}. {advice}")
        return Plan(0, 0, wanted.token, 0, wanted)
    try:
        return make_plan(wanted, free, name=name, precision=precision)
    except ModelError as error:
        fit = [card for card in HUB_PRESETS if smallest(_measured(card, precision)[0]) < min(free, smallest(wanted))]
        raise ModelError(f"{error} {fit[-1].name if fit else 'The built-in model'} fits.") from None


def _offer() -> str:
    """For a computer without a GPU: what else there is."""
    light = next(preset for preset in PRESETS if preset.name == LIGHT)
    return (
        f"For photographs, {light.name} runs on a CPU too ({light.parameters * 2 / 1e9:.1f} GB from the Hub, "
        f"about {LIGHT_SPEED} tokens a second on two cores)."
    )


def _preset(card: Card) -> Preset:
    return next(preset for preset in PRESETS if preset.source == card.source)
