"""Clips: evenly chosen frames with their times, bounded, and shown to each class of model as it knows them."""

from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from llava_app import video
from llava_app.conversation import Conversation
from llava_app.engine.local import LocalEngine
from llava_app.errors import VideoError
from llava_app.loading import Loaded
from llava_app.prompts import prepare_clip, tokenise
from llava_app.video import Clip, open_clip
from tests.family_models import GREEDY, generated, generated_from

CODECS = {"mp4": "libx264", "webm": "libvpx-vp9", "gif": "gif"}


def film(kind: str, *, frames: int = 40, rate: int = 10, size: tuple[int, int] = (64, 48)) -> bytes:
    """A clip whose frames get lighter from black to white, so that a frame tells its time."""
    file = BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(CODECS[kind], rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if kind == "gif" else "yuv420p"
        for number in range(frames):
            grey = np.full((size[1], size[0], 3), round(255 * number / (frames - 1)), dtype=np.uint8)
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24").reformat(format=stream.pix_fmt))
            )
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return film("mp4")


@pytest.mark.parametrize("kind", CODECS)
def test_frames_are_chosen_evenly_over_the_time(kind: str) -> None:
    clip = open_clip(film(kind), f"a.{kind}", frames=4)
    assert clip.seconds == pytest.approx(4.0, abs=0.11)
    assert clip.times == pytest.approx([0.5, 1.5, 2.5, 3.5], abs=0.11)
    lightness = [np.asarray(frame.image).mean() / 255 for frame in clip.frames]
    assert lightness == pytest.approx([time / 3.9 for time in clip.times], abs=0.1)


def test_a_clip_of_few_frames_keeps_them_all() -> None:
    clip = open_clip(film("mp4", frames=3), frames=8)
    assert len(clip.frames) == 3
    assert clip.times == pytest.approx([0, 0.1, 0.2])


def test_a_file_is_named_by_its_last_part(tmp_path: Path, mp4: bytes) -> None:
    (tmp_path / "ball.mp4").write_bytes(mp4)
    assert open_clip(tmp_path / "ball.mp4").name == "ball.mp4"
    with pytest.raises(VideoError, match=r"absent\.mp4 cannot be opened"):
        open_clip(tmp_path / "absent.mp4")


def test_two_clips_are_equal_when_their_frames_are(mp4: bytes) -> None:
    assert open_clip(mp4).digest == open_clip(mp4).digest
    assert open_clip(mp4).digest != open_clip(film("mp4", rate=5, frames=20)).digest


def test_a_person_sees_a_strip_with_every_frame(mp4: bytes) -> None:
    clip = open_clip(mp4, frames=12)
    width, height = clip.image.size
    assert (width // 8, height // 2) == (64, 48)
    rows = np.asarray(clip.image).mean(axis=2)
    assert rows[40, 5] < rows[40, 64 * 7 + 5] < rows[48 + 40, 64 * 3 + 5]


@pytest.mark.parametrize("data", [b"", b"no clip", Image.new("RGB", (4, 4)).tobytes()])
def test_what_is_no_clip_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(VideoError, match=r"joke\.mp4 is no clip that can be read"):
        open_clip(data, "joke.mp4")


def test_a_clip_that_is_cut_short_gives_the_frames_that_are_there_or_is_named() -> None:
    data = film("webm")
    assert open_clip(data[: len(data) * 3 // 4]).frames
    with pytest.raises(VideoError, match="clip"):
        open_clip(film("mp4")[:500])


@pytest.mark.parametrize(
    ("limit", "value", "match"),
    [
        ("MAX_BYTES", 100, r"has .* MB; the limit"),
        ("MAX_SECONDS", 2, "longer than 2 seconds"),
        ("MAX_FRAMES", 9, "or 9 frames"),
        ("MAX_PIXELS", 64 * 48 - 1, "64 × 48 pixels"),
    ],
)
def test_every_limit_is_named(monkeypatch: pytest.MonkeyPatch, mp4: bytes, limit: str, value: int, match: str) -> None:
    monkeypatch.setattr(video, limit, value)
    with pytest.raises(VideoError, match=match):
        open_clip(mp4)


def test_thinning_keeps_what_is_in_the_middle_of_each_part(mp4: bytes) -> None:
    clip = open_clip(mp4, frames=8)
    assert clip.thinned(2).times == (clip.times[2], clip.times[6])
    assert clip.thinned(8) is clip
    assert clip.thinned(1).seconds == clip.seconds


def generated_about(loaded: Loaded, conversation: Conversation, clip: Clip) -> str:
    """What `generate` answers: OneVision to the clip, the others to its frames as pictures."""
    config = loaded.model.config
    if config.model_type != "llava_onevision":
        return generated(loaded, conversation)
    seen = prepare_clip(clip, loaded.processor)
    ids_S, _ = tokenise(conversation, loaded.processor, picture_tokens=[seen.tokens], open_answer=True)
    ids_S = ids_S.where(ids_S != config.image_token_id, config.video_token_id)
    return generated_from(loaded, ids_S, pixel_values_videos=seen.pixel_values[None])


def test_a_clip_is_answered_as_generate_answers_it(family_engine: LocalEngine, family: Loaded, mp4: bytes) -> None:
    clip = open_clip(mp4, frames=3)
    asked = Conversation().ask("What happens?", [clip])
    pieces = list(family_engine.answer(asked, GREEDY))
    assert "".join(piece.text for piece in pieces) == generated_about(family, asked, clip)
    expected = "sees 3 frames of the clip" if family.card.name == "llava_onevision" else "3 frames as separate pictures"
    assert expected in (pieces[0].left_out or "")


def test_a_long_clip_is_thinned_to_what_fits(family_engine: LocalEngine, mp4: bytes) -> None:
    asked = Conversation().ask("What happens?", [open_clip(mp4, frames=32)] * 3)
    pieces = list(family_engine.answer(asked, GREEDY))
    assert pieces[-1].finish in ("stop", "length")
    assert "frames" in (pieces[0].left_out or "")
