"""From a card to a model that can answer: the only `from_pretrained` and the only quantisation settings."""

import gc
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedModel,
    ProcessorMixin,
)

from llava_app.adapters import adapted, base_of, check_base
from llava_app.checkpoints import CARD_NAME, HUB_PRESETS, OWN, Card, check_files, read_card
from llava_app.engine.weights import Weights
from llava_app.errors import ModelError
from llava_app.hub import folder_of, here
from llava_app.memory import Plan, free_bytes, give_back, need
from llava_app.outlook import config_of, outlook, planned, read_config
from llava_app.precision import best_device, choose_precision, quantisation
from llava_app.processors import known_template, load_processor, own_image_mode, template_note
from llava_app.prompts import prepare

logger = logging.getLogger(__name__)


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


def load(
    card: Card,
    precision: str = "auto",
    *,
    share: float = 1.0,
    promised: float = 0.0,
    shelf: Shelf | None = None,
    device: torch.device | None = None,
    advice: str = "",
) -> Loaded:
    """Load the model of `card` onto `device`, or the best one of this machine, in a share of its free memory.

    Of that, the bytes `promised` are for others. Weights that are on the `shelf` are shared instead. With `advice`, no
    room is asked for a conversation, and it is what a person is told where there is none for the weights.

    Safetensors only, and no code from the checkpoint is run. Raises ModelError when the weights do not fit the
    architecture key by key, the processor does not fit the weights, the Hub cannot be reached, or the machine lacks
    the precision.
    """
    expected = None if here(card) else outlook(card, precision, share=share, given_back=-promised, advice=advice)
    if expected and expected.refusal:  # before gigabytes are fetched in vain
        raise ModelError(expected.refusal)
    folder = folder_of(card)
    if card.template == OWN and (folder / CARD_NAME).is_file():
        card = replace(read_card(folder), name=card.name, source=card.source, kind="hub")
    check_files(card, folder, weights=False)
    base = base_of(card, folder)
    source = folder_of(base) if base else folder
    if base:
        check_files(base, source, weights=False)
    device, shelf = device or best_device(), shelf or Shelf()
    precision, why = choose_precision(precision, source, device=device)
    weights = shelf.find(source, precision)
    try:
        wanted = need(read_config(source), precision)
        wanted = replace(wanted, weights=0) if weights else wanted
        free = share * (free_bytes(device) - promised)
        plan = planned(wanted, free, name=card.name, precision=precision, advice=advice)
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


def processor_of(card: Card) -> ProcessorMixin:
    """The model's processor, without its weights. Raises ModelError as `load`."""
    config = config_of(card)
    try:
        return load_processor(folder_of(card), card, config=config)
    except (OSError, ValueError) as error:
        raise ModelError(f"{card.name} has no tokenizer that can be read: {error}. Restore its files.") from error


def described(card: Card) -> Card:
    """A model that brings no card, with the template and the image mode that its own files show.

    Where its chat template is none of ours, the template stays OWN. Raises ModelError as `load`.
    """
    if card.template != OWN:
        return card
    folder = folder_of(card)
    if (folder / CARD_NAME).is_file():
        return replace(read_card(folder), name=card.name, source=card.source, kind=card.kind)
    processor = processor_of(card)
    template, mode = known_template(processor.chat_template), own_image_mode(processor, config_of(card))
    return replace(
        card, template=template or OWN, image_mode=mode, stage="align" if template == "plain" else "instruct"
    )


def stored_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a model's folder by their names in the model, on the CPU, in the precision they are stored in."""
    stored = str(read_config(folder).dtype or torch.float32).removeprefix("torch.")
    weights: dict[str, torch.Tensor] = _load_model(folder, torch.device("cpu"), precision=stored).state_dict()
    return weights


def _identity(folder: Path, precision: str) -> tuple[Path, str, int]:
    """Changes when the folder is written anew."""
    return folder, precision, max((path.stat().st_mtime_ns for path in folder.glob("*.safetensors")), default=0)


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
