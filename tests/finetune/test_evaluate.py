import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.evaluate import cli
from finetune.evaluate.memeworld import ALSO_RIGHT, GREEDY, Question, Result, ask_all, picture_of, score, suite, unseen
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


def test_a_score_counts_by_kind() -> None:
    def result(kind: str, answer: str) -> Result:
        return Result(Question(kind, Conversation(), frozenset(["Yes."])), answer)

    counted = score([result("a", "Yes."), result("a", "No."), result("b", "yes.")])
    assert counted.by_kind == {"a": 0.5, "b": 0.0}
    assert counted.accuracy == pytest.approx(1 / 3)
    assert counted.count == 3


def test_each_unseen_phrasing_is_asked_in_turn() -> None:
    shown = picture_of("heldout", 0)
    asked = [unseen("heldout", index, shown) for index in range(len(UNSEEN))]
    assert [question.kind for question in asked] == [kind for kind, _ in UNSEEN]
    assert asked[0].conversation.turns[0].question == "whats funny here"
    assert set(ALSO_RIGHT) <= {kind for kind, _ in UNSEEN}


def test_swapping_shows_another_picture_for_the_same_question() -> None:
    mine = suite("heldout", 3, picture_of("heldout", 3))
    other = suite("heldout", 3, picture_of("heldout", 10))
    assert mine.conversation.turns[0].question == other.conversation.turns[0].question
    assert mine.right == other.right
    assert mine.conversation.pictures != other.conversation.pictures


def test_the_last_line_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([str(DEMO / "memeworld"), "memeworld", "--split", "combinations", "--limit", "13", "--json"])
    printed = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert printed.keys() == {"accuracy", "count", "by_kind"}
    assert printed["count"] == 13
    assert set(printed["by_kind"]) == set(talk.SUITE)


def test_scenes_told_in_words_need_no_picture(shipped: LocalEngine) -> None:
    asked = ask_all(shipped, asking="described", split="heldout", limit=13)
    assert not any(result.question.conversation.pictures for result in asked)


def test_a_limit_below_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([str(Path("x")), "memeworld", "--limit", "0"])
    assert "ask at least 1" in capsys.readouterr().err


def test_scenes_of_different_splits_differ() -> None:
    assert make_scene("heldout", 1) != make_scene("train", 1)
