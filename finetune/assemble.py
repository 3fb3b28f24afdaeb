"""A pretrained vision tower + a pretrained language model → a LLaVA whose projector has learned nothing yet."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava_app.checkpoints import Card, write_card
from llava_app.errors import ModelError
from llava_app.processors import make_processor
from llava_app.prompts import end_tokens

IMAGE_TOKEN, PAD_TOKEN, VIDEO_TOKEN = "<image>", "<pad>", "<video>"
ONEVISION = "anyres_max_9"  # LLaVA's name of how OneVision sees tiles
FEATURE_LAYER = -2  # of the vision tower, as in LLaVA-1.5
PROJECTORS = {"mlp2x_gelu": "gelu", "linear": "linear"}  # LLaVA's name → the activation between the two layers


@dataclass(frozen=True)
class Tower:
    """How LLaVA reads one family of vision towers: "default" drops the class token, "full" keeps every feature."""

    model: type[PreTrainedModel]
    select: str


CLIP, SIGLIP = Tower(CLIPVisionModel, "default"), Tower(SiglipVisionModel, "full")
GRIDS = {  # rows and columns of tiles
    "anyres": ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1)),  # LLaVA-1.6's
    ONEVISION: tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7)),
}
TOWERS = {"clip": CLIP, "clip_vision_model": CLIP, "siglip": SIGLIP, "siglip_vision_model": SIGLIP}


def assemble(
    vision: Path,
    language: Path,
    out: Path,
    *,
    projector: str = "mlp2x_gelu",
    image_mode: str = "pad",
    template: str | None = None,
    class_token: bool = False,
    feature_layer: int = FEATURE_LAYER,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Card:
    """Write a LLaVA made of the two folders to `out`, stored in `dtype`; returns its card (stage "base").

    The tokenizer gets <image> and <pad> where it lacks them. The projector is drawn from `seed`. `image_mode` "anyres"
    makes a LLaVA-1.6, which sees tiles, and "anyres_max_9" a OneVision. `template` None: the one of the language
    model's own kind. `feature_layer`: of the tower, counted from its end where negative; `class_token` keeps a CLIP
    tower's as one more feature.
    Raises ModelError when a folder holds no such model, the parts do not fit, or `out` is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out} is not empty. Give a new folder.")
    tower, select = load_tower(vision)
    text, tokenizer = _load_language(language)
    template = template or own_template(text.config.model_type, tokenizer)
    if class_token:
        select = _with_class_token(tower, image_mode)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return write_llava(
            tower,
            text,
            tokenizer,
            out,
            select=select,
            projector=projector,
            image_mode=image_mode,
            template=template,
            dtype=dtype,
            base=f"{vision.name} + {language.name}",
            stage="base",
            about="A vision tower and a language model put together; its projector has learned nothing: it cannot see.",
            feature_layer=feature_layer,
        )


def write_llava(
    tower: PreTrainedModel,
    text: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    select: str,
    projector: str,
    image_mode: str,
    template: str,
    dtype: torch.dtype,
    base: str,
    stage: str,
    about: str,
    projector_weights: Mapping[str, Tensor] | None = None,
    feature_layer: int = FEATURE_LAYER,
) -> Card:
    """Join two halves, with the given projector or a new random one, and write them to `out`; returns the card."""
    tokens = _add_tokens(text, tokenizer, video=image_mode == ONEVISION)
    config = _llava_config(
        tower,
        text,
        image_mode,
        projector_hidden_act=PROJECTORS[projector],
        vision_feature_select_strategy=select,
        vision_feature_layer=feature_layer,
        **tokens,
    )
    model = _join(tower, text, config)
    if projector_weights:
        known = model.model.multi_modal_projector.state_dict()
        model.model.multi_modal_projector.load_state_dict(known | dict(projector_weights))
    model.generation_config = _generation_config(model, text, tokenizer, template=template)
    seen_as = "anyres" if image_mode in GRIDS else image_mode
    processor = make_processor(model.config, tokenizer, image_mode=seen_as, template_name=template)
    model.to(dtype).save_pretrained(out)
    processor.save_pretrained(out)
    card = Card(
        name=out.name,
        source=str(out),
        kind="run",
        stage=stage,
        template=template,
        image_mode=seen_as,
        base=base,
        about=about,
    )
    write_card(out, card)
    return card


def load_tower(folder: Path) -> tuple[PreTrainedModel, str]:
    """The vision tower in a folder, float32, and how LLaVA reads it. Raises ModelError when it is none."""
    model_type = _config(folder).model_type
    if model_type not in TOWERS:
        raise ModelError(f"{folder} is a {model_type!r} model; a vision tower is one of {', '.join(TOWERS)}.")
    tower = TOWERS[model_type]
    return tower.model.from_pretrained(folder, dtype=torch.float32, use_safetensors=True), tower.select


