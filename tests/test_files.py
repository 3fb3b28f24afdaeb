"""Files of a message: pictures, clips, and what only looks like one."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from llava_app.errors import BusyError, ImageError, VideoError
from llava_app.limits import LOCAL, check
from llava_app.ui.asked import ask
from llava_app.ui.display import Talk
from llava_app.ui.files import open_files, save
from llava_app.video import Clip
from tests.test_video import film


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif"])
def test_a_clip_is_known_by_its_ending(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"film.{kind.upper()}"
    path.write_bytes(film(kind, frames=6))
    (clip,) = open_files([str(path)])
    assert isinstance(clip, Clip)
    assert len(clip.stills) == 6


def test_a_gif_that_does_not_move_is_a_picture_and_a_broken_one_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), "red").save(tmp_path / "still.gif")
    (picture,) = open_files([str(tmp_path / "still.gif")])
    assert picture.stills == (picture,)
    assert picture.image.getpixel((5, 5)) == (255, 0, 0)
    (tmp_path / "broken.gif").write_bytes(b"GIF89a nonsense")
    with pytest.raises(ImageError, match=r"broken\.gif"):
        open_files([str(tmp_path / "broken.gif")])
    (tmp_path / "broken.mp4").write_bytes(b"nonsense")
    with pytest.raises(VideoError, match=r"broken\.mp4 is no clip"):
        open_files([str(tmp_path / "broken.mp4")])


def test_too_many_are_refused_before_any_is_opened() -> None:
    with pytest.raises(ImageError, match="9 pictures in this message; the limit is 8"):
        open_files(["nowhere.png"] * (LOCAL.pictures + 1))


def test_a_picture_goes_back_into_the_box_as_it_was(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), "teal").save(tmp_path / "a.png")
    (picture,) = open_files([str(tmp_path / "a.png")])
    assert open_files([save(picture)]) == (picture,)


def test_four_frames_of_a_clip_count_as_one_picture_of_a_conversation(tmp_path: Path) -> None:
    (tmp_path / "clip.gif").write_bytes(film("gif", frames=10))
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    clip, still = str(tmp_path / "clip.gif"), str(tmp_path / "a.png")
    limits = replace(LOCAL, pictures_kept=7)
    talk = ask(Talk(), "What moves?", [clip, clip, still], limits)
    assert len(talk.conversation.pictures) == 3
    answered = replace(talk, conversation=talk.conversation.answer("A ball."))
    check(ask(answered, "And now?", [], limits).conversation, limits)
    told = r"would hold 10 pictures, of a clip 4 frames counted as one; the limit is 7\. Send less, or start a new chat"
    with pytest.raises(ImageError, match=told):
        check(ask(answered, "And here?", [clip], limits).conversation, limits)


@pytest.mark.parametrize("name", ["nowhere.png", "nowhere.mp4"])
def test_nothing_is_opened_while_the_pictures_of_all_fill_the_memory(name: str) -> None:
    with pytest.raises(BusyError, match=r"fill 0\.0 GB of memory, which is the limit\. Ask without"):
        open_files([name], replace(LOCAL, picture_bytes=0))
