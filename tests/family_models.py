"""A tiny LLaVA of random weights of each class that the app knows, and of several language models and towers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from llava_app.checkpoints import Card, read_card, write_card
from llava_app.conversation import Conversation
from llava_app.engine import Sampling
from llava_app.engine.local import LocalEngine
from llava_app.loading import Loaded, load
from llava_app.processors import make_processor
from llava_app.prompts import encode
from tests.fixtures_model import SPECIALS, byte_tokenizer

GREEDY = Sampling(temperature=0, max_new_tokens=12)
SIDE, PATCH = 28, 7
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": len(SPECIALS) + 256,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]  # LLaVA-1.6's, for tiles of 28 pixels
SQUARES = [[28 * rows, 28 * columns] for rows in range(1, 7) for columns in range(1, 7)]  # OneVision's


def llava_config() -> LlavaConfig:
    """LLaVA-1.5: CLIP and Llama."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_index=3,
        image_seq_length=(SIDE // PATCH) ** 2,
    )


def next_config() -> LlavaNextConfig:
    """LLaVA-1.6: CLIP, Mistral and tiles."""
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=MistralConfig(**TEXT, sliding_window=None),
        image_token_index=3,
        image_grid_pinpoints=PINPOINTS,
    )


def onevision_config() -> LlavaOnevisionConfig:
    """OneVision: SigLIP without its head, Qwen2, tiles that are shrunk to the room of nine."""
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Qwen2Config(**TEXT),
        image_token_index=3,
        video_token_index=2,
        image_grid_pinpoints=SQUARES,
    )


CONFIGS = {"llava": llava_config, "llava_next": next_config, "llava_onevision": onevision_config}


def write_family_model(folder: Path, config: PretrainedConfig, *, template: str = "vicuna_v1") -> Card:
    """A finished checkpoint of random weights for this config."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():  # wide enough that greedy answers wander instead of repeating a token
            torch.nn.init.normal_(parameter, std=0.4)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.save_pretrained(folder)
    mode = "pad" if config.model_type == "llava" else "anyres"
    make_processor(config, byte_tokenizer(), image_mode=mode, template_name=template).save_pretrained(folder)
    card = Card(config.model_type, str(folder), "run", stage="instruct", template=template, image_mode=mode)
    write_card(folder, card)
    return read_card(folder)


@pytest.fixture(scope="session", params=CONFIGS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A model of each class, loaded."""
    folder = tmp_path_factory.mktemp("family") / request.param
    return load(write_family_model(folder, CONFIGS[request.param]()), "float32")


@pytest.fixture
def family_engine(family: Loaded) -> Iterator[LocalEngine]:
    """An engine of its own for each test."""
    engine = LocalEngine(family)
    yield engine
    engine.close()


def answer(engine: LocalEngine, conversation: Conversation) -> str:
    """What the engine answers, greedily."""
    return "".join(piece.text for piece in engine.answer(conversation, GREEDY))


def generated(loaded: Loaded, conversation: Conversation) -> str:
    """What `model.generate` answers to the same inputs."""
    encoded = encode(conversation, loaded.processor, open_answer=True)
    pixels: dict[str, Any] = {} if encoded.pixel_values is None else {"pixel_values": encoded.pixel_values}
    return generated_from(loaded, encoded.input_ids, **pixels, **encoded.shapes)


def generated_from(loaded: Loaded, input_ids: torch.Tensor, **inputs: torch.Tensor) -> str:
    """What `model.generate` answers to these inputs, (S,) tokens and what goes with them."""
    ids = input_ids[None]
    output = loaded.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=GREEDY.max_new_tokens,
        suppress_tokens=[loaded.model.config.image_token_id],
        **inputs,
    )
    text: str = loaded.processor.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return text.removeprefix(" ")
