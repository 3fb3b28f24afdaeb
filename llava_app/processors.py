"""How pictures and prompts are made ready for each class of LLaVA: the processor, from the model's own config."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from jinja2 import TemplateError
from PIL import Image
from transformers import (
    AutoTokenizer,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from llava_app.checkpoints import OWN, Card
from llava_app.conversation import Conversation
from llava_app.errors import ModelError
from llava_app.images import Picture
from llava_app.prompts import TEMPLATES, render, template_text

_PICTURE = Picture(Image.new("RGB", (1, 1)), "a picture")
_TALK = Conversation(system="Be brief.").ask("What is funny?", [_PICTURE]).answer("A joke.").ask("Why?")


class LlavaOnevisionProcessor(transformers.LlavaOnevisionProcessor):
    """Transformers' own without its video processor, which needs torchvision; `prompts` prepares frames as pictures.

    It has the name of its parent since the name is saved, and read by others.
    """

    @classmethod
    def get_attributes(cls) -> list[str]:
        """What a processor of this class is made of."""
        return ["image_processor", "tokenizer"]


@dataclass(frozen=True)
class _Tower:
    """What a kind of vision tower makes of a picture."""

    class_tokens: int  # features that are no patch
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class _Kind:
    """How a class of LLaVA takes pictures."""

    image_processor: type[Any]
    settings: Callable[[PretrainedConfig, str], dict[str, Any]]  # config, image mode → the image processor's settings
    processor: type[ProcessorMixin]
    needs: Callable[[PretrainedConfig], dict[str, Any]]  # what the processor takes from the config
    image_modes: tuple[str, ...]


_TOWERS = {
    "clip_vision_model": _Tower(1, tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)),
    "siglip_vision_model": _Tower(0, tuple(IMAGENET_STANDARD_MEAN), tuple(IMAGENET_STANDARD_STD)),
}


def make_processor(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, *, image_mode: str, template_name: str
) -> ProcessorMixin:
    """A processor whose image size, patch size and token counts come from the model's own config.

    `image_mode`: "pad" fills up to a square with the mean colour, "crop" cuts the centre out, "anyres" cuts into tiles.
    Raises ModelError for an unknown vision tower or template, or a mode that is not the model's.
    """
    kind, tower = _kind(config), _tower(config)
    _check_mode(config, image_mode)
    settings = kind.settings(config, image_mode)
    image_processor = kind.image_processor(image_mean=tower.mean, image_std=tower.std, **settings)
    return _join(config, tokenizer, image_processor=image_processor, chat_template=template_text(template_name))


def load_processor(folder: Path, card: Card, *, config: PretrainedConfig) -> ProcessorMixin:
    """The processor of a checkpoint folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if card.kind == "hub" and card.template != OWN:
        # Neither the published chat template nor its cropping is what LLaVA was trained with: ours replace them.
        return make_processor(config, tokenizer, image_mode=card.image_mode, template_name=card.template)
    if card.image_mode != OWN:
        _check_mode(config, card.image_mode)
    mode = {"do_pad": card.image_mode == "pad"} if card.image_mode in ("pad", "crop") else {}
    image_processor = _kind(config).image_processor.from_pretrained(folder, **mode)
    chat_template = _own_template(folder)
    if chat_template is None:
        raise FileNotFoundError("it has no chat_template.jinja")
    return _join(config, tokenizer, image_processor=image_processor, chat_template=chat_template)


def _check_mode(config: PretrainedConfig, image_mode: str) -> None:
    kind = _kind(config)
    if image_mode not in kind.image_modes:
        raise ModelError(
            f"A {config.model_type} model cannot see pictures in the mode {image_mode}; "
            f"choose {' or '.join(kind.image_modes)}."
        )


def template_note(folder: Path, card: Card) -> str:
    """What to tell a person when the checkpoint's own chat template writes another prompt than its card's, or ""."""
    own = _own_template(folder)
    if own is None or card.template == OWN or _prompt(own) == _prompt(template_text(card.template)):
        return ""
    used = f"the prompt of {card.template} is used" if card.kind == "hub" else "its own prompt is used"
    return f"Its own chat template differs from {card.template}, which its card says it was trained with: {used}."


