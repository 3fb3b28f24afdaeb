"""From a card to a model that can answer: the only `from_pretrained` and the only quantisation settings."""

import gc
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from llava_app.adapters import adapted, base_of, check_base
from llava_app.checkpoints import CARD_NAME, HUB_PRESETS, OWN, Card, built_in, read_card
from llava_app.engine.weights import Weights
from llava_app.errors import ModelError
from llava_app.memory import (
    CLASSES,
    Plan,
    comfortable,
    free_bytes,
    give_back,
    make_plan,
    need,
    published_config,
)
from llava_app.precision import best_device, choose_precision, quantisation
from llava_app.presets import PRESETS, Preset
from llava_app.processors import load_processor, make_processor, template_note
from llava_app.prompts import prepare

__all__ = ["Loaded", "default_card", "load", "make_processor"]

logger = logging.getLogger(__name__)

BIG, LIGHT = "LLaVA-1.5-7B", "LLaVA-OneVision-0.5B"  # for a GPU, and for a computer without one

# Tokens per second of a language model of 551 million parameters in bfloat16, measured on 2 CPU cores with AMX.
LIGHT_SPEED = 20

HUB_TIMEOUT = 5.0  # seconds after which the Hub counts as unreachable
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]


@dataclass(frozen=True)
class Loaded:
    """A model on its device, ready to answer."""

    card: Card
    model: PreTrainedModel
    weights: Weights  # which the model shares with others of its base
    processor: ProcessorMixin
    device: torch.device
    precision: str  # one of `precision.PRECISIONS`, never "auto"
    why: str  # one sentence for the page: which precision on which device, and the reason
    plan: Plan  # what the engine may keep in memory


class Shelf:
    """Weights that are on the device now: those that an engine uses, and the last ones, for who wants them again.

    A model and adapters of it are made of the same weights, whichever comes first.
    """

    def __init__(self) -> None:
        self._used: WeakValueDictionary[tuple[Path, str, int], Weights] = WeakValueDictionary()
        self._last: Weights | None = None

    def find(self, folder: Path, precision: str) -> Weights | None:
        """Those of `folder` as it is now. Others that nobody uses are let go of, so that there is room."""
        weights = self._used.get(_identity(folder, precision))
        if weights is not self._last:
            self.clear()
        return weights

    def keep(self, folder: Path, precision: str, weights: Weights) -> None:
        self._used[_identity(folder, precision)] = self._last = weights

    def clear(self) -> None:
        """Let go of what no engine uses."""
        self._last = None
        gc.collect()
        give_back()


def load(card: Card, precision: str = "auto", *, share: float = 1.0, shelf: Shelf | None = None) -> Loaded:
    """Load the model of `card` onto the best device of this machine, in a share of its free memory.

    Weights that are on the `shelf` are shared instead.

    Safetensors only, and no code from the checkpoint is run. Raises ModelError when the weights do not fit the
    architecture key by key, the processor does not fit the weights, the Hub cannot be reached, or the machine lacks
    the precision.
    """
    folder = _folder(card)
    if card.template == OWN and (folder / CARD_NAME).is_file():
        card = replace(read_card(folder), name=card.name, source=card.source, kind="hub")
    base = base_of(card, folder)
    source = _folder(base) if base else folder
    device, shelf = best_device(), shelf or Shelf()
    precision, why = choose_precision(precision, source, device=device)
    weights = shelf.find(source, precision)
    try:
        wanted = need(_config(source), precision)
        wanted = replace(wanted, weights=0) if weights else wanted
        plan = make_plan(wanted, share * free_bytes(device), name=card.name, precision=precision)
        if not weights:
            weights = _load_weights(base or card, source, device, precision=precision)
            shelf.keep(source, precision, weights)
        model = weights.model
        if base:
            check_base(card, source)
            model = adapted(model, folder)
        processor = load_processor(folder, card, config=model.config)
        note = template_note(folder, card)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0].replace(str(folder), folder.name)  # the page shows no paths
        raise ModelError(f"{card.name} cannot be loaded: {reason}. Restore its files or choose another.") from error
    _check_image_tokens(model, processor, name=card.name)
    if model.generation_config.eos_token_id is None:
        raise ModelError(f"{card.name} has no eos_token_id in generation_config.json, so no answer would end. Add it.")
    if note:
        logger.warning("%s: %s", card.name, note)
    return Loaded(card, model, weights, processor, device, precision, f"{why} {note}".strip(), plan)


def config_of(card: Card) -> PretrainedConfig:
    """The model's config, without its weights. Raises ModelError as `load`."""
    try:
        return _config(_folder(card))
    except (OSError, ValueError) as error:
        raise ModelError(f"{card.name} has no config that can be read: {error}. Restore its files.") from error


def processor_of(card: Card) -> ProcessorMixin:
    """The model's processor, without its weights. Raises ModelError as `load`."""
    config = config_of(card)
    try:
        return load_processor(_folder(card), card, config=config)
    except (OSError, ValueError) as error:
        raise ModelError(f"{card.name} has no tokenizer that can be read: {error}. Restore its files.") from error


def stored_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a model's folder by their names in the model, on the CPU, in the precision they are stored in."""
    stored = str(_config(folder).dtype or torch.float32).removeprefix("torch.")
    weights: dict[str, torch.Tensor] = _load_model(folder, torch.device("cpu"), precision=stored).state_dict()
    return weights


