"""Published models of the LLaVA family: where they lie, how they were trained, and their shapes, to plan with.

The shapes are those of each model's config.json on the Hub, so that its memory is known before it is downloaded.
"""

from dataclasses import dataclass
from typing import Any

_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}


def _text(kind: str, width: int, inner: int, layers: int, heads: tuple[int, int], vocabulary: int) -> dict[str, Any]:
    """A language model; `heads` of queries, and of keys and values."""
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }


_VICUNA_7B = _text("llama", 4096, 11008, 32, (32, 32), 32064)
_VICUNA_13B = _text("llama", 5120, 13824, 40, (40, 40), 32064)
_MISTRAL_7B = _text("mistral", 4096, 14336, 32, (32, 8), 32064) | {"sliding_window": None}
_YI_34B = _text("llama", 7168, 20480, 60, (56, 8), 64064)
_LLAMA3_8B = _text("llama", 4096, 14336, 32, (32, 8), 128320)
_QWEN2_HALF_B = _text("qwen2", 896, 4864, 24, (14, 2), 152000) | {"tie_word_embeddings": True}
_QWEN2_7B = _text("qwen2", 3584, 18944, 28, (28, 4), 152128)
_QWEN15_HALF_B = _text("qwen2", 1024, 2816, 24, (16, 16), 152000) | {"tie_word_embeddings": True}


@dataclass(frozen=True)
class Preset:
    """One published model."""

    name: str
    source: str  # Hub id
    family: str  # one of FAMILIES: how it cuts pictures
    template: str
    parameters: int
    context: int  # tokens of a conversation
    licence: str
    text: dict[str, Any]  # the language model's config
    good_at: str

    @property
    def about(self) -> str:
        """What a person should know before choosing it."""
        return (
            f"{self.good_at[0].upper()}{self.good_at[1:]}. {self.parameters / 1e9:.1f} billion parameters, "
            f"{self.context:,} tokens, {self.licence}. The first use downloads {self.parameters * 2 / 1e9:.1f} GB."
        )

    @property
    def image_mode(self) -> str:
        return FAMILIES[self.family].image_mode

    @property
    def config(self) -> dict[str, Any]:
        """What `AutoConfig.for_model` builds the config of: shapes only."""
        family = FAMILIES[self.family]
        text = self.text | {"max_position_embeddings": self.context}
        return {"model_type": family.model_type, "vision_config": family.vision, "text_config": text} | family.settings


@dataclass(frozen=True)
class Family:
    """What the models of a family share: how they see."""

    model_type: str  # of transformers
    image_mode: str
    vision: dict[str, Any]
    settings: dict[str, Any]


FAMILIES = {
    "llava-1.5": Family("llava", "pad", _CLIP, {"vision_feature_select_strategy": "default"}),
    "llava-1.6": Family(
        "llava_next",
        "anyres",
        _CLIP,
        # Height before width; the original lists them width first, which decides between two that fit equally well.
        {"image_grid_pinpoints": [[672, 336], [336, 672], [672, 672], [336, 1008], [1008, 336]]},
    ),
    "llava-onevision": Family(
        "llava_onevision",
        "anyres",
        _SIGLIP,
        {"image_grid_pinpoints": [[384 * rows, 384 * columns] for columns in range(1, 7) for rows in range(1, 7)]},
    ),
    "llava-interleave": Family("llava", "pad", _SIGLIP, {"vision_feature_select_strategy": "full"}),
}

_LLAMA_2, _LLAMA_3, _APACHE = "Llama 2 Community Licence", "Llama 3 Community Licence", "Apache-2.0"
_CHAT = "photographs, memes, charts, text in pictures"
_FINE = "small print, documents, charts and photographs, seen in tiles"
_ALL = "photographs in tiles, several pictures, clips"

PRESETS = (  # smallest first: what a computer without a GPU can run
    Preset(
        "LLaVA-OneVision-0.5B",
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        "llava-onevision",
        "qwen",
        893_675_552,
        32768,
        _APACHE,
        _QWEN2_HALF_B,
        _ALL,
    ),
    Preset(
        "LLaVA-Interleave-0.5B",
        "llava-hf/llava-interleave-qwen-0.5b-hf",
        "llava-interleave",
        "qwen",
        864_031_264,
        32768,
        "Tongyi Qianwen research licence",
        _QWEN15_HALF_B,
        "several pictures and clips",
    ),
    Preset(
        "LLaVA-1.5-7B",
        "llava-hf/llava-1.5-7b-hf",
        "llava-1.5",
        "vicuna_v1",
        7_063_427_072,
        4096,
        _LLAMA_2,
        _VICUNA_7B,
        _CHAT,
    ),
    Preset(
        "LLaVA-1.6-Vicuna-7B",
        "llava-hf/llava-v1.6-vicuna-7b-hf",
        "llava-1.6",
        "vicuna_v1",
        7_063_431_168,
        4096,
        _LLAMA_2,
        _VICUNA_7B,
        _FINE,
    ),
    Preset(
        "LLaVA-1.6-Mistral-7B",
        "llava-hf/llava-v1.6-mistral-7b-hf",
        "llava-1.6",
        "mistral_instruct",
        7_566_747_648,
        32768,
        _APACHE,
        _MISTRAL_7B,
        _FINE,
    ),
    Preset(
        "LLaVA-OneVision-7B",
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "llava-onevision",
        "qwen",
        8_030_807_584,
        32768,
        _APACHE,
        _QWEN2_7B,
        _ALL,
    ),
    Preset(
        "LLaVA-1.6-Llama3-8B",
        "llava-hf/llama3-llava-next-8b-hf",
        "llava-1.6",
        "llama_3",
        8_355_276_800,
        8192,
        _LLAMA_3,
        _LLAMA3_8B,
        _FINE,
    ),
    Preset(
        "LLaVA-1.5-13B",
        "llava-hf/llava-1.5-13b-hf",
        "llava-1.5",
        "vicuna_v1",
        13_351_494_656,
        4096,
        _LLAMA_2,
        _VICUNA_13B,
        _CHAT,
    ),
    Preset(
        "LLaVA-1.6-Vicuna-13B",
        "llava-hf/llava-v1.6-vicuna-13b-hf",
        "llava-1.6",
        "vicuna_v1",
        13_351_499_776,
        4096,
        _LLAMA_2,
        _VICUNA_13B,
        _FINE,
    ),
    Preset(
        "LLaVA-1.6-34B",
        "llava-hf/llava-v1.6-34b-hf",
        "llava-1.6",
        "chatml_direct",
        34_752_083_968,
        4096,
        _APACHE,
        _YI_34B,
        _FINE,
    ),
)
