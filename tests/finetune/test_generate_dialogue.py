import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.instruct.dialogue import Exchange, format_dialogue, parse_description, parse_dialogue

WORDS = st.text(st.characters(categories=["L", "N"], include_characters=" ,.?!'"), min_size=1, max_size=40)
SAID = WORDS.map(lambda text: " ".join(text.split())).filter(lambda text: text and not text.startswith((".", "-")))
DIALOGUES = st.lists(st.builds(Exchange, SAID, SAID), min_size=1, max_size=6).map(tuple)
TWO = (Exchange("What is it?", "A cat."), Exchange("Is it red?", "No, it is grey."))


@settings(max_examples=50)
@given(DIALOGUES)
def test_what_is_written_in_our_form_is_read_back(dialogue: tuple[Exchange, ...]) -> None:
    assert parse_dialogue(format_dialogue(dialogue)) == dialogue


@pytest.mark.parametrize(
    "text",
    [
        "Question: What is it?\nAnswer: A cat.\nQuestion: Is it red?\nAnswer: No, it is grey.",
        "Sure! Here it is:\n\nQuestion: What is it?\nAnswer: A cat.\n\nQ: Is it red?\nA: No, it is grey.",
        "**Question 1:** What is it?\n**Answer 1:** A cat.\n\n"
        "**Question 2:** Is it red?\n**Answer 2:** No, it is grey.",
        "1. Question: What is it?\n   Answer: A cat.\n2. Question: Is it red?\n   Answer: No, it is grey.",
        "Question:\nWhat is it?\n===\nAnswer:\nA cat.\n===\nQuestion:\nIs it red?\n===\nAnswer:\nNo, it is grey.",
        "User: What is it?\nAssistant: A cat.\nUser: Is it red?\nAssistant: No, it is grey.",
        '```json\n[{"question": "What is it?", "answer": "A cat."}, {"question": "Is it red?", '
        '"answer": "No, it is grey."}]\n```',
        '{"conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}, '
        '{"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "No, it is grey."}]}',
    ],
)
def test_slips_of_form_are_forgiven(text: str) -> None:
    assert parse_dialogue(text) == TWO


def test_a_half_exchange_stays_half() -> None:
    assert parse_dialogue("Question: What is it?\nQuestion: Is it red?\nAnswer: No.") == (
        Exchange("What is it?", ""),
        Exchange("Is it red?", "No."),
    )
    assert parse_dialogue("Answer: Yes.") == (Exchange("", "Yes."),)


def test_text_without_any_label_is_no_dialogue() -> None:
    assert parse_dialogue("There is a cat.") == ()
    assert parse_dialogue("") == ()
    assert parse_dialogue("[1, 2]") == ()


@pytest.mark.parametrize(
    "text",
    [
        "A cat sleeps.\n\nIt is grey.",
        "Sure, I can do that!\n\nA cat sleeps.\n\nIt is grey.",
        "Here is a detailed description:\n\nA cat sleeps.\n\nIt is grey.",
        "**Detailed description:** A cat sleeps.\n\nIt is grey.",
        "Question: Describe it.\nAnswer: A cat sleeps.\n\nIt is grey.",
    ],
)
def test_a_description_is_read_without_what_stands_around_it(text: str) -> None:
    assert parse_description(text) == "A cat sleeps.\n\nIt is grey."
