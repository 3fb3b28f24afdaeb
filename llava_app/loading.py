"""From a card to a model that can answer: the only `from_pretrained` and the only quantisation settings."""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from llava_app.checkpoints import HUB_PRESETS, Card, built_in
from llava_app.errors import ModelError
from llava_app.memory import UNQUANTISED, Plan, free_bytes, make_plan, need
from llava_app.prompts import template_text

PRECISIONS = ("auto", "4bit", "8bit", "bfloat16", "float16", "float32")

# LLaVA-1.5-7B on a GPU: 6.48e9 quantised weights at 4.13 bits (NF4 and its scales, themselves quantised) = 3.3 GB,
# 0.59e9 weights of tower, projector, embeddings and head at 16 bits = 1.2 GB, keys and values of 4,096 tokens
# (2 x 32 layers x 4,096 numbers x 2 bytes per token) = 2.1 GB, CUDA context and activations 0.9 GB.
BYTES_FOR_7B = 7.5e9

# Weights on disk below which a model counts as small: fewer bits on a GPU only cost conversions, a second CPU thread
# only costs handing over.
SMALL_BYTES = 200e6

HUB_TIMEOUT = 5.0  # seconds after which the Hub counts as unreachable
HUB_FILES = ["*.json", "*.safetensors", "*.model"]


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


@dataclass(frozen=True)
class _Tower:
    """What a kind of vision tower makes of a picture."""

    class_tokens: int  # features that are no patch
    mean: tuple[float, ...]
    std: tuple[float, ...]


_TOWERS = {
    "clip_vision_model": _Tower(1, tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)),
    "siglip_vision_model": _Tower(0, tuple(IMAGENET_STANDARD_MEAN), tuple(IMAGENET_STANDARD_STD)),
}


def load(card: Card, precision: str = "auto", *, share: float = 1.0) -> Loaded:
    """Load the model of `card` onto the best device of this machine, in a share of its free memory.

    Safetensors only, and no code from the checkpoint is run. Raises ModelError when the weights do not fit the
    architecture key by key, the processor does not fit the weights, the Hub cannot be reached, or the machine lacks
    the precision.
    """
    folder = _folder(card)
    device = _device()
    precision, why = _choose_precision(precision, folder, device=device)
    try:
        wanted = need(_config(folder), precision)
        plan = make_plan(wanted, share * free_bytes(device), name=card.name, precision=precision)
        model = _load_model(folder, device, precision=precision)
        processor = _load_processor(folder, card, config=model.config)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0].replace(str(folder), folder.name)  # the page shows no paths
        raise ModelError(f"{card.name} cannot be loaded: {reason}. Restore its files or choose another.") from error
    _check_image_tokens(model, processor, name=card.name)
    if model.generation_config.eos_token_id is None:
        raise ModelError(f"{card.name} has no eos_token_id in generation_config.json, so no answer would end. Add it.")
    return Loaded(card, model, processor, device, precision, why, plan)


def default_card() -> tuple[Card, str]:
    """The model to start with on this machine, and the reason as one sentence for the page."""
    big = HUB_PRESETS[0]
    if not torch.cuda.is_available():
        return built_in(), "No NVIDIA GPU here, so this is the small built-in model."
    free, _ = torch.cuda.mem_get_info()
    room = f"The GPU has {free / 1e9:.1f} GB free and {big.name} needs {BYTES_FOR_7B / 1e9:.1f} GB"
    if free < BYTES_FOR_7B:
        return built_in(), f"{room}, so this is the small built-in model."
    if not _cached(big) and not _hub_answers(big):
        return built_in(), f"{big.name} is not on this machine and the Hub is out of reach: the small built-in model."
    return big, f"{room}."


def why_precision(card: Card) -> str | None:
    """Which precision `load` would choose here, and why; None for a Hub model that has not been downloaded."""
    if card.kind == "hub" and not _cached(card):
        return None
    return _choose_precision("auto", _folder(card), device=_device())[1]