def _load_language(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model_type = _config(folder).model_type
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"{folder} is a {model_type!r} model, which is no causal language model. Give another folder.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True), tokenizer
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} lacks its safetensors or its tokenizer: {error}") from error


def _config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json.")
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} is of no kind that transformers knows: {error}") from error


def _add_tokens(text: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, video: bool) -> dict[str, int]:
    """Grow tokenizer and embeddings by <image> and a padding token where missing, and by <video> where asked for.

    Returns what the config calls the ids of pictures and clips.
    """
    indices = {"image_token_index": IMAGE_TOKEN} | ({"video_token_index": VIDEO_TOKEN} if video else {})
    missing = [token for token in indices.values() if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    if len(tokenizer) > text.get_input_embeddings().num_embeddings:
        text.resize_token_embeddings(len(tokenizer))
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in indices.items()}


def own_template(model_type: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that a language model speaks already, as its kind and its tokens say; else LLaVA's own."""
    tokens = tokenizer.get_vocab()
    spoken = {"qwen": "<|im_end|>", "llama_3": "<|eot_id|>"}
    by_token = next((template for template, token in spoken.items() if token in tokens), None)
    return by_token or ("mistral_instruct" if model_type == "mistral" else "vicuna_v1")


def _with_class_token(tower: PreTrainedModel, image_mode: str) -> str:
    if tower.config.model_type != "clip_vision_model" or image_mode in GRIDS:
        raise ModelError("Only a CLIP tower without tiles has a class token to keep. Leave class_token out.")
    return "full"


def _llava_config(
    tower: PreTrainedModel, text: PreTrainedModel, image_mode: str, **settings: Any
) -> LlavaConfig | LlavaNextConfig | LlavaOnevisionConfig:
    for half in (tower, text):
        half.config._name_or_path = ""  # it would be stored, and says only where the half lay on this machine
    side, patch = tower.config.image_size, tower.config.patch_size
    shapes = {"vision_config": tower.config, "text_config": text.config}
    one_tile = {"image_seq_length": (side // patch) ** 2}
    if image_mode not in GRIDS:
        return LlavaConfig(**shapes, **one_tile, **settings)
    grids = [[rows * side, columns * side] for rows, columns in GRIDS[image_mode]]
    tiles = {"image_grid_pinpoints": grids, "tie_word_embeddings": text.config.tie_word_embeddings}
    if image_mode == ONEVISION:
        return LlavaOnevisionConfig(**shapes, **tiles, **settings, vision_aspect_ratio=ONEVISION)
    return LlavaNextConfig(**shapes, **one_tile, **tiles, **settings)


def _join(tower: PreTrainedModel, text: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.model.vision_tower = tower
    model.model.language_model = text.base_model
    model.lm_head = _head(text)
    model.model.multi_modal_projector = _new_projector(config)
    if not isinstance(config, LlavaConfig):
        width = config.text_config.hidden_size
        model.model.image_newline = nn.Parameter(torch.randn(width) / width**0.5)  # as transformers starts it
    return model


def _head(text: PreTrainedModel) -> nn.Linear:
    """The language model's head, which in a LLaVA has no bias."""
    head = text.get_output_embeddings()
    if head.bias is not None and head.bias.any():
        raise ModelError(
            f"The head of a {text.config.model_type} model has a bias, which LLaVA's classes cannot hold. "
            "Choose another language model, such as a Phi-3."
        )
    head.bias = None
    return head


def _new_projector(config: PreTrainedConfig) -> LlavaMultiModalProjector:
    """The projector as the original LLaVA starts it: torch's own start of linear layers.

    A linear projector is the two-layer class with nothing between the layers and the identity as the second one.
    """
    projector = LlavaMultiModalProjector(config)
    if config.projector_hidden_act == "linear":
        nn.init.eye_(projector.linear_2.weight)
        nn.init.zeros_(projector.linear_2.bias)
    return projector


def _generation_config(
    model: PreTrainedModel, text: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, template: str
) -> GenerationConfig:
    """Greedy, with the end tokens of language model and template; the image token is never to be written."""
    own = text.generation_config.eos_token_id or tokenizer.eos_token_id
    ends = [*([own] if isinstance(own, int) else own), *end_tokens(tokenizer, template)]
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(dict.fromkeys(ends)),
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[model.config.image_token_id],
    )
