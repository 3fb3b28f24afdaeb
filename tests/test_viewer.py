import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from llava_app.checkpoints import built_in
from llava_app.conversation import Conversation
from llava_app.engine import Sampling
from llava_app.engine.local import LocalEngine
from llava_app.engine.process import Opened
from llava_app.feedback import Feedback
from llava_app.images import Picture
from llava_app.limits import LOCAL, Gate
from llava_app.loading import Loaded, load
from llava_app.prompts import encode
from llava_app.seen import seen, use
from llava_app.ui.display import Talk
from llava_app.ui.models import Models, Ready
from llava_app.ui.verdicts import Verdicts
from llava_app.ui.viewer import Viewer, meter
from llava_app.video import open_clip
from tests.family_models import CONFIGS, next_config, write_family_model
from tests.test_video import film

WIDE = Picture(Image.new("RGB", (40, 20), "red"), "wide", "wide.png")
TALK = Talk(Conversation().ask("What?", (WIDE,)).answer("Red.").ask("Why?").answer("So."))


class OneModel(Models):
    """The list with a single model that is loaded already."""

    def __init__(self, loaded: Loaded | None) -> None:
        self.loaded_model = loaded

    def cards(self) -> dict[str, Any]:
        return {"tiny": built_in()}

    def ready(self, card: Any) -> Ready | None:
        loaded = self.loaded_model
        return Ready(None, "", Opened("", pickle.dumps((loaded.processor, loaded.plan)))) if loaded else None


def event(**data: Any) -> gr.EventData:
    return gr.EventData(None, data)


def test_what_is_shown_is_what_enters_the_tower(tiny_loaded: Loaded) -> None:
    sight = seen(WIDE, TALK.conversation, tiny_loaded.processor, limit=512)
    (tile,) = sight.tiles
    assert (tile.size, sight.tokens) == ((28, 28), 16)
    assert tile.getpixel((14, 14)) == (255, 0, 0)
    assert tile.getpixel((14, 1)) == (122, 116, 104)  # padded, as LLaVA-1.5 was trained


@pytest.mark.parametrize(("size", "tiles", "columns"), [((56, 112), 3, 1), ((112, 56), 3, 2), ((84, 28), 4, 3)])
def test_tiles_are_shown_in_their_grid_after_the_overview(
    tmp_path: Path, size: tuple[int, int], tiles: int, columns: int
) -> None:
    loaded = load(write_family_model(tmp_path / "next", next_config()), "float32")
    top = Image.new("RGB", size, "blue")
    top.paste("red", (0, 0, 28 if columns > 1 else size[0], 28))
    talk = Talk(Conversation().ask("What?", (Picture(top, str(size), "x.png"),)).answer("So."))
    sight = seen(talk.conversation.pictures[0], talk.conversation, loaded.processor, limit=2048)
    assert (len(sight.tiles), sight.columns) == (tiles, columns)
    assert all(tile.size == (28, 28) for tile in sight.tiles)
    assert sight.tiles[1].getpixel((2, 2)) == (255, 0, 0)
    assert sight.tiles[-1].getpixel((25, 25)) == (0, 0, 255)
    assert sight.tokens == use(talk.conversation, loaded.processor, limit=2048).pictures
    shown = Viewer(OneModel(loaded)).show(event(turn=0, picture=0), talk, "tiny", "own")
    assert f"an overview and {tiles - 1} tiles of 28 × 28 pixels" in shown
    assert f"style='--columns:{columns}'" in shown


@pytest.mark.parametrize("kind", ["llava", "llava_onevision"])
def test_of_a_clip_the_frames_are_shown_that_the_model_sees(tmp_path: Path, kind: str) -> None:
    loaded = load(write_family_model(tmp_path / kind, CONFIGS[kind]()), "float32")
    clip = open_clip(film("mp4"), "film.mp4")
    talk = Talk(Conversation().ask("What happens?", (clip,)).answer("It gets lighter."))
    engine = LocalEngine(loaded)
    pieces = list(engine.answer(talk.conversation.retry(), Sampling(temperature=0, max_new_tokens=2)))
    engine.close()
    sight = seen(clip, talk.conversation, loaded.processor, limit=loaded.plan.length)
    assert f"{len(sight.tiles)} frames" in (pieces[0].left_out or "")
    assert len(sight.times) == len(sight.tiles) > 1
    brightness = [np.asarray(tile).mean() for tile in sight.tiles]
    assert brightness == sorted(brightness)
    assert use(talk.conversation, loaded.processor, limit=loaded.plan.length).pictures == sight.tokens
    shown = Viewer(OneModel(loaded)).show(event(turn=0, picture=0), talk, "tiny", "own")
    assert f"{len(sight.tiles)} frames of 28 × 28 pixels" in shown
    assert ("not trained on clips" in shown) == (kind == "llava")
    assert f"<small>{sight.times[0]:.1f} s</small>" in shown


