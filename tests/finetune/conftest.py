"""A tiny random LLaVA and a small data file: enough for every promise of training that needs no GPU."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from finetune.assemble import assemble

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP vision tower: 32 wide, 2 layers, 28 pixels in patches of 14, so 4 visual tokens."""
    folder = tmp_path_factory.mktemp("tower")
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(1)
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, 64 wide, 2 layers, whose tokens are bytes; its tokenizer knows neither <image> nor padding."""
    folder = tmp_path_factory.mktemp("language")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(vocabulary),
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    torch.manual_seed(2)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tower: Path, language: Path) -> Path:
    """Tower and language model assembled, the projector untrained."""
    folder = tmp_path_factory.mktemp("models") / "base"
    assemble(tower, language, folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen records with a picture of one colour and four without any, beside their pictures."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for number in range(16):
        colour = COLOURS[number % len(COLOURS)]
        Image.new("RGB", (20 + number, 30), colour).save(folder / f"{number}.png")
        records.append(
            record(f"seen {number}", ["Which colour?", f"It is {colour}."] * (1 + number % 3), [f"{number}.png"])
        )
    records += [record(f"text {number}", ["Say a colour.", COLOURS[number]]) for number in range(4)]
    path = folder / "records.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def record(identifier: str, values: list[str], images: list[str] | None = None) -> dict[str, object]:
    """A LLaVA record whose first question shows `images`."""
    images = images or []
    texts = ["<image>\n" * len(images) + values[0], *values[1:]]
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    return {"id": identifier, "image": images, "conversations": turns}
