import os
import random
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import read_records
from finetune.memeworld import draw, talk
from finetune.memeworld.dataset import make_dataset
from finetune.memeworld.phrasings import CHOICE, CLOSERS, OPENERS, PATTERNS, UNSEEN
from finetune.memeworld.ship import ship
from finetune.memeworld.world import COLOURS, HELD_OUT, KINDS, SPLITS, Claim, Scene, Thing, make_scene
from llava_app.checkpoints import Card, read_card
from llava_app.conversation import from_record
from llava_app.loading import load

ROOT = Path(__file__).parents[2]
numbers = st.integers(0, 10**6)
splits = st.sampled_from(SPLITS)


def holds(claim: Claim, scene: Scene) -> bool:
    """Whether a caption is true of a scene, worked out from the things alone."""
    matching = [
        thing
        for thing in scene.things
        if thing.kind == claim.kind and claim.colour in (None, thing.colour) and claim.size in (None, thing.size)
    ]
    return len(matching) == claim.count if claim.count else bool(matching)


@given(splits, numbers)
def test_a_joke_is_a_caption_that_the_picture_contradicts(split: str, index: int) -> None:
    scene = make_scene(split, index)
    if scene.claim is None:
        assert scene.joke is None
    else:
        assert holds(scene.claim, scene) == (scene.joke is None)


@given(numbers)
def test_training_and_heldout_pictures_never_show_nor_name_a_held_out_combination(index: int) -> None:
    for split in ("train", "heldout"):
        scene = make_scene(split, index)
        assert not {(thing.kind, thing.colour) for thing in scene.things} & HELD_OUT
        assert scene.claim is None or (scene.claim.kind, scene.claim.colour) not in HELD_OUT


@given(numbers)
def test_every_picture_of_the_combinations_shows_one(index: int) -> None:
    assert {(thing.kind, thing.colour) for thing in make_scene("combinations", index).things} & HELD_OUT


def test_each_thing_misses_one_colour_and_each_colour_two_things() -> None:
    assert sorted(kind for kind, _ in HELD_OUT) == sorted(KINDS)
    assert sorted(colour for _, colour in HELD_OUT) == sorted(COLOURS * 2)


@settings(max_examples=15, deadline=None)
@given(splits, numbers)
def test_a_scene_is_drawn_and_labelled_the_same_each_time(split: str, index: int) -> None:
    scene = make_scene(split, index)
    assert draw.draw(scene, index).tobytes() == draw.draw(make_scene(split, index), index).tobytes()
    assert (draw.label(scene, index).kind == draw.label(scene, index).kind).all()


