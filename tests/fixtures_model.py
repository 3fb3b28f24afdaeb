"""A LLaVA of random weights, small enough to be made for a test, in the same folder layout as a real one."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from llava_app.checkpoints import Card, read_card, write_card
from llava_app.loading import Loaded, load
from llava_app.processors import make_processor

SPECIALS = ("<s>", "</s>", "<pad>", "<image>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after the four special ones; a begin token in front, as Llama's tokenizer puts it."""
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )


def tiny_config(*, tie_word_embeddings: bool = False) -> LlavaConfig:
    """CLIP and Llama of two layers, 64 wide; 28 px in patches of 7 make 16 image tokens; 512 tokens of context."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
            projection_dim=64,
        ),
        text_config=LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=len(SPECIALS) + 256,
            tie_word_embeddings=tie_word_embeddings,
            max_position_embeddings=512,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        ),
        image_token_index=3,
        image_seq_length=16,
    )


def write_tiny_model(folder: Path, *, image_mode: str = "pad", tie_word_embeddings: bool = False) -> Card:
    """A finished checkpoint folder of random weights, the same ones every time."""
    config = tiny_config(tie_word_embeddings=tie_word_embeddings)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = LlavaForConditionalGeneration(config)
        for parameter in model.parameters():  # wide enough that greedy answers wander instead of repeating a token
            torch.nn.init.normal_(parameter, std=0.6)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.save_pretrained(folder)
    processor = make_processor(config, byte_tokenizer(), image_mode=image_mode, template_name="vicuna_v1")
    processor.save_pretrained(folder)
    card = Card(
        name="Tiny",
        source=str(folder),
        kind="run",
        stage="instruct",
        template="vicuna_v1",
        image_mode=image_mode,
        about="Random weights: it answers nonsense.",
    )
    write_card(folder, card)
    return read_card(folder)


@pytest.fixture(scope="session")
def tiny_card(tmp_path_factory: pytest.TempPathFactory) -> Card:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_loaded(tiny_card: Card) -> Loaded:
    return load(tiny_card, "float32")
