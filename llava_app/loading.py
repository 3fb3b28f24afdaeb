"""From a card to a model that can answer: the only `from_pretrained` and the only quantisation settings."""

import logging
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from llava_app.adapters import attach, base_of, check_base
from llava_app.checkpoints import CARD_NAME, HUB_PRESETS, OWN, Card, Outlook, built_in, read_card
from llava_app.errors import ModelError
from llava_app.hub import folder_of, here, hub_answers, no_room
from llava_app.memory import (
    CLASSES,
    UNQUANTISED,
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
from llava_app.presets import PRESETS, Preset
from llava_app.processors import load_processor, make_processor, template_note
from llava_app.prompts import prepare

__all__ = ["Loaded", "default_card", "load", "make_processor"]

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "4bit", "8bit", "bfloat16", "float16", "float32")

BIG, LIGHT = "LLaVA-1.5-7B", "LLaVA-OneVision-0.5B"  # for a GPU, and for a computer without one

# Weights on disk below which a model counts as small: fewer bits on a GPU only cost conversions, a second CPU thread
# only costs handing over.
SMALL_BYTES = 200e6
# Tokens per second of a language model of 551 million parameters in bfloat16, measured on 2 CPU cores with AMX.
LIGHT_SPEED = 20


@dataclass(frozen=True)
class Loaded:
    """A model on its device, ready to answer."""

    card: Card
    model: PreTrainedModel
    processor: ProcessorMixin
    device: torch.device
    precision: str  # one of PRECISIONS, never "auto"
    why: str  # one sentence for the page: which precision on which device, and the reason
    plan: Plan  # what the engine may keep in memory


def load(card: Card, precision: str = "auto", *, share: float = 1.0) -> Loaded:
    """Load the model of `card` onto the best device of this machine, in a share of its free memory.

    Safetensors only, and no code from the checkpoint is run. Raises ModelError when the weights do not fit the
    architecture key by key, the processor does not fit the weights, the Hub cannot be reached, or the machine lacks
    the precision.
    """
    expected = outlook(card, precision, share=share) if card.kind == "hub" else None
    if expected and expected.refusal:  # before gigabytes are fetched in vain
        raise ModelError(expected.refusal)
    folder = folder_of(card)
    if card.template == OWN and (folder / CARD_NAME).is_file():
        card = replace(read_card(folder), name=card.name, source=card.source, kind="hub")
    base = base_of(card, folder)
    weights = folder_of(base) if base else folder
    device = _device()
    precision, why = _choose_precision(precision, weights, device=device)
    try:
        wanted = need(_config(weights), precision)
        plan = _planned(wanted, share * free_bytes(device), name=card.name, precision=precision)
        model = _load_model(weights, device, precision=precision)
        if base:
            check_base(card, weights)
            attach(model, folder)
        if card in HUB_PRESETS and model.config.model_type != "llava":
            # Transformers reads the original's (width, height) as (height, width): of two grids that fit a picture
            # equally well it takes the other one.
            model.config.image_grid_pinpoints = [[high, wide] for wide, high in model.config.image_grid_pinpoints]
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
    return Loaded(card, model, processor, device, precision, f"{why} {note}".strip(), plan)


def outlook(card: Card, precision: str = "auto", *, share: float = 1.0, given_back: float = 0.0) -> Outlook | None:
    """What `card` would take of this machine, in a share of its free memory and of what would be `given_back`, bytes.

    None where nothing is known before the download, and for a model on a server. Raises ModelError as `load`.
    """
    folder, device = here(card), _device()
    base = base_of(card, folder) if folder else None
    if base:
        return outlook(base, precision, share=share, given_back=given_back)
    if card.kind == "server" or not (folder or card in HUB_PRESETS):
        return None
    config = published_config(_preset(card)) if card in HUB_PRESETS else config_of(card)
    chosen, _ = _choose_precision(precision, folder, device=device)
    wanted, count = _measured(card, chosen)
    free, download = share * (free_bytes(device) + given_back), 0 if folder else 2 * count
    refusal = no_room(download, name=card.name)
    try:
        _planned(wanted, free, name=card.name, precision=chosen)
    except ModelError as error:
        refusal = str(error)
    least = smallest(wanted)
    return Outlook(config.model_type, count, wanted.positions, chosen, least, free, download, refusal)


def config_of(card: Card) -> PretrainedConfig:
    """The model's config, without its weights. Raises ModelError as `load`."""
    try:
        return _config(folder_of(card))
    except (OSError, ValueError) as error:
        raise ModelError(f"{card.name} has no config that can be read: {error}. Restore its files.") from error


def processor_of(card: Card) -> ProcessorMixin:
    """The model's processor, without its weights. Raises ModelError as `load`."""
    config = config_of(card)
    try:
        return load_processor(folder_of(card), card, config=config)
    except (OSError, ValueError) as error:
        raise ModelError(f"{card.name} has no tokenizer that can be read: {error}. Restore its files.") from error


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
    if not here(big) and not hub_answers(big):
        return built_in(), f"{big.name} is not on this machine and the Hub is out of reach: the small built-in model."
    return big, f"{room}."


def why_precision(card: Card) -> str | None:
    """Which precision `load` would choose here, and why; None for a Hub model that has not been downloaded."""
    folder = here(card)
    return _choose_precision("auto", folder, device=_device())[1] if folder else None


@cache
def _measured(card: Card, precision: str) -> tuple[Need, int]:
    """What it needs, and its parameters; that takes a moment, and the page asks it of every model."""
    config = published_config(_preset(card)) if card in HUB_PRESETS else config_of(card)
    return need(config, precision), parameters(config)


def _planned(wanted: Need, free: float, *, name: str, precision: str) -> Plan:
    """As `make_plan`; what does not fit is refused with the name of one that does."""
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


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _choose_precision(asked: str, folder: Path | None, *, device: torch.device) -> tuple[str, str]:
    """The precision to load in, and why, as one sentence. Without a folder: for a published model, which is big."""
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


def _quantisation(device: torch.device) -> BitsAndBytesConfig:
    """NF4 with quantised scales. Plain `load_in_4bit=True` would mean FP4 that computes in float32."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16 if old else torch.bfloat16,
        llm_int8_skip_modules=list(UNQUANTISED["4bit"]),
    )


def _config(folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError("its folder has no config.json")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in CLASSES:
        raise ValueError(f"it is a {config.model_type} model, and this app knows {', '.join(CLASSES)}")
    return config


def _load_model(folder: Path, device: torch.device, *, precision: str) -> PreTrainedModel:
    quantisation = _quantisation(device) if precision == "4bit" else None
    reading = "bfloat16" if precision == "8bit" else precision
    dtype = quantisation.bnb_4bit_compute_dtype if quantisation else getattr(torch, reading)
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": device},
        quantization_config=quantisation,
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