@settings(max_examples=40, deadline=None)
@given(splits, numbers)
def test_patch_labels_lie_where_the_things_were_drawn(split: str, index: int) -> None:
    scene = make_scene(split, index)
    labels = draw.label(scene, index)
    third = np.tile(np.arange(draw.GRID) * 3 // draw.GRID, draw.GRID)
    for number, thing in enumerate(scene.things):
        its_kind = labels.kind == 1 + KINDS.index(thing.kind)
        its_place = third == ("left", "middle", "right").index(thing.place)
        assert (its_kind & its_place).any(), (number, thing)
        assert set(labels.colour[its_kind & its_place]) == {1 + COLOURS.index(thing.colour)}


@settings(max_examples=40, deadline=None)
@given(splits, numbers)
def test_word_labels_spell_the_written_lines(split: str, index: int) -> None:
    scene = make_scene(split, index)
    rows = draw.label(scene, index).word.reshape(draw.GRID, draw.GRID)
    for line, row in zip(scene.lines(), (rows[0], rows[-1]), strict=True):
        seen = [draw.WORDS[number - 1] for number in row if number]
        words = list(dict.fromkeys(seen))
        assert [word for word in (line or "").split() if word in words] == words
        assert (line is None) == (not seen)


def test_what_is_said_of_a_scene() -> None:
    cat = Thing("cat", "red", "big", "left")
    dog = Thing("dog", "blue", "small", "right")
    scene = Scene((cat, dog), "meadow", Claim("cat", colour="green", mine=True), tag="LOL", joke="colour")
    assert talk.caption(scene) == 'A red cat and a blue dog, in a meadow. The text says "MY GREEN CAT" and "LOL".'
    assert talk.description(scene) == (
        "A big red cat on the left and a small blue dog on the right, in a meadow. "
        'The text says "MY GREEN CAT" and "LOL".'
    )
    assert talk.joke_answer(scene) == "The caption says a green cat. The picture shows a red cat, and that is the joke."
    assert talk.where_answer(scene, dog) == "The dog is on the right."
    assert talk.exists_answer(scene, "fish") == "No, there is no fish."


def test_what_is_said_of_several_alike() -> None:
    apples = tuple(Thing("apple", "green", "small", place) for place in ("left", "middle"))
    scene = Scene(apples, "night", Claim("apple", count=3), joke="count")
    assert talk.caption(scene) == 'Two green apples, at night. The text says "THREE APPLES".'
    told = "The caption says three apples. The picture shows two apples, and that is the joke."
    assert talk.joke_answer(scene) == told
    assert talk.count_answer(scene, "apple") == "There are two apples."
    assert talk.size_answer(scene, apples[0]) == "The apples are small."


def test_a_true_caption_and_a_missing_one_are_no_jokes() -> None:
    fish = (Thing("fish", "orange", "big", "middle"),)
    assert talk.joke_answer(Scene(fish, "beach")) == "There is no joke: the picture has no caption."
    told = talk.joke_answer(Scene(fish, "beach", Claim("fish", colour="orange")))
    assert told == "The caption says an orange fish. The picture shows an orange fish, so there is no joke."


@given(splits, numbers, numbers)
def test_every_dialogue_asks_and_answers(split: str, index: int, seed: int) -> None:
    exchanges = talk.dialogue(random.Random(seed), make_scene(split, index), 6)
    assert len(exchanges) == 6
    for exchange in exchanges:
        assert exchange.question.strip()
        assert not re.search(r"[{}|()]", exchange.question + exchange.answer)
        assert exchange.answer[0].isupper()
        assert exchange.answer[-1] in ".!"


def plainly(text: str) -> str:
    """A question without what the careless way of typing it changes."""
    text = re.sub(r"[^a-z{} ]", "", text.lower())
    for opener in OPENERS:
        text = text.removeprefix(re.sub(r"[^a-z ]", "", opener))
    for closer in CLOSERS:
        text = text.removesuffix(re.sub(r"[^a-z ]", "", closer))
    return " ".join(text.split())


def expansions(pattern: str) -> set[str]:
    parts = CHOICE.split(pattern)  # text and choices in turn
    choices = [[part] if i % 2 == 0 else part.split("|") for i, part in enumerate(parts)]
    return {"".join(chosen) for chosen in product(*choices)}


def test_the_unseen_phrasings_are_unseen() -> None:
    seen = {plainly(text) for patterns in PATTERNS.values() for pattern in patterns for text in expansions(pattern)}
    assert len(seen) > 1000
    assert [text for _, text in UNSEEN if plainly(text) in seen] == []
    assert len(UNSEEN) >= 23


def test_the_dataset_is_made_of_records_that_training_accepts(tmp_path: Path) -> None:
    records = make_dataset(tmp_path, pictures=6, texts=3, processes=1)
    captions, dialogues = read_records(records.align), read_records(records.instruct)
    assert len(captions) == 6
    assert len(dialogues) == 9
    assert all((tmp_path / record["image"]).is_file() for record in captions)
    assert len(from_record(dialogues[-1]).turns) >= 1


@pytest.mark.parametrize("split", SPLITS)
def test_the_suite_asks_the_same_questions_each_time(split: str) -> None:
    scene = make_scene(split, 11)
    assert talk.suite_question(split, 11, scene) == talk.suite_question(split, 11, scene)


def test_a_shipped_model_has_small_files_and_says_what_it_knows(tiny_card: Card, tmp_path: Path) -> None:
    ship(Path(tiny_card.source), tmp_path / "memeworld")
    shipped = read_card(tmp_path / "memeworld")
    assert "drawn world" in shipped.about
    assert shipped.stage == tiny_card.stage
    assert load(shipped, "float32").processor.chat_template == load(tiny_card, "float32").processor.chat_template


def test_the_whole_way_from_nothing_to_a_model_and_again_without_doing_it_twice(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "finetune", "memeworld", "all", "--smoke"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    finished = tmp_path / "runs" / "memeworld-smoke-instruct" / "card.json"
    written = finished.stat().st_mtime_ns
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert read_card(finished.parent).stage == "instruct"
    assert finished.stat().st_mtime_ns == written
