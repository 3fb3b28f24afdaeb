"""A file or bytes from anywhere → an upright, bounded RGB picture without metadata."""

import hashlib
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO
from weakref import WeakValueDictionary

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from llava_app.errors import ImageError

MAX_PIXELS = 40_000_000  # before decoding: a PNG of 20 KB can hold hundreds of megapixels
MAX_SIDE = 2048  # after decoding
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")

_in_use: WeakValueDictionary[str, Image.Image] = WeakValueDictionary()  # by digest: the same one is in memory once


@dataclass(frozen=True)
class Picture:
    """A picture as the rest of the app knows it. Two are equal when their pixels are.

    `image` is upright RGB without metadata, its long side at most 2,048; `digest` is the SHA-256 of size and pixels.
    """

    image: Image.Image = field(compare=False, repr=False)
    digest: str
    name: str = field(default="picture", compare=False)

    @property
    def stills(self) -> tuple["Picture", ...]:
        """The pictures that it consists of: itself, and of a clip the frames."""
        return (self,)


def open_image(source: bytes | str | Path, name: str | None = None) -> Picture:
    """Read PNG, JPEG, WebP, GIF (its first frame), BMP, TIFF, AVIF or HEIC, from bytes or from a file.

    `name` is what messages call the picture; without it, the file's name. ImageError when there is no such file, when
    it is not a picture, when it is damaged, or when it has more than 40 megapixels (found out before decoding).
    """
    name = _shown_name(name or ("picture" if isinstance(source, bytes) else str(source)))
    with _open_stream(source, name) as stream:
        colours = _decode(_identify(stream, name), name)
    return picture_of(_on_white(_turn_upright(colours)), name)


def picture_of(image: Image.Image, name: str) -> Picture:
    """A picture of upright RGB pixels."""
    data = image.tobytes()
    digest = hashlib.sha256(f"{image.width}x{image.height} ".encode() + data).hexdigest()
    clean = _in_use.get(digest) or Image.frombytes("RGB", image.size, data)  # a new image: no metadata comes along
    return Picture(_in_use.setdefault(digest, clean), digest, name)


def living_bytes() -> int:
    """Bytes of the pixels of all pictures that anything here still holds, each counted once."""
    images = filter(None, [reference() for reference in _in_use.valuerefs()])
    return sum(3 * image.width * image.height for image in images)


def pad_to_square(image: Image.Image, colour: tuple[int, int, int] = (122, 116, 104)) -> Image.Image:
    """Centre `image` on a square of `colour`, as LLaVA-1.5 was trained to see it (its default: CLIP's mean colour)."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def framed(picture: Picture, mode: str) -> Picture:
    """The picture as a square: "pad" shows all of it on grey, "crop" its middle; "own" leaves it, and clips, alone."""
    width, height = picture.image.size
    if mode == "own" or width == height or picture.stills != (picture,):
        return picture
    if mode == "pad":
        return picture_of(pad_to_square(picture.image), picture.name)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return picture_of(picture.image.crop((left, top, left + side, top + side)), picture.name)


def as_seen(pixels_T3HW: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> list[Image.Image]:
    """The tiles of a prepared picture as pictures again, to show a person what the model sees.

    `mean` and `std` are those that the pixels (float, red green blue from 0 to 1) were normalised with.
    """
    colours_THW3 = pixels_T3HW.transpose(0, 2, 3, 1) * np.asarray(std) + np.asarray(mean)
    return [Image.fromarray(tile) for tile in (colours_THW3 * 255).round().clip(0, 255).astype(np.uint8)]


@cache
def _prepare_pillow() -> None:
    """Teach Pillow HEIC, and make it refuse where it would only warn of a decompression bomb."""
    import pillow_heif

    pillow_heif.register_heif_opener()
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def _shown_name(name: str) -> str:
    """The last part of a path, fit to stand in a message."""
    base = re.split(r"[/\\]", name)[-1]
    return "".join(filter(str.isprintable, base)) or "picture"


def _open_stream(source: bytes | str | Path, name: str) -> BinaryIO:
    try:
        stream = BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115  the caller closes it
    except FileNotFoundError as error:
        raise ImageError(f"There is no file {name}. Check its name, or choose another.") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ImageError(f"{name} cannot be opened as a file. Check that it is one and may be read.") from error
    if not stream.read(1):
        stream.close()
        raise ImageError(f"{name} is empty (0 bytes). Choose another file.")
    stream.seek(0)
    return stream


def _identify(stream: BinaryIO, name: str) -> Image.Image:
    """The picture with its header read and its size allowed; nothing is decoded yet."""
    _prepare_pillow()
    try:
        image = Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is not a picture that can be read here (PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF, HEIC), "
            "or its beginning is damaged. Save it as PNG or JPEG and try again."
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(int(re.findall(r"\d+", str(error))[0]), name) from error
    except Exception as error:
        raise _damaged(name) from error
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(image.width * image.height, name)
    return image


def _decode(image: Image.Image, name: str) -> Image.Image:
    """The first frame as RGB, or RGBA where something shines through; its long side at most MAX_SIDE."""
    try:
        image.draft(None, (MAX_SIDE, MAX_SIDE))  # a JPEG can be decoded at a half, a quarter or an eighth
        image.load()
        colours = _eight_bit(image).convert("RGBA" if image.has_transparency_data else "RGB")
    except Exception as error:  # on damaged data Pillow's decoders raise anything from OSError to struct.error
        raise _damaged(name) from error
    colours.thumbnail((MAX_SIDE, MAX_SIDE))
    return colours


def _damaged(name: str) -> ImageError:
    return ImageError(f"{name} is damaged or cut short and cannot be read. Save it anew and try again.")


def _too_large(pixels: int, name: str) -> ImageError:
    megapixels = f"{math.ceil(pixels / 100_000) / 10:,}".removesuffix(".0")  # rounded up: 40.01 is not 40
    return ImageError(
        f"{name} is {megapixels} megapixels; the limit is {MAX_PIXELS // 1_000_000}. Resize it and try again."
    )


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits to 8; grey of 32 bits or of fractions, whose white is not known, stretched from 0 to 255."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in ("I", "F"):
        return image
    values = np.nan_to_num(np.asarray(image, np.float64), nan=0, posinf=0, neginf=0)
    values = values - values.min()
    return Image.fromarray((values * (255 / max(values.max(), 1e-300))).astype(np.uint8))


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF, of many kinds: the picture itself is sound, and most are upright
        return image


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image)
    return canvas