def known_template(chat_template: str) -> str | None:
    """The name of the template that writes the same prompts, with a system prompt and without; None for another one."""
    wanted = _prompts(chat_template)
    return next((name for name in TEMPLATES if _prompts(template_text(name)) == wanted), None)


def own_image_mode(processor: ProcessorMixin, config: PretrainedConfig) -> str:
    """How a checkpoint's own processor shows pictures, of those modes that its class knows."""
    modes = _kind(config).image_modes
    return modes[0] if len(modes) == 1 or processor.image_processor.do_pad else "crop"


def _own_template(folder: Path) -> str | None:
    """The chat template that a checkpoint brings along, from the newest place to the oldest."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            stored = json.loads((folder / name).read_text(encoding="utf-8"))
            if isinstance(stored.get("chat_template"), str):
                return stored["chat_template"]
    return None


def _prompt(template: str, talk: Conversation = _TALK) -> str | None:
    """What a template makes of a short talk; None when it cannot."""
    try:
        return render(talk, template, open_answer=True).text
    except TemplateError:
        return None


def _prompts(template: str) -> list[str | None] | None:
    """As `_prompt`, with the system prompt of the talk and with the template's own."""
    prompts = [_prompt(template, talk) for talk in (_TALK, replace(_TALK, system=None))]
    return None if None in prompts else prompts


def _join(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, *, image_processor: Any, chat_template: str
) -> ProcessorMixin:
    kind = _kind(config)
    return kind.processor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=chat_template,
        **kind.needs(config),
    )


def _kind(config: PretrainedConfig) -> _Kind:
    if config.model_type not in _KINDS:
        raise ModelError(f"This is a {config.model_type} model; known are {', '.join(_KINDS)}. Choose another model.")
    return _KINDS[config.model_type]


def _tower(config: PretrainedConfig) -> _Tower:
    tower = config.vision_config.model_type
    if tower not in _TOWERS:
        raise ModelError(f"The vision tower is a {tower}; known are {', '.join(_TOWERS)}. Choose another model.")
    return _TOWERS[tower]


def _square(config: PretrainedConfig) -> dict[str, int]:
    return {"height": config.vision_config.image_size, "width": config.vision_config.image_size}


def _patches(config: PretrainedConfig) -> dict[str, Any]:
    return {"patch_size": config.vision_config.patch_size, "num_additional_image_tokens": _tower(config).class_tokens}


def _one_tile(config: PretrainedConfig, image_mode: str) -> dict[str, Any]:
    shortest = {"shortest_edge": config.vision_config.image_size}
    return {"size": shortest, "crop_size": _square(config), "do_pad": image_mode == "pad"}


def _cropped_tiles(config: PretrainedConfig, _: str) -> dict[str, Any]:
    shortest = {"shortest_edge": config.vision_config.image_size}
    return {"size": shortest, "crop_size": _square(config), "image_grid_pinpoints": config.image_grid_pinpoints}


def _tiles(config: PretrainedConfig, _: str) -> dict[str, Any]:
    return {"size": _square(config), "image_grid_pinpoints": config.image_grid_pinpoints}


def _onevision_needs(config: PretrainedConfig) -> dict[str, Any]:
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return {
        "num_image_tokens": patches + _tower(config).class_tokens,
        "vision_aspect_ratio": config.vision_aspect_ratio,
    }


_KINDS = {
    "llava": _Kind(LlavaImageProcessorPil, _one_tile, LlavaProcessor, _patches, ("pad", "crop")),
    "llava_next": _Kind(LlavaNextImageProcessorPil, _cropped_tiles, LlavaNextProcessor, _patches, ("anyres",)),
    "llava_onevision": _Kind(
        LlavaOnevisionImageProcessorPil, _tiles, LlavaOnevisionProcessor, _onevision_needs, ("anyres",)
    ),
}
