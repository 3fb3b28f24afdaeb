import pytest

from finetune.instruct import filters
from finetune.instruct.dialogue import Dialogue, Exchange
from finetune.instruct.filters import fingerprint, refusal
from finetune.instruct.prompts import read_domain

KNOWN = {"dog", "person", "frisbee"}
GOOD = (Exchange("What is the dog doing?", "It is jumping."), Exchange("Is there a cat?", "No, there is no cat."))


def reason(*dialogue: Exchange | tuple[str, str], kind: str = "reasoning", finish: str = "stop") -> str | None:
    """Why the dialogue is refused, None when it is kept."""
    exchanges: Dialogue = tuple(Exchange(*exchange) for exchange in dialogue)
    found = refusal(exchanges, kind, finish, known=KNOWN, lexicon=read_domain("general").lexicon)
    return found and found.reason


def test_a_good_dialogue_is_kept() -> None:
    assert reason(*GOOD, kind="conversation") is None


def test_what_the_token_limit_cut_off_is_refused() -> None:
    assert reason(*GOOD, kind="conversation", finish="length") == filters.CUT_OFF


@pytest.mark.parametrize(
    "answer",
    [
        "According to the caption, a dog jumps.",
        "The bounding box shows a dog.",
        "A dog is at [0.312, 0.284, 0.655, 0.803].",
        "Based on the description, a dog jumps.",
        "The provided context speaks of a dog.",
    ],
)
def test_captions_and_boxes_are_not_spoken_of(answer: str) -> None:
    assert reason(("What is there?", answer)) == filters.SOURCES


def test_cardboard_boxes_and_a_wide_context_are_no_sources() -> None:
    assert reason(("What is there?", "Some boxes in the context of a move.")) is None


def test_a_teacher_that_excuses_itself_is_refused() -> None:
    assert reason(("What is there?", "I'm sorry, I cannot see the image.")) == filters.SELF


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is there?", "A dog and two cats."),
        ("What is the cat doing?", "It is sleeping."),
        ("What is there?", "There is no bird, but there is a kitten."),
        ("Is there a bird?", "No, there is a cat."),
        ("What does he hold?", "A hot dog."),
    ],
)
def test_what_is_not_in_the_context_is_refused(question: str, answer: str) -> None:
    assert reason((question, answer)) == filters.UNKNOWN


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Is there a cat?", "No, there is no cat."),
        ("How many cats are there?", "None."),
        ("What is there?", "A puppy with a woman; cats cannot be seen."),
        ("Why does the dog jump?", "It may be chasing a car that we do not see. It probably wants the frisbee."),
    ],
)
def test_other_words_for_it_denials_and_suppositions_are_kept(question: str, answer: str) -> None:
    assert reason((question, answer)) is None


def test_a_supposition_is_for_reasoning_only() -> None:
    assert reason(("What is there?", "It may be a cat."), *GOOD, kind="conversation") == filters.UNKNOWN


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What colour is the brown dog?", "The dog is brown."),
        ("Where does the dog on the left stand?", "On the left."),
        ("The dog is jumping, isn't it?", "Yes, it is."),
        ("It catches the frisbee, right?", "Yes."),
    ],
)
def test_a_question_that_gives_its_answer_away_is_refused(question: str, answer: str) -> None:
    assert reason((question, answer)) == filters.GIVEN_AWAY


def test_a_choice_and_a_yes_or_no_are_not_given_away() -> None:
    assert reason(("Which is larger, the dog or the frisbee?", "The dog.")) is None
    assert reason(("Is the dog brown?", "Yes, the dog is brown.")) is None


def test_empty_and_one_sided_dialogues_are_refused() -> None:
    assert reason() == filters.EMPTY
    assert reason(("", "")) == filters.EMPTY
    assert reason(("What is it?", "")) == filters.ONE_SIDED
    assert reason(("What is it?", "A dog."), kind="conversation") == filters.ONE_SIDED
    said_yes = [("Is it a dog?", "Yes."), ("Does it jump?", "Yes, it does."), ("Is it brown?", "Yes!")]
    assert reason(*said_yes, kind="conversation") == filters.ONE_SIDED


def test_a_question_asked_twice_is_refused() -> None:
    assert reason(*GOOD, ("what is the dog doing", "Jumping."), kind="conversation") == filters.TWICE


def test_a_picture_mark_in_a_text_is_refused() -> None:
    assert reason(("What is <image>?", "A dog.")) == filters.SOURCES


def test_fingerprints_overlook_signs_and_case() -> None:
    assert fingerprint((Exchange("What is it?", "A dog."),)) == fingerprint((Exchange("what is it", "a DOG"),))
    assert fingerprint((Exchange("What is it?", "A dog."),)) != fingerprint((Exchange("What is it?", "A cat."),))
