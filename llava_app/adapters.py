"""A LoRA run's folder: adapters and a projector, which are put onto the base that they were trained on."""

import hashlib
import json
from pathlib import Path

from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedModel

from llava_app.checkpoints import CARD_NAME, Card, find
from llava_app.errors import ModelError

ADAPTER = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PROJECTOR = "base_model.model.model.multi_modal_projector."


def base_of(card: Card, folder: Path) -> Card | None:
    """The model that the adapter in `folder` belongs to; None where `folder` holds no adapter.

    It is looked for by its name, then where it lay when the adapter was trained. Raises ModelError without it.
    """
    if not (folder / ADAPTER).is_file():
        return None
    stored = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    for name in filter(None, (card.base, stored)):
        try:
            return find(name)
        except ModelError:
            continue
    raise ModelError(f"{card.name} is an adapter of {card.base}, which is not here. Put it back, or merge by export.")


def check_base(card: Card, base_folder: Path) -> None:
    """Raise ModelError unless the base is what the adapter was trained on."""
    path = base_folder / CARD_NAME
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else base_folder.name
    if found != card.base_revision:
        raise ModelError(
            f"{card.name} was trained on {card.base} as it was then (revision {str(card.base_revision)[:12]}); the one "
            f"here is {found[:12]}. Put the old one back, or train again."
        )


def attach(model: PreTrainedModel, folder: Path) -> None:
    """Put adapters and projector of `folder` onto `model`, in its precision and without merging them into its weights.

    Raises ValueError when they do not fit, key by key.
    """
    # PEFT imports bitsandbytes, which takes seconds and complains on a CPU; few models have adapters.
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    weights = load_file(folder / WEIGHTS)
    projector = {name.removeprefix(PROJECTOR): value for name, value in weights.items() if name.startswith(PROJECTOR)}
    adapters = {name: value for name, value in weights.items() if not name.startswith(PROJECTOR)}
    config = LoraConfig.from_pretrained(str(folder))
    config.modules_to_save, config.inference_mode = None, True
    inject_adapter_in_model(config, model)
    own = {name for name, _ in model.named_parameters() if ".lora_" in name}
    given = {name.removeprefix("base_model.model.").replace(".weight", ".default.weight") for name in adapters}
    if own != given:
        raise ValueError(f"{len(own ^ given)} of its adapters do not fit the base, such as {min(own ^ given)}")
    set_peft_model_state_dict(model, adapters)
    try:
        model.model.multi_modal_projector.load_state_dict(projector)
    except RuntimeError as error:
        raise ValueError(f"its projector does not fit the base: {error}") from error
    dtype = model.model.multi_modal_projector.linear_1.weight.dtype
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.data = weight.data.to(device=model.device, dtype=dtype)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.requires_grad_(False).eval()
