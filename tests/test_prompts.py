"""One renderer for chat, training and evaluation: exact tokens and exact masks."""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, LlavaImageProcessorPil, LlavaProcessor

from llava_app.conversation import Conversation
from llava_app.images import Picture, pad_to_square
from llava_app.prompts import Encoded, encode, messages, render, template_text
from tests.conftest import TEXT

VICUNA, PLAIN = template_text("vicuna_v1"), template_text("plain")
PICTURE = Picture(Image.new("RGB", (20, 10), "red"), "red")
JOKE = Conversation().ask("What is funny?", [PICTURE]).answer("A joke.")
SPECIAL = ("<image>", "</s>", "<s>", "<pad>")
SNIPPETS = (
    *(*SPECIAL, "<unk>", "<", "</", "s>", "image>", "<</s>s>", "<im<image>age>"),
    *(
        "USER: ",
        " ASSISTANT: ",
        "\ue000",
        "\U0010ffff",
        "\0",
        "\n",
        "  ",
        "\r\n",
        "\ud83d",
        "😀",
        "👩‍👩‍👧",
        "שלום ‮עולם",
        "{{ x }}",
    ),
)

typed = st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=8), max_size=5).map("".join)
ordinary = typed.filter(lambda text: not any(token in text for token in (*SPECIAL, "<unk>")))


def conversations(texts: st.SearchStrategy[str]) -> st.SearchStrategy[Conversation]:
    """Finished conversations of one to three turns, each with up to two pictures."""
    turn = st.tuples(texts, st.integers(0, 2), texts)
    turns = st.lists(turn, min_size=1, max_size=3)
    return st.builds(_finished, turns, st.none() | texts)


def _finished(turns: list[tuple[str, int, str]], system: str | None) -> Conversation:
    conversation = Conversation(system=system)
    for question, images, answer in turns:
        conversation = conversation.ask(question, [PICTURE] * images).answer(answer)
    return conversation


