"""Small print: larger pictures whose lines each fit into one tile, and the shipped model with tiles."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.evaluate.small_print import questions
from finetune.memeworld.small_print import SIDE, draw_small_print, with_tiles, write_small_print
from finetune.memeworld.world import SPLITS, make_scene
from llava_app.checkpoints import built_in, read_card
from llava_app.conversation import from_record
from llava_app.images import open_image
from llava_app.loading import load
from llava_app.prompts import prepare


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SPLITS), st.integers(0, 10**6))
def test_every_line_lies_in_one_tile(split: str, index: int) -> None:
    scene = make_scene(split, index)
    bare = draw_small_print(replace(scene, claim=None, tag=None), index)
    written = np.asarray(draw_small_print(scene, index)) != np.asarray(bare)
    rows, columns = np.nonzero(written.any(axis=2))
    for line, half in zip(scene.lines(), (rows < SIDE // 2, rows >= SIDE // 2), strict=True):
        assert half.any() == (line is not None)
        assert len(set(columns[half] // (SIDE // 2))) <= 1
        assert set(rows[half] % (SIDE // 2) // 16) <= {0, 6}  # the rows in which the tower has learned to read


def test_the_records_ask_about_the_drawn_pictures(tmp_path: Path) -> None:
    path = write_small_print(tmp_path, count=2)
    for index, record in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        picture = open_image(tmp_path / record["image"])
        assert picture.image == draw_small_print(make_scene("train", index), index)
        assert from_record(record, [picture]).turns[0].answer


def test_the_suite_asks_in_turn_what_is_written_and_what_the_joke_is() -> None:
    own, swapped = (questions(split="heldout", limit=4, swap_pictures=swap) for swap in (False, True))
    assert [question.category for question in own] == ["text", "joke"] * 2
    assert all("no text" not in question.right[0] for question in own)
    assert own == swapped
    assert own[0].pictures() != swapped[0].pictures()


def test_with_tiles_the_weights_are_the_same_and_a_picture_is_seen_in_five(tmp_path: Path) -> None:
    with_tiles(built_in(), tmp_path / "tiles")
    card = read_card(tmp_path / "tiles")
    before, after = load(built_in(), "float32"), load(card, "float32")
    new = after.model.state_dict()
    assert all(torch.equal(new.pop(name), weight) for name, weight in before.model.state_dict().items())
    assert list(new) == ["model.image_newline"]
    seen = prepare(draw_small_print(make_scene("train", 0), 0), after.processor)
    assert len(seen.pixel_values) == 5
    assert seen.tokens == 64 + 16 * 17
    assert (card.template, card.image_mode, card.stage) == ("vicuna_v1", "anyres", "instruct")
