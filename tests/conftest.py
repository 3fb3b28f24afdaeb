"""A tokenizer and a processor that are small and real, and pictures to go with them."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: as many tests run as there are cores, each with its own

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlavaImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from llava_app.images import Picture
from llava_app.prompts import template_text

pytest_plugins = ["tests.emulated_cuda", "tests.fixtures_model", "tests.family_models"]


def pytest_collection_finish() -> None:
    """What is there before the first test is not looked at again each time that an engine ends and collects."""
    gc.freeze()


TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: What is funny? ASSISTANT: A joke. Why is the cat red? 0123456789"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens, learned from three sentences."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<pad>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Pads to 28 x 28 and sees 4 tokens in a picture; its template is vicuna_v1."""
    image_processor = LlavaImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_pad=True
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template_text("vicuna_v1"),
    )


@pytest.fixture(scope="session")
def pictures() -> list[Picture]:
    """Three small pictures of different colours and shapes."""
    sizes = {"red": (20, 10), "green": (10, 20), "blue": (16, 16)}
    return [Picture(Image.new("RGB", size, colour), colour, f"{colour}.png") for colour, size in sizes.items()]