def default_card() -> tuple[Card, str]:
    """The model to start with on this machine, and the reason as one sentence for the page."""
    if not torch.cuda.is_available():
        return built_in(), f"No NVIDIA GPU here, so this is the small built-in model. {_offer()}"
    big = next(card for card in HUB_PRESETS if card.name == BIG)
    free, _ = torch.cuda.mem_get_info()
    needed = comfortable(need(published_config(_preset(big)), "4bit"))
    room = f"The GPU has {free / 1e9:.1f} GB free and {big.name} needs {needed / 1e9:.1f} GB"
    if free < needed:
        return built_in(), f"{room}, so this is the small built-in model."
    if not _cached(big) and not _hub_answers(big):
        return built_in(), f"{big.name} is not on this machine and the Hub is out of reach: the small built-in model."
    return big, f"{room}."


def why_precision(card: Card) -> str | None:
    """Which precision `load` would choose here, and why; None for a Hub model that has not been downloaded."""
    if card.kind == "hub" and not _cached(card):
        return None
    return choose_precision("auto", _folder(card), device=best_device())[1]


def _offer() -> str:
    """For a computer without a GPU: what else there is."""
    light = next(preset for preset in PRESETS if preset.name == LIGHT)
    return (
        f"For photographs, {light.name} runs on a CPU too ({light.parameters * 2 / 1e9:.1f} GB from the Hub, "
        f"about {LIGHT_SPEED} tokens a second on two cores)."
    )


def _preset(card: Card) -> Preset:
    return next(preset for preset in PRESETS if preset.source == card.source)


def _identity(folder: Path, precision: str) -> tuple[Path, str, int]:
    """Changes when the folder is written anew."""
    return folder, precision, max((path.stat().st_mtime_ns for path in folder.glob("*.safetensors")), default=0)


def _folder(card: Card) -> Path:
    """Where the files of `card` lie; those of a Hub model are downloaded first unless they are here already."""
    if card.kind != "hub":
        return Path(card.source)
    try:
        return Path(snapshot_download(card.source, allow_patterns=HUB_FILES, local_files_only=not _hub_answers(card)))
    except (OSError, HTTPError) as error:
        raise ModelError(
            f"{card.name} is not complete on this machine and the Hub did not deliver {card.source}. "
            "Connect to the internet and try again, or choose the built-in model."
        ) from error


def _hub_answers(card: Card) -> bool:
    """Whether the Hub offers the model right now: one short question, since downloads would retry for minutes."""
    try:
        HfApi().model_info(card.source, timeout=HUB_TIMEOUT)
    except (OSError, HTTPError):
        return False
    return True


def _cached(card: Card) -> bool:
    try:
        snapshot_download(card.source, allow_patterns=HUB_FILES, local_files_only=True)
    except OSError:
        return False
    return True


def _config(folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError("its folder has no config.json")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in CLASSES:
        raise ValueError(f"it is a {config.model_type} model, and this app knows {', '.join(CLASSES)}")
    return config


def _load_weights(card: Card, folder: Path, device: torch.device, *, precision: str) -> Weights:
    model = _load_model(folder, device, precision=precision)
    if card in HUB_PRESETS and model.config.model_type != "llava":
        # Transformers reads the original's (width, height) as (height, width): of two grids that fit a picture equally
        # well it takes the other one.
        model.config.image_grid_pinpoints = [[high, wide] for wide, high in model.config.image_grid_pinpoints]
    return Weights(model, eight_bit=precision == "8bit")


def _load_model(folder: Path, device: torch.device, *, precision: str) -> PreTrainedModel:
    four_bit = quantisation(device) if precision == "4bit" else None
    reading = "bfloat16" if precision == "8bit" else precision
    dtype = four_bit.bnb_4bit_compute_dtype if four_bit else getattr(torch, reading)
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": device},
        quantization_config=four_bit,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        ignore_mismatched_sizes=True,  # so that wrong shapes come back named, to be refused here with the rest
        output_loading_info=True,
    )
    wrong = [
        f"{len(keys)} {kind} ({', '.join(sorted(key if isinstance(key, str) else key[0] for key in keys)[:3])})"
        for kind, keys in (
            ("missing", info["missing_keys"]),
            ("unexpected", info["unexpected_keys"]),
            ("of the wrong shape", info["mismatched_keys"]),
        )
        if keys
    ]
    if wrong:
        raise ModelError(f"The weights in {folder.name} do not fit config.json: {'; '.join(wrong)}. Restore its files.")
    if device.type == "cpu":
        for parameter in model.parameters():
            if parameter.is_floating_point():  # lies in the mapped file, which a training run may write anew
                parameter.data = parameter.data.clone()
    return model.eval()


@torch.inference_mode()
def _check_image_tokens(model: PreTrainedModel, processor: ProcessorMixin, *, name: str) -> None:
    """Raise ModelError unless processor and model agree on the image token and on how many an image takes."""
    image_token_id = model.config.image_token_id
    if processor.image_token_id != image_token_id:
        raise ModelError(
            f"{name} writes images as token {processor.image_token_id} but its config expects {image_token_id}. "
            "Restore its tokenizer and config.json."
        )
    seen = prepare(Image.new("RGB", (32, 16)), processor)
    side, expected = seen.pixel_values.shape[-1], model.config.vision_config.image_size
    if tuple(seen.pixel_values.shape[-2:]) != (expected, expected):
        raise ModelError(f"{name} prepares images at {side} px but its tower sees {expected} px. Restore its files.")
    features = model.get_image_features(seen.pixel_values.to(model.device), **seen.shapes).pooler_output[0]
    if seen.tokens != len(features):
        raise ModelError(
            f"{name} reserves {seen.tokens} tokens for an image and its vision tower makes {len(features)}. "
            "Set vision_feature_select_strategy and patch_size in config.json as it was trained."
        )