def make_processor(
    config: LlavaConfig, tokenizer: PreTrainedTokenizerBase, *, image_mode: str, template_name: str
) -> LlavaProcessor:
    """A processor whose image size, patch size and token counts come from the model's own config.

    `image_mode`: "pad" fills up to a square with the mean colour, "crop" cuts the centre out.
    Raises ModelError for an unknown vision tower or template.
    """
    tower, side = _tower(config), config.vision_config.image_size
    image_processor = LlavaImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=tower.mean,
        image_std=tower.std,
        do_pad=image_mode == "pad",
    )
    return _processor(config, tokenizer, image_processor=image_processor, chat_template=template_text(template_name))


def _processor(
    config: LlavaConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_processor: LlavaImageProcessorPil,
    chat_template: str,
) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=_tower(config).class_tokens,
        chat_template=chat_template,
    )


def _tower(config: LlavaConfig) -> _Tower:
    kind = config.vision_config.model_type
    if kind not in _TOWERS:
        raise ModelError(f"The vision tower is a {kind}; known are {', '.join(_TOWERS)}. Choose another model.")
    return _TOWERS[kind]


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


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _choose_precision(asked: str, folder: Path, *, device: torch.device) -> tuple[str, str]:
    """The precision to load in, and why, as one sentence."""
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
    if sum(file.stat().st_size for file in folder.glob("*.safetensors")) < SMALL_BYTES:
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


def _config(folder: Path) -> LlavaConfig:
    if not (folder / "config.json").is_file():  # transformers would build 7 billion random weights by its defaults
        raise FileNotFoundError("its folder has no config.json")
    return LlavaConfig.from_pretrained(folder, local_files_only=True)


def _load_model(folder: Path, device: torch.device, *, precision: str) -> PreTrainedModel:
    quantisation = _quantisation(device) if precision == "4bit" else None
    reading = "bfloat16" if precision == "8bit" else precision
    dtype = quantisation.bnb_4bit_compute_dtype if quantisation else getattr(torch, reading)
    model, info = LlavaForConditionalGeneration.from_pretrained(
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


def _load_processor(folder: Path, card: Card, *, config: LlavaConfig) -> LlavaProcessor:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if card.kind == "hub":
        # Neither the published chat template nor its cropping is what LLaVA was trained with: ours replace them.
        return make_processor(config, tokenizer, image_mode=card.image_mode, template_name=card.template)
    image_processor = LlavaImageProcessorPil.from_pretrained(folder, do_pad=card.image_mode == "pad")
    chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return _processor(config, tokenizer, image_processor=image_processor, chat_template=chat_template)


@torch.inference_mode()
def _check_image_tokens(model: PreTrainedModel, processor: LlavaProcessor, *, name: str) -> None:
    """Raise ModelError unless processor and model agree on the image token and on how many an image takes."""
    image_token_id = model.config.image_token_id
    if processor.image_token_id != image_token_id:
        raise ModelError(
            f"{name} writes images as token {processor.image_token_id} but its config expects {image_token_id}. "
            "Restore its tokenizer and config.json."
        )
    wide = Image.new("RGB", (32, 16))
    inputs = processor(images=wide, text=processor.image_token, return_tensors="pt")
    side, expected = inputs["pixel_values"].shape[-1], model.config.vision_config.image_size
    if tuple(inputs["pixel_values"].shape[-2:]) != (expected, expected):
        raise ModelError(f"{name} prepares images at {side} px but its tower sees {expected} px. Restore its files.")
    features = model.get_image_features(inputs["pixel_values"].to(model.device)).pooler_output[0]
    tokens = int((inputs["input_ids"] == image_token_id).sum())
    if tokens != len(features):
        raise ModelError(
            f"{name} reserves {tokens} tokens for an image and its vision tower makes {len(features)}. "
            "Set vision_feature_select_strategy and patch_size in config.json as it was trained."
        )
