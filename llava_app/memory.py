"""What a model needs, computed from its config before anything is loaded, against what is free."""

import ctypes
import math
import mmap
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from llava_app.errors import ModelError
from llava_app.presets import Preset
from llava_app.tiles import tiling_of

CLASSES = ("llava", "llava_next", "llava_onevision")  # of transformers, that this app knows
MOST_ROWS = 16  # conversations at once; beyond it, people wait
LEAST_ROOM = 512  # tokens of a conversation beside one picture, below which a model is of no use
SHARE = 0.9  # of the free memory that is planned with; the rest is for what no plan knows
STEP = 512  # tokens that are read in one step at most
FEATURES = 64  # pictures whose features are kept
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 2.0, "4bit": 2.0}
# Of the weights that a precision is about. 4bit: NF4 with scales that are quantised themselves (Dettmers et al. 2023,
# section 3) is 4 bits, 8 for each 64 weights, 32 for each 64 x 256: 4.127. 8bit: 16 for reading and 8 for writing.
BYTES_IN_LAYERS = BYTES | {"8bit": 3.0, "4bit": 4.127 / 8}
# What stays in 16 bit. For 4bit the paths must be these: transformers ignores plain "vision_tower", and a list without
# "lm_head" quantises the head.
UNQUANTISED = {
    "4bit": ("model.vision_tower", "model.multi_modal_projector", "lm_head"),
    "8bit": ("model.vision_tower", "model.multi_modal_projector"),
}


@dataclass(frozen=True)
class Need:
    """Bytes that a model takes in a precision."""

    weights: float
    token: int  # keys and values of one token
    step: float  # activations of the largest step: a picture in the tower, or a part of a prompt
    picture: int  # projected features of the largest picture
    picture_tokens: int  # of the largest
    positions: int  # tokens of a conversation that the model was made for


@dataclass(frozen=True)
class Plan:
    """How much the engine may keep."""

    rows: int  # conversations in the cache
    length: int  # tokens of each
    token_bytes: int
    feature_bytes: int  # most that pictures' features take together
    need: Need

    @property
    def held(self) -> float:
        """Bytes of the weights and of all rows."""
        return self.need.weights + self.rows * self.length * self.token_bytes

    @property
    def total(self) -> float:
        """Bytes when everything is full."""
        return self.held + self.need.step + self.feature_bytes


def need(config: PretrainedConfig, precision: str) -> Need:
    """What the model of `config` takes in `precision`, a key of BYTES.

    Exact for the weights; for the activations of a step, the largest tensors that live at the same time.
    """
    return _need(config, precision, _shell(config))


def needs(config: PretrainedConfig) -> dict[str, Need]:
    """`need` in every precision."""
    shell = _shell(config)
    return {precision: _need(config, precision, shell) for precision in BYTES}


def _need(config: PretrainedConfig, precision: str, shell: PreTrainedModel) -> Need:
    text, vision = config.text_config, config.vision_config
    number = BYTES[precision]
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    heads *= getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tiling = tiling_of(config)
    seen = tiling.most_tiles * (tiling.patches**2 + 1) * (4 * vision.hidden_size + 2 * vision.intermediate_size)
    read = STEP * (4 * text.hidden_size + 3 * text.intermediate_size)
    dequantised = text.hidden_size * text.intermediate_size if precision == "4bit" else 0
    return Need(
        weights=_weights(shell, precision),
        token=int(2 * text.num_hidden_layers * heads * number),
        step=number * (max(seen, read + dequantised) + MOST_ROWS * text.vocab_size * 2),
        picture=int(tiling.most_tokens * text.hidden_size * number),
        picture_tokens=tiling.most_tokens,
        positions=text.max_position_embeddings,
    )


def parameters(config: PretrainedConfig) -> int:
    """How many numbers the model of `config` has learned."""
    return sum(parameter.numel() for parameter in _shell(config).parameters())


def published_config(preset: Preset) -> PretrainedConfig:
    """The config of a published model as far as its shapes go."""
    settings = dict(preset.config)
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def comfortable(wanted: Need) -> float:
    """Free bytes with which one conversation may become as long as the model was made for."""
    return (wanted.weights + wanted.step + wanted.positions * wanted.token) / SHARE


def smallest(wanted: Need) -> float:
    """Free bytes below which a model is of no use."""
    return (wanted.weights + wanted.step + _least_tokens(wanted) * wanted.token) / SHARE


def make_plan(wanted: Need, free: float, *, name: str, precision: str) -> Plan:
    """Rows and context for a model that needs `wanted`, in `free` bytes. Raises ModelError with what would help."""
    left = SHARE * free - wanted.weights - wanted.step
    least = _least_tokens(wanted) * wanted.token
    if left < least:
        lighter = "a smaller model" if precision == "4bit" else "--precision 4bit or a smaller model"
        raise ModelError(
            f"{name} needs {smallest(wanted) / 1e9:.1f} GB in {precision} and {free / 1e9:.1f} GB are free. "
            f"Choose {lighter}, or close what else uses the memory."
        )
    features = max(0.0, min(FEATURES * wanted.picture, left / 10, left - least))
    length = int(min(wanted.positions, (left - features) // wanted.token))
    rows = int(min(MOST_ROWS, (left - features) // (length * wanted.token)))
    return Plan(max(1, rows), length, wanted.token, int(features), wanted)


def free_bytes(device: torch.device) -> float:
    """Memory of the device that nobody uses."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes
        return torch.cuda.mem_get_info(device)[0] + kept
    return min(psutil.virtual_memory().available, _free_in_container())


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.zeros`; on a CPU the memory is taken page by page when it is first written, which torch.zeros does at
    once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if sys.platform == "win32":
        return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(*shape)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":  # huge pages are 2 MB, each filled with zeros while somebody waits for a first token
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def give_back() -> None:
    """Return to the system what was freed, where free memory is measured. Torch keeps that of a GPU. glibc keeps
    the rest: after the matrices of a model have been put into another order, as much as 40 % of the model."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:  # other C libraries have none and need none
        trim(0)


def _least_tokens(wanted: Need) -> int:
    return min(wanted.picture_tokens + LEAST_ROOM, wanted.positions)


def _free_in_container() -> float:
    """What a control group leaves, on Linux; infinite without one."""
    group = Path("/sys/fs/cgroup")
    try:
        used = int((group / "memory.current").read_text())
        given_back = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
        return int((group / "memory.max").read_text()) - used + int(given_back)
    except (OSError, ValueError):  # not Linux, an older kernel, or "max": no limit
        return float("inf")


def _shell(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config without any weights."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(deepcopy(config))


def _weights(model: PreTrainedModel, precision: str) -> float:
    """Bytes of all weights. A head that is tied to the embeddings counts as well: the engine keeps it in an order of
    its own."""
    layers = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(UNQUANTISED.get(precision, ()))
    }
    tied = (model.lm_head.weight,) if model.config.text_config.tie_word_embeddings else ()
    return sum(
        parameter.numel() * (BYTES_IN_LAYERS if id(parameter) in layers else BYTES)[precision]
        for parameter in (*model.parameters(), *tied)
    )
