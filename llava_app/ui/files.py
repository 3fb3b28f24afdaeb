"""Files that came with a message, as pictures and clips; and back, for the box."""

from collections.abc import Sequence
from pathlib import Path

from gradio.processing_utils import save_bytes_to_cache, save_pil_to_cache
from gradio.utils import get_upload_folder

from llava_app.errors import ImageError
from llava_app.images import Picture, open_image
from llava_app.limits import LOCAL, Limits, check_room

CLIPS = (".mp4", ".webm", ".mov", ".mkv", ".gif")


def open_files(files: Sequence[str], limits: Limits = LOCAL) -> tuple[Picture, ...]:
    """The pictures and clips in these uploaded files. Raises ImageError, VideoError; BusyError when memory is full."""
    if len(files) > limits.pictures:
        raise ImageError(
            f"There are {len(files)} pictures in this message; the limit is {limits.pictures}. Remove some, then send."
        )
    return tuple(_open(file, limits) for file in files)


def save(picture: Picture) -> str:
    """A file with this picture or clip that the box can show and send again."""
    if picture.stills == (picture,):
        return save_pil_to_cache(picture.image, get_upload_folder(), "picture", "png")
    from llava_app.video import Clip, as_gif  # av takes half a second to import

    assert isinstance(picture, Clip)
    return save_bytes_to_cache(as_gif(picture), "clip.gif", get_upload_folder())


def _open(file: str, limits: Limits) -> Picture:
    check_room(limits)
    if Path(file).suffix.lower() not in CLIPS:
        return open_image(file)
    from llava_app.video import open_moving  # as above

    return open_moving(file)
