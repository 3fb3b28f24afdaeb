"""A clip from anywhere → some of its frames, evenly over its time, and a strip that shows them."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
from PIL import Image, ImageDraw

from llava_app.errors import VideoError
from llava_app.images import MAX_PIXELS, Picture, open_image, picture_of

MAX_BYTES = 200_000_000
MAX_SECONDS = 180
MAX_FRAMES = 20_000  # that a clip may have
FRAMES = 32  # that are kept of it: what OneVision was trained with
MAX_SIDE = 768  # of a kept frame: twice what any tower sees
STRIP = 8  # frames in a row of the strip
THUMBNAIL = 128  # pixels, the long side of a frame in the strip


@dataclass(frozen=True)
class Clip(Picture):
    """Frames of a clip in order. `image` is a strip of them with their times, for people; models see the frames."""

    frames: tuple[Picture, ...] = field(default=(), compare=False, repr=False)
    times: tuple[float, ...] = field(default=(), compare=False)  # seconds from the beginning, of each frame
    seconds: float = field(default=0.0, compare=False)  # the whole clip's

    @property
    def stills(self) -> tuple[Picture, ...]:
        return self.frames

    def thinned(self, count: int) -> "Clip":
        """The clip with `count` of its frames, evenly, or with all if it has no more."""
        if count >= len(self.frames):
            return self
        chosen = [(2 * place + 1) * len(self.frames) // (2 * count) for place in range(count)]
        frames = [self.frames[place] for place in chosen]
        return replace(_clip(frames, [self.times[place] for place in chosen], name=self.name), seconds=self.seconds)


def open_clip(source: bytes | str | Path, name: str | None = None, *, frames: int = FRAMES) -> Clip:
    """Read MP4, WebM, MOV, MKV or an animated GIF, from bytes or a file, and keep at most `frames` frames of it.

    `name` is what messages call the clip. VideoError when it is not a clip, is damaged, or is larger, longer or of
    more frames than is allowed.
    """
    name = name or ("clip" if isinstance(source, bytes) else Path(source).name)
    data = source if isinstance(source, bytes) else _read(Path(source), name)
    if len(data) > MAX_BYTES:
        raise VideoError(
            f"{name} has {len(data) / 1e6:,.0f} MB; the limit is {MAX_BYTES / 1e6:.0f}. Cut or shrink it and try again."
        )
    try:
        times, seconds = _timeline(data, name)
        chosen = [_at(times, seconds * (place + Fraction(1, 2)) / frames) for place in range(frames)]
        images = _decode(data, chosen)
    except (av.FFmpegError, IndexError, ValueError) as error:  # IndexError: no stream of pictures
        raise VideoError(
            f"{name} is no clip that can be read here, or it is damaged. Save it as MP4 (H.264)."
        ) from error
    if not images:
        raise VideoError(f"{name} has no frame that can be read. Save it anew and try again.")
    begin = float(times[0])
    pictures = [picture_of(image, f"{name} at {float(time) - begin:.1f} s") for time, image in images]
    clip = _clip(pictures, [float(time) - begin for time, _ in images], name=name)
    return replace(clip, seconds=float(seconds))


def open_moving(path: str | Path) -> Picture:
    """The clip in a file; a GIF that does not move is a picture. Raises VideoError, ImageError."""
    name = Path(path).name
    if name.lower().endswith(".gif") and not _moves(path):
        return open_image(path)
    return open_clip(path)


def as_gif(clip: Clip) -> bytes:
    """The frames as an animation, each for as long as it was shown."""
    ends = (*clip.times[1:], max(clip.seconds, clip.times[-1] + 0.1))
    durations = [round(1000 * (end - begin)) for begin, end in zip(clip.times, ends, strict=True)]
    file = BytesIO()
    first, *others = (frame.image for frame in clip.frames)
    first.save(file, "GIF", save_all=True, append_images=others, duration=durations)
    return file.getvalue()


def _moves(path: str | Path) -> bool:
    """Whether a GIF has more than one frame; what cannot be read does not."""
    try:
        with Image.open(path, formats=["GIF"]) as image:
            return bool(getattr(image, "is_animated", False))
    except Exception:  # on damaged data Pillow raises anything; whoever opens it names what is wrong
        return False


def _read(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)  # enough to find out that it is too much
    except OSError as error:
        raise VideoError(f"{name} cannot be opened as a file. Check that it is one and may be read.") from error


def _timeline(data: bytes, name: str) -> tuple[list[Fraction], Fraction]:
    """When each frame is shown, in order and in seconds, and how long the clip is; nothing is decoded for it."""
    times: list[Fraction] = []
    length = Fraction(0)  # of the last frame
    with av.open(BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        if stream.width * stream.height > MAX_PIXELS:
            raise VideoError(f"{name} is {stream.width} × {stream.height} pixels, which is too large. Shrink it.")
        for packet in container.demux(stream):
            if packet.pts is None:
                continue
            times.append(packet.pts * packet.time_base)
            length = (packet.duration or 0) * packet.time_base
            if len(times) > MAX_FRAMES or times[-1] - times[0] > MAX_SECONDS:
                raise VideoError(
                    f"{name} is longer than {MAX_SECONDS} seconds or {MAX_FRAMES:,} frames. Cut it and try again."
                )
    times.sort()
    return times, times[-1] - times[0] + length


def _at(times: list[Fraction], moment: Fraction) -> Fraction:
    """The time of the frame that is shown at a moment after the beginning."""
    return times[max(0, bisect_right(times, times[0] + moment) - 1)]


def _decode(data: bytes, chosen: Sequence[Fraction]) -> list[tuple[Fraction, Image.Image]]:
    """The frames with these times, upright; fewer where the clip is damaged."""
    waiting = set(chosen)
    images: list[tuple[Fraction, Image.Image]] = []
    with av.open(BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            if frame.pts is None or frame.time_base is None:
                continue
            time = frame.pts * frame.time_base
            if time in waiting:
                waiting.remove(time)
                images.append((time, _upright(frame)))
            if not waiting:
                break
    return images


def _upright(frame: Any) -> Image.Image:
    """A frame as it is meant to be seen: telephones write how they were held beside the pixels."""
    image = frame.to_image()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _clip(frames: Sequence[Picture], times: Sequence[float], *, name: str) -> Clip:
    digest = hashlib.sha256("".join(frame.digest for frame in frames).encode()).hexdigest()
    return Clip(_strip(frames, times), digest, name, tuple(frames), tuple(times))


def _strip(frames: Sequence[Picture], times: Sequence[float]) -> Image.Image:
    """The frames in rows, each with its time."""
    thumbnails = []
    for frame, time in zip(frames, times, strict=True):
        thumbnail = frame.image.copy()
        thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
        ImageDraw.Draw(thumbnail).text((3, 1), f"{time:.1f} s", "white", stroke_width=1, stroke_fill="black")
        thumbnails.append(thumbnail)
    width, height = thumbnails[0].size
    columns = min(STRIP, len(frames))
    strip = Image.new("RGB", (columns * width, -(-len(frames) // columns) * height), "white")
    for place, thumbnail in enumerate(thumbnails):
        strip.paste(thumbnail, (place % columns * width, place // columns * height))
    return strip
