"""The conversation of the original LLaVA's `conversation.py` in each of its formats, character by character."""

from dataclasses import replace

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from llava_app.conversation import Conversation
from llava_app.images import Picture
from llava_app.prompts import TEMPLATES, end_tokens, render, template_text
from tests.fixtures_model import byte_tokenizer

USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN = USER.replace("user", "human")
VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
TALK = Conversation().ask("What is funny?", [Picture(Image.new("RGB", (2, 1)), "a")]).answer("A joke.").ask("Why?")


def chatml(system: str, newline: str = "") -> str:
    end = f"<|im_end|>{newline}"
    return (
        f"<|im_start|>system\n{system}{end}<|im_start|>user\n<image>\nWhat is funny?{end}"
        f"<|im_start|>assistant\nA joke.{end}<|im_start|>user\nWhy?{end}<|im_start|>assistant\n"
    )


def header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


GOLDEN = {
    "vicuna_v1": f"{USER} USER: <image>\nWhat is funny? ASSISTANT: A joke.</s>USER: Why? ASSISTANT:",
    "llava_v1": f"{HUMAN} USER: <image>\nWhat is funny? ASSISTANT: A joke.</s>USER: Why? ASSISTANT:",
    "llava_v0": (f"{HUMAN}###Human: <image>\nWhat is funny?###Assistant: A joke.###Human: Why?###Assistant:"),
    "mistral_instruct": "[INST] <image>\nWhat is funny? [/INST] A joke. </s>[INST] Why? [/INST]",
    "llava_llama_2": (
        f"[INST] <<SYS>>\n{VISION}\n<</SYS>>\n\n<image>\nWhat is funny? [/INST] A joke. </s><s>[INST] Why? [/INST]"
    ),
    "chatml_direct": chatml("Answer the questions."),
    "mpt": chatml(MPT),
    "qwen": chatml("You are a helpful assistant.", "\n"),
    "llama_3": (
        f"{header('system')}{VISION}<|eot_id|>{header('user')}<image>\nWhat is funny?<|eot_id|>"
        f"{header('assistant')}A joke.<|eot_id|>{header('user')}Why?<|eot_id|>{header('assistant')}"
    ),
    "plain": "<image>A joke.\n",
}


def test_every_template_has_its_golden_prompt() -> None:
    assert GOLDEN.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("name", GOLDEN)
def test_the_prompt_is_the_one_of_the_original(name: str) -> None:
    assert render(TALK, template_text(name), open_answer=True).text == GOLDEN[name]


@pytest.mark.parametrize("name", [name for name in GOLDEN if name != "plain"])
def test_what_is_learned_is_the_answer_and_what_ends_it(name: str) -> None:
    rendered = render(TALK.answer("Because."), template_text(name), open_answer=False)
    taught = [rendered.text[begin:end] for begin, end in rendered.answers]
    end = (*TEMPLATES[name], "</s>")[0]
    assert [text.strip() for text in taught] == [text + end for text in _spaced(name, "A joke.", "Because.")]
    assert rendered.text.startswith(GOLDEN[name])


def _spaced(name: str, *answers: str) -> list[str]:
    space = " " if name in ("mistral_instruct", "llava_llama_2") else ""
    return [answer + space for answer in answers]


@pytest.mark.parametrize("name", ["mistral_instruct", "llava_llama_2"])
def test_the_space_that_a_model_writes_before_its_end_token_is_not_doubled(name: str) -> None:
    talk = replace(TALK, turns=(replace(TALK.turns[0], answer="A joke. "), TALK.turns[1]))
    assert render(talk, template_text(name), open_answer=True).text == GOLDEN[name]


@pytest.mark.parametrize("name", [name for name in GOLDEN if name != "plain"])
def test_a_system_prompt_of_ones_own_stands_in_the_place_of_the_default(name: str) -> None:
    text = render(replace(TALK, system="Be brief."), template_text(name), open_answer=True).text
    assert text.count("Be brief.") == 1
    assert not any(default in text for default in (USER, HUMAN, VISION, MPT, "Answer the questions."))
    assert text.index("Be brief.") < text.index("What is funny?")


@pytest.mark.parametrize("name", GOLDEN)
def test_no_system_prompt_leaves_no_trace(name: str) -> None:
    text = render(replace(TALK, system=""), template_text(name), open_answer=True).text
    assert "SYS" not in text
    assert "system" not in text
    assert text.count("###") in (0, 4)


@pytest.fixture(scope="module")
def chatml_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    return tokenizer


def test_an_ending_that_is_a_token_ends_the_answer_as_one(chatml_tokenizer: PreTrainedTokenizerFast) -> None:
    im_end = chatml_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_tokens(chatml_tokenizer, "qwen") == [1, im_end]
    assert end_tokens(chatml_tokenizer, "vicuna_v1") == [1]
    assert end_tokens(chatml_tokenizer, "plain") == [1, *chatml_tokenizer.encode("\n", add_special_tokens=False)]


def test_an_ending_that_is_no_token_is_none(chatml_tokenizer: PreTrainedTokenizerFast) -> None:
    assert end_tokens(chatml_tokenizer, "llama_3") == [1]
    assert end_tokens(chatml_tokenizer, "llava_v0") == [1]
