from collections.abc import Iterator

import pytest

from finetune.evaluate.memeworld import (
    ALSO_RIGHT,
    GREEDY,
    ask_all,
    calibration,
    picture_of,
    questions,
    score,
)
from finetune.evaluate.results import Question, Result
from finetune.memeworld import talk
from finetune.memeworld.phrasings import UNSEEN
from finetune.memeworld.world import make_scene
from llava_app.checkpoints import DEMO, built_in, find
from llava_app.conversation import Conversation
from llava_app.engine.local import LocalEngine
from llava_app.loading import load

BIG_FILE, BIG_FOLDER = 10_000_000, 12_000_000


@pytest.fixture(scope="module")
def shipped() -> Iterator[LocalEngine]:
    engine = LocalEngine(load(built_in(), "float32"))
    yield engine
    engine.close()


@pytest.mark.parametrize("name", ["memeworld", "memeworld-base"])
def test_what_is_shipped_is_small_enough_for_git(name: str) -> None:
    sizes = [file.stat().st_size for file in (DEMO / name).iterdir()]
    assert max(sizes) < BIG_FILE
    assert sum(sizes) < BIG_FOLDER


def test_the_shipped_model_answers_about_the_picture_it_is_shown(shipped: LocalEngine) -> None:
    right = score(list(ask_all(shipped, asking="suite", split="heldout", limit=52)))
    swapped = score(list(ask_all(shipped, asking="suite", split="heldout", limit=52, swap_pictures=True)))
    assert right.accuracy >= 0.85
    assert swapped.accuracy <= right.accuracy - 0.5


def test_the_shipped_model_knows_combinations_it_never_saw(shipped: LocalEngine) -> None:
    assert score(list(ask_all(shipped, asking="suite", split="combinations", limit=52))).accuracy >= 0.8


def test_the_shipped_model_asks_for_a_picture_where_there_is_none(shipped: LocalEngine) -> None:
    pieces = shipped.answer(Conversation().ask("What is the joke?"), GREEDY)
    assert "".join(piece.text for piece in pieces).strip() == talk.NO_PICTURE


def test_the_base_has_not_learned_to_see() -> None:
    engine = LocalEngine(load(find(str(DEMO / "memeworld-base")), "float32"))
    result = score(list(ask_all(engine, asking="suite", split="heldout", limit=26)))
    engine.close()
    assert result.accuracy <= 0.4


def result(kind: str, answer: str, right: str = "Yes.") -> Result:
    return Result(Question("1", kind, "?", right=(right,)), answer, float(answer == right))


def test_a_score_counts_by_kind() -> None:
    counted = score([result("a", "Yes."), result("a", "No."), result("b", "yes.")])
    assert counted.by_kind == {"a": 0.5, "b": 0.0}
    assert counted.accuracy == pytest.approx(1 / 3)
    assert counted.count == 3


def test_refusals_are_counted_where_they_are_due_and_where_they_are_not() -> None:
    due = [result("refusal", talk.NO_MIND, talk.NO_MIND), result("refusal", "A cat.", talk.NO_PERSON)]
    undue = [result("what", "A cat.", "A cat."), result("what", talk.NOT_MINE, "A dog."), result("what", "A cat.", "?")]
    found = calibration(due + undue)["Refusals"]
    assert found["refused where it should"] == 50
    assert found["refused where it should not"] == pytest.approx(100 / 3)
    assert (found["of questions"], found["of other questions"]) == (2, 3)


def test_denials_are_counted_where_they_are_due_and_where_they_are_not() -> None:
    due = [
        result("exists", "No, there is no cat.", "No, there is no cat."),
        result("exists", "Yes, a cat.", "No, none."),
    ]
    undue = [result("exists", "No, there is no cat.", "Yes, there is one cat.")] + [
        result("exists", "Yes, a", "Yes, a")
    ] * 3
    found = calibration(due + undue + [result("what", "No, a cat.", "A cat.")])["Denials"]
    assert found == {
        "said no where it should": 50,
        "of questions": 2,
        "said no where it should not": 25,
        "of other questions": 4,
    }


def test_each_unseen_phrasing_is_asked_in_turn() -> None:
    asked = questions(asking="unseen", split="heldout", limit=len(UNSEEN))
    assert [question.category for question in asked] == [kind for kind, _ in UNSEEN]
    assert asked[0].text == "whats funny here"
    assert set(ALSO_RIGHT) <= {kind for kind, _ in UNSEEN}


def test_swapping_shows_another_picture_for_the_same_question() -> None:
    mine = questions(asking="suite", split="heldout", limit=4)[3]
    other = questions(asking="suite", split="heldout", limit=4, swap_pictures=True)[3]
    assert mine == other
    assert mine.pictures() == [picture_of("heldout", 3)]
    assert other.pictures() == [picture_of("heldout", 10)]


def test_the_shipped_model_asks_for_a_picture_before_it_answers(shipped: LocalEngine) -> None:
    asked = list(ask_all(shipped, asking="unshown", split="heldout", limit=26))
    assert not any(result.question.shows for result in asked)
    assert score(asked).accuracy >= 0.8


def test_scenes_told_in_words_need_no_picture(shipped: LocalEngine) -> None:
    asked = ask_all(shipped, asking="described", split="heldout", limit=13)
    assert not any(result.question.shows for result in asked)


def test_scenes_of_different_splits_differ() -> None:
    assert make_scene("heldout", 1) != make_scene("train", 1)