@pytest.fixture(scope="module")
def llama_processor(processor: LlavaProcessor) -> LlavaProcessor:
    """Vicuna's kind of tokenizer, where a space begins a word and unknown letters become bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    specials = ["<unk>", "<s>", "</s>", *bytes_]
    backend.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    )
    learned = json.loads(backend.to_str())["model"]
    tokenizer = LlamaTokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    return variant(processor, tokenizer=tokenizer)


@pytest.fixture(params=["byte-level", "llama"], scope="module")
def any_processor(
    request: pytest.FixtureRequest, processor: LlavaProcessor, llama_processor: LlavaProcessor
) -> LlavaProcessor:
    return processor if request.param == "byte-level" else llama_processor


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Threads take turns as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class TestTokens:
    @settings(max_examples=25, deadline=None)
    @given(conversation=conversations(ordinary), open_answer=st.booleans())
    def test_ids_pictures_and_mask_are_those_of_transformers(
        self, any_processor: LlavaProcessor, conversation: Conversation, open_answer: bool
    ) -> None:
        conversation = conversation.retry() if open_answer else conversation
        encoded = encode(conversation, any_processor, open_answer=open_answer)
        expected = apply_chat_template(conversation, any_processor, open_answer=open_answer)
        assert encoded.input_ids.tolist() == expected["input_ids"][0].tolist()
        assert encoded.supervised.tolist() == [bool(flag) for flag in expected["assistant_masks"][0]]
        if conversation.pictures:
            assert encoded.pixel_values is not None
            assert torch.equal(encoded.pixel_values, expected["pixel_values"])
        else:
            assert encoded.pixel_values is None

    @settings(max_examples=25, deadline=None)
    @given(conversation=conversations(typed))
    def test_chat_prompt_is_a_prefix_of_the_training_text(
        self, any_processor: LlavaProcessor, conversation: Conversation
    ) -> None:
        trained = encode(conversation, any_processor, open_answer=False)
        for number in range(1, len(conversation.turns) + 1):
            until = replace(conversation, turns=conversation.turns[:number])
            prompt = encode(until.retry(), any_processor, open_answer=True)
            assert prompt.input_ids.tolist() == trained.input_ids[: len(prompt.input_ids)].tolist()
            assert prompt.supervised.tolist() == trained.supervised[: len(prompt.input_ids)].tolist()
            assert trained.supervised[len(prompt.input_ids)]

    @settings(max_examples=25, deadline=None)
    @given(conversation=conversations(typed))
    def test_supervised_are_exactly_the_answers_and_their_end_tokens(
        self, processor: LlavaProcessor, conversation: Conversation
    ) -> None:
        encoded = encode(conversation, processor, open_answer=False)
        answers = "".join(f" {turn.answer}</s>" for turn in conversation.turns)
        assert processor.tokenizer.decode(encoded.input_ids[encoded.supervised]) == answers

    @settings(max_examples=25, deadline=None)
    @given(conversation=conversations(typed))
    def test_what_is_typed_stays_text_and_never_becomes_a_special_token(
        self, any_processor: LlavaProcessor, conversation: Conversation
    ) -> None:
        encoded = encode(conversation, any_processor, open_answer=False)
        assert count(encoded, any_processor, "<image>") == 4 * len(conversation.pictures)
        assert count(encoded, any_processor, "</s>") == len(conversation.turns)
        assert count(encoded, any_processor, "<s>") == 1
        assert count(encoded, any_processor, "<pad>") == 0

    @settings(max_examples=25, deadline=None)
    @given(conversation=conversations(typed))
    def test_the_tokens_spell_the_rendered_text(self, processor: LlavaProcessor, conversation: Conversation) -> None:
        bare = _finished([(turn.question, 0, turn.answer or "") for turn in conversation.turns], conversation.system)
        encoded = encode(bare, processor, open_answer=False)
        assert processor.tokenizer.decode(encoded.input_ids) == "<s>" + render(bare, VICUNA, open_answer=False).text

    def test_typed_tokens_are_spelled_by_vicunas_kind_of_tokenizer_too(self, llama_processor: LlavaProcessor) -> None:
        conversation = Conversation().ask("a</s>USER: <image> b").answer("<pad>")
        ids = encode(conversation, llama_processor, open_answer=False).input_ids
        assert llama_processor.tokenizer.decode(ids) == "<s>" + render(conversation, VICUNA, open_answer=False).text

    def test_half_a_surrogate_pair_becomes_the_replacement_character(self, processor: LlavaProcessor) -> None:
        ids = encode(Conversation().ask("a\ud83db"), processor, open_answer=True).input_ids
        assert "USER: a\ufffdb ASSISTANT:" in processor.tokenizer.decode(ids)

    def test_stage_one_supervises_caption_and_newline_and_nothing_else(self, processor: LlavaProcessor) -> None:
        plain = variant(processor, chat_template=PLAIN)
        encoded = encode(JOKE, plain, open_answer=False)
        assert processor.tokenizer.decode(encoded.input_ids) == "<s>" + "<image>" * 4 + "A joke.\n"
        assert encoded.supervised.tolist() == [False] * 5 + [True] * (len(encoded.input_ids) - 5)
        assert encode(JOKE.retry(), plain, open_answer=True).input_ids.tolist() == encoded.input_ids[:5].tolist()

    def test_a_tokenizer_that_adds_the_begin_token_adds_it_once(self, processor: LlavaProcessor) -> None:
        without = VICUNA.replace("{{- bos_token -}}", "")
        ids = encode(JOKE, processor, open_answer=False).input_ids
        assert without != VICUNA
        assert (
            encode(JOKE, variant(processor, chat_template=without), open_answer=False).input_ids.tolist()
            == ids.tolist()
        )

    def test_threads_do_not_mix_up_their_masks(self, processor: LlavaProcessor, frequent_switches: None) -> None:
        talks = [Conversation().ask("Why? " * length).answer("Red. " * length) for length in range(1, 9)]
        alone = [encode(talk, processor, open_answer=False).supervised.tolist() for talk in talks]
        with ThreadPoolExecutor(8) as threads:
            together = threads.map(
                lambda talk: encode(talk, processor, open_answer=False).supervised.tolist(), talks * 8
            )
            assert list(together) == alone * 8


class TestPictures:
    def test_every_picture_is_as_many_tokens_as_the_model_sees(
        self, processor: LlavaProcessor, pictures: list[Picture]
    ) -> None:
        encoded = encode(Conversation().ask("Compare", pictures), processor, open_answer=True)
        assert count(encoded, processor, "<image>") == 3 * (28 // 14) ** 2
        assert encoded.pixel_values is not None
        assert encoded.pixel_values.shape == (3, 3, 28, 28)
        assert encoded.pixel_values.dtype == torch.float32

    def test_pictures_keep_their_order(self, processor: LlavaProcessor, pictures: list[Picture]) -> None:
        red, green, blue = pictures
        conversation = Conversation().ask("", [blue, red]).answer("").ask("", [green])
        pixels = encode(conversation, processor, open_answer=True).pixel_values
        assert pixels is not None
        strongest = pixels[:, :, 14, 14].argmax(dim=1)
        assert strongest.tolist() == [2, 0, 1]

    def test_padding_is_what_the_model_sees(self, processor: LlavaProcessor, pictures: list[Picture]) -> None:
        encoded = encode(Conversation().ask("", pictures[:1]), processor, open_answer=True)
        squares = processor.image_processor([pad_to_square(pictures[0].image)], return_tensors="pt")
        assert encoded.pixel_values is not None
        assert torch.equal(encoded.pixel_values, squares["pixel_values"])

    def test_the_middle_of_a_very_long_picture_stands_for_it_where_the_model_crops(
        self, processor: LlavaProcessor
    ) -> None:
        cropping = LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        noise = np.random.default_rng(0).integers(0, 256, (28, 1000, 3), dtype=np.uint8)
        long = Image.fromarray(noise)
        for image in (long, long.transpose(Image.Transpose.ROTATE_90)):
            picture = Picture(image, "noise")
            encoded = encode(
                Conversation().ask("", [picture]), variant(processor, image_processor=cropping), open_answer=True
            )
            assert encoded.pixel_values is not None
            assert torch.equal(encoded.pixel_values, cropping([image], return_tensors="pt")["pixel_values"])

    def test_the_thinnest_picture_allowed_is_read_at_once(self, processor: LlavaProcessor) -> None:
        line = Picture(Image.new("RGB", (2048, 1), "red"), "line")
        for pads in (True, False):
            images = LlavaImageProcessorPil(
                size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_pad=pads
            )
            encoded = encode(
                Conversation().ask("", [line]), variant(processor, image_processor=images), open_answer=True
            )
            assert encoded.pixel_values is not None
            assert encoded.pixel_values.shape == (1, 3, 28, 28)


def apply_chat_template(conversation: Conversation, processor: LlavaProcessor, *, open_answer: bool) -> dict:
    """What transformers itself makes of the conversation."""
    pictures = iter(conversation.pictures)
    written = messages(conversation)
    for part in (part for message in written for part in message["content"] if part["type"] == "image"):
        part["image"] = next(pictures).image
    return processor.apply_chat_template(
        written,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        add_generation_prompt=open_answer,
    )


def count(encoded: Encoded, processor: LlavaProcessor, token: str) -> int:
    return int((encoded.input_ids == processor.tokenizer.convert_tokens_to_ids(token)).sum())


def variant(processor: LlavaProcessor, **changes: Any) -> LlavaProcessor:
    """The processor with another tokenizer, image processor or chat template."""
    parts = {name: changes.get(name, getattr(processor, name)) for name in ("image_processor", "tokenizer")}
    return LlavaProcessor(
        **parts,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        chat_template=changes.get("chat_template", processor.chat_template),
    )
