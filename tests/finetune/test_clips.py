"""Clips of memeworld: the ball goes where the answer says, and the suite opens clips as uploads are opened."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.mixture import open_data
from finetune.data.pictures import open_picture
from finetune.evaluate.clips import questions
from finetune.memeworld.clips import FRAMES, WAYS, BallClip, make_clip, write_clips
from finetune.memeworld.several import write_several
from finetune.memeworld.world import SPLITS
from llava_app.conversation import from_record
from llava_app.images import open_image
from llava_app.video import Clip

UNIT = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def middles(clip: BallClip) -> np.ndarray:
    """(FRAMES, 2): where the ball's middle is in each frame, x and y in pixels, from the pixels that it changes."""
    empty = np.asarray(replace(clip, begin=(-1, -1), end=(-1, -1)).frames()[0])
    changed = [(np.asarray(frame) != empty).any(axis=2) for frame in clip.frames()]
    return np.array([[places.mean() for places in np.nonzero(mask)[::-1]] for mask in changed])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SPLITS), st.integers(0, 10**6))
def test_the_ball_goes_where_the_answer_says(split: str, index: int) -> None:
    clip = make_clip(split, index)
    assert clip.answer in WAYS
    moved = np.diff(middles(clip), axis=0)
    direction = np.array(UNIT[clip.answer.removesuffix(".").split()[-1]])
    assert (moved @ direction > 10).all()
    assert (abs(moved @ direction[::-1]) < 3).all()


def test_every_way_comes_and_training_shows_other_clips() -> None:
    assert {make_clip("train", index).answer for index in range(40)} == set(WAYS)
    assert make_clip("train", 0) != make_clip("heldout", 0)
    assert make_clip("train", 5) == make_clip("train", 5)


def test_the_suite_opens_clips_as_uploads() -> None:
    own, swapped = (questions(split="heldout", limit=2, swap_pictures=swap)[0].pictures()[0] for swap in (False, True))
    assert isinstance(own, Clip)
    assert len(own.frames) == FRAMES
    drawn = make_clip("heldout", 0).frames()
    for frame, image in zip(own.frames, drawn, strict=True):  # a GIF has 256 colours
        assert np.asarray(frame.image).astype(int) == pytest.approx(np.asarray(image).astype(int), abs=60)
    assert own != swapped


def test_records_show_the_frames_in_order(tmp_path: Path) -> None:
    (record,) = json.loads(write_clips(tmp_path, count=1).read_text(encoding="utf-8"))
    shown = from_record(record, [open_image(tmp_path / name) for name in record["image"]]).turns[0]
    clip = make_clip("train", 0)
    assert [picture.image for picture in shown.images] == clip.frames()
    assert (shown.question, shown.answer) == (clip.question, clip.answer)


def test_pairs_clips_and_what_was_known_are_one_mixture(tmp_path: Path) -> None:
    path = write_several(tmp_path, pairs=2, clips=3, rehearsal=5, processes=1)
    data = open_data(path)
    assert len(data) == 2 + 3 + 5 + 1
    for index in range(len(data)):
        record, part = data.read(index)
        assert all(open_picture(place).image.size == (224, 224) for place in part.places(record))
    assert path == write_several(tmp_path, pairs=9, clips=9, rehearsal=9, processes=1)
