"""The templates write the strings that LLaVA was trained on, character by character."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from transformers import LlavaProcessor

from llava_app import prompts
from llava_app.conversation import Conversation
from llava_app.errors import ModelError
from llava_app.images import Picture
from llava_app.prompts import TEMPLATES, encode, messages, render, template_text

VICUNA, PLAIN = template_text("vicuna_v1"), template_text("plain")
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PICTURE = Picture(Image.new("RGB", (20, 10), "red"), "red")
JOKE = Conversation().ask("What is funny?", [PICTURE]).answer("A joke.")


def test_vicuna_v1_is_the_string_that_llava_was_trained_on() -> None:
    assert render(JOKE.ask("Why?"), VICUNA, open_answer=True).text == (
        f"{SYSTEM} USER: <image>\nWhat is funny? ASSISTANT: A joke.</s>USER: Why? ASSISTANT:"
    )


def test_a_finished_conversation_ends_with_the_end_token() -> None:
    assert render(JOKE, VICUNA, open_answer=False).text.endswith("USER: <image>\nWhat is funny? ASSISTANT: A joke.</s>")


def test_a_picture_without_text() -> None:
    conversation = Conversation().ask("", [PICTURE])
    assert render(conversation, VICUNA, open_answer=True).text == f"{SYSTEM} USER: <image>\n ASSISTANT:"


def test_text_without_a_picture() -> None:
    assert render(Conversation().ask("Hi"), VICUNA, open_answer=True).text == f"{SYSTEM} USER: Hi ASSISTANT:"


def test_several_pictures_in_one_turn_and_one_in_a_later_turn() -> None:
    conversation = Conversation().ask("Compare", [PICTURE] * 2).answer("Same").ask("And this?", [PICTURE])
    assert render(conversation, VICUNA, open_answer=True).text == (
        f"{SYSTEM} USER: <image>\n<image>\nCompare ASSISTANT: Same</s>USER: <image>\nAnd this? ASSISTANT:"
    )


@pytest.mark.parametrize(("system", "begin"), [("Be brief.", "Be brief. USER: Hi"), ("", "USER: Hi")])
def test_a_system_prompt_of_ones_own_replaces_the_default(system: str, begin: str) -> None:
    conversation = replace(Conversation().ask("Hi"), system=system)
    assert render(conversation, VICUNA, open_answer=True).text == f"{begin} ASSISTANT:"


def test_plain_is_picture_caption_and_newline() -> None:
    assert render(JOKE, PLAIN, open_answer=False).text == "<image>A joke.\n"
    assert render(JOKE.retry(), PLAIN, open_answer=True).text == "<image>"


def test_white_space_and_braces_are_kept_as_typed() -> None:
    conversation = Conversation().ask("  {{ 1 + 1 }} {% raw %}\n").answer("\n {# x #} ")
    expected = f"{SYSTEM} USER:   {{{{ 1 + 1 }}}} {{% raw %}}\n ASSISTANT: \n {{# x #}} </s>"
    assert render(conversation, VICUNA, open_answer=False).text == expected


@pytest.mark.parametrize("template", TEMPLATES)
def test_servers_may_send_contents_as_plain_strings(processor: LlavaProcessor, template: str) -> None:
    as_parts = messages(Conversation(system="Be brief.").ask("Hi").answer("Hello"))
    as_strings = [{"role": part["role"], "content": part["content"][0]["text"]} for part in as_parts]
    options = {"chat_template": template_text(template), "add_generation_prompt": True}
    rendered = processor.apply_chat_template(as_strings, **options)
    assert rendered == processor.apply_chat_template(as_parts, **options)
    assert "Hello" in rendered


def test_templates_are_the_files_that_exist() -> None:
    folder = Path(prompts.__file__).parent / "templates"
    assert {file.stem for file in folder.glob("*.jinja")} == set(TEMPLATES)


@pytest.mark.parametrize("name", ["vicuna", "../vicuna_v1", ""])
def test_an_unknown_template_is_named_with_those_that_exist(name: str) -> None:
    with pytest.raises(ModelError, match=r"There is no template .*; choose one of plain, vicuna_v1"):
        template_text(name)


def test_open_and_finished_conversations_are_not_taken_for_each_other(processor: LlavaProcessor) -> None:
    for conversation, open_answer in ((JOKE, True), (JOKE.retry(), False), (Conversation(), False)):
        with pytest.raises(ValueError, match="turn"):
            render(conversation, VICUNA, open_answer=open_answer)
        with pytest.raises(ValueError, match="turn"):
            encode(conversation, processor, open_answer=open_answer)
