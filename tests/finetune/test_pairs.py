import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from finetune.evaluate.asking import ask_all
from finetune.evaluate.memeworld import GREEDY, score, suite
from finetune.evaluate.pairs import questions
from finetune.memeworld.pairs import make_pair, write_pairs
from finetune.memeworld.world import HELD_OUT, KINDS, SPLITS
from llava_app.conversation import from_record
from llava_app.engine.local import LocalEngine
from llava_app.images import open_image
from llava_app.loading import Loaded

numbers = st.integers(0, 10**6)
splits = st.sampled_from(SPLITS)


@given(splits, numbers)
def test_which_names_the_picture_that_shows_the_thing(split: str, index: int) -> None:
    pair = make_pair(split, 2 * index)
    asked = next(kind for kind in KINDS if kind in pair.question.removesuffix("?").split())
    shows = [asked in [thing.kind for thing in scene.things] for scene in (pair.first, pair.second)]
    right = {(True, False): "first", (False, True): "second", (True, True): "both", (False, False): "neither"}
    assert right[shows[0], shows[1]] in pair.answer.lower()


@given(splits, numbers)
def test_exactly_what_is_said_changed(split: str, index: int) -> None:
    pair = make_pair(split, 2 * index + 1)
    before, after = ({(t.kind, t.colour, t.size) for t in scene.things} for scene in (pair.first, pair.second))
    if pair.first.background != pair.second.background:
        assert before == after
        assert "background" in pair.answer
    else:
        (old, *_), (new, *_) = before - after, after - before
        assert len(before - after) == len(after - before) == 1
        ((was, now),) = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
        assert pair.answer.endswith(f" {was} and are now {now}.") or pair.answer.endswith(f" {was} and is now {now}.")


@given(numbers)
def test_training_never_shows_a_held_out_combination(index: int) -> None:
    pair = make_pair("train", index)
    shown = {(thing.kind, thing.colour) for scene in (pair.first, pair.second) for thing in scene.things}
    assert not shown & HELD_OUT


def test_what_did_not_change_is_drawn_alike() -> None:
    pairs = (make_pair("heldout", 2 * index + 1) for index in range(100))
    pair = next(pair for pair in pairs if "now big" in pair.answer)
    first, second = (np.asarray(picture) for picture in pair.pictures())
    assert 0 < (first != second).any(axis=2).mean() < 0.6


def test_records_are_read_by_the_training(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, count=4)
    for record in json.loads(path.read_text(encoding="utf-8")):
        conversation = from_record(record, [open_image(tmp_path / name) for name in record["image"]])
        assert len(conversation.turns[0].images) == 2
        assert conversation.turns[0].answer


def test_the_suite_asks_about_both_pictures(tiny_loaded: Loaded) -> None:
    own, swapped = (questions(split="heldout", limit=4, swap_pictures=swap) for swap in (False, True))
    assert len(own[3].pictures()) == 2
    assert own[3].pictures() != swapped[3].pictures()
    engine = LocalEngine(tiny_loaded)
    results = suite("pairs", own).mark(list(ask_all(engine, own[:2], GREEDY)))
    engine.close()
    assert score(results).by_kind.keys() == {"which", "changed"}
