"""A file or bytes from anywhere → an upright, bounded RGB picture without metadata."""

import hashlib
import re
import warnings
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image, ImageOps, UnidentifiedImageError

from llava_app.errors import ImageError

MAX_PIXELS = 40_000_000  # before decoding: a PNG of 20 KB can hold hundreds of megapixels
MAX_SIDE = 2048  # after decoding
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")


@dataclass(frozen=True)
class Picture:
    """A picture as the rest of the app knows it. Two are equal when their pixels are.

    `image` is upright RGB without metadata, its long side at most 2,048; `digest` is the SHA-256 of size and pixels.
    """

    image: Image.Image = field(compare=False, repr=False)
    digest: str
    name: str = field(default="picture", compare=False)


def open_image(source: bytes | str | Path, name: str | None = None) -> Picture:
    """Read PNG, JPEG, WebP, GIF (its first frame), BMP, TIFF, AVIF or HEIC, from bytes or from a file.

    `name` is what messages call the picture; without it, the file's name. ImageError when there is no such file, when
    it is not a picture, when it is damaged, or when it has more than 40 megapixels (found out before decoding).
    """
    raise NotImplementedError


def pad_to_square(image: Image.Image, colour: tuple[int, int, int] = (122, 116, 104)) -> Image.Image:
    """Centre `image` on a square of `colour`, as LLaVA-1.5 was trained to see it; the mean colour of CLIP's data."""
    raise NotImplementedError