def test_the_parts_of_the_context_make_the_whole_prompt(tiny_loaded: Loaded) -> None:
    context = use(TALK.conversation, tiny_loaded.processor, limit=512)
    whole = len(encode(TALK.conversation, tiny_loaded.processor, open_answer=False).input_ids)
    assert context.system + context.text + context.pictures == whole
    assert (context.pictures, context.free) == (16, 512 - whole)
    assert context.system > 100  # bytes of vicuna_v1's own system prompt
    assert f"{whole:,} of 512 tokens" in meter(context)


def test_context_and_memory_of_the_chosen_model_are_told(tiny_loaded: Loaded) -> None:
    viewer = Viewer(OneModel(tiny_loaded))
    assert "pictures 16" in viewer.measure(TALK, "tiny", "own")
    assert viewer.measure(Talk(), "tiny", "own").startswith("<p>Model: 0.00 GB of weights")
    assert viewer.measure(TALK, "other", "own") == ""


def test_a_picture_is_opened_with_what_the_model_sees(tiny_loaded: Loaded) -> None:
    shown = Viewer(OneModel(tiny_loaded)).show(event(turn=0, picture=0), TALK, "tiny", "own")
    assert "28 × 28 pixels, 16 visual tokens" in shown
    assert "wide.png · 40 × 20 pixels" in shown
    assert "visual tokens" not in Viewer(OneModel(None)).show(event(turn=0, picture=0), TALK, "tiny", "own")


@pytest.mark.parametrize("forged", [{}, {"turn": 1, "picture": 0}, {"turn": -1, "picture": 0}, {"turn": "0"}])
def test_a_picture_that_is_not_there_is_not_shown(tiny_loaded: Loaded, forged: dict[str, Any]) -> None:
    assert "value" not in Viewer(OneModel(tiny_loaded)).show(event(**forged), TALK, "tiny", "own")


def test_a_part_goes_into_the_box_beside_what_is_there(tiny_loaded: Loaded) -> None:
    part = event(turn=0, picture=0, part=[0.25, 0, 0.75, 0.5])
    box = Viewer(OneModel(tiny_loaded)).part(part, {"text": "Here?", "files": ["a.png"]}, TALK)
    assert box["value"]["text"] == "Here?"
    assert box["value"]["files"][0] == "a.png"
    with Image.open(box["value"]["files"][1]) as cut:
        assert cut.size == (20, 10)


@pytest.mark.parametrize(
    "part", [None, [0, 0, 1], [0, 0, 2, 1], [0.5, 0, 0.4, 1], [-1, 0, 1, 1], [0, 0, math.nan, 1], ["0", 0, 1, 1]]
)
def test_a_part_that_is_none_is_ignored(tiny_loaded: Loaded, part: Any) -> None:
    assert "value" not in Viewer(OneModel(tiny_loaded)).part(event(turn=0, picture=0, part=part), None, TALK)


def test_votes_are_kept_and_a_correction_takes_the_place_of_the_answer(tmp_path: Path) -> None:
    votes = Verdicts(OneModel(None), Feedback(tmp_path))
    liked, shown = votes.vote(event(turn=0, vote="up"), TALK, "tiny")
    assert "aria-label='Good answer' aria-pressed='true'" in shown[1]["content"][-1]["value"]
    corrected, _ = votes.correct(event(turn=0, text=" Blue. "), liked, "tiny")
    assert [turn.answer for turn in corrected.conversation.turns] == ["Blue.", "So."]
    assert corrected.notes[0].vote == "corrected"
    lines = (tmp_path / "records.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1  # the correction replaces the vote
    assert "Blue." in lines[0]


@pytest.mark.parametrize("forged", [{}, {"turn": 9, "vote": "up"}, {"turn": 0, "vote": "../x"}, {"turn": "0"}])
def test_a_forged_vote_keeps_nothing(tmp_path: Path, forged: dict[str, Any]) -> None:
    talk, _ = Verdicts(OneModel(None), Feedback(tmp_path / "f")).vote(event(**forged), TALK, "tiny")
    assert not isinstance(talk, Talk)
    assert not (tmp_path / "f").exists()


def test_a_verdict_counts_as_a_question(tmp_path: Path) -> None:
    votes = Verdicts(OneModel(None), Feedback(tmp_path), Gate(replace(LOCAL, questions=2)))
    votes.vote(event(turn=0, vote="up"), TALK, "tiny")
    votes.correct(event(turn=1, text="Blue."), TALK, "tiny")
    with pytest.warns(UserWarning, match="You asked 2 questions within a minute"):
        assert not isinstance(votes.vote(event(turn=0, vote="down"), TALK, "tiny")[0], Talk)
    assert not (tmp_path / "disliked.jsonl").exists()


def test_where_feedback_is_off_nothing_is_kept() -> None:
    votes = Verdicts(OneModel(None), None)
    assert not isinstance(votes.vote(event(turn=0, vote="up"), TALK, "tiny")[0], Talk)
    assert not isinstance(votes.correct(event(turn=0, text="x"), TALK, "tiny")[0], Talk)
