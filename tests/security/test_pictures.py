"""Two thousand pictures that mean it no good: each is shown, or refused by name, in little memory."""

import io
import random
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from llava_app.errors import ImageError
from llava_app.images import MAX_SIDE, open_image
from tests.serving import PATIENCE, ROOT

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16")
KINDS = (
    "truncated",
    "bits flipped",
    "bytes overwritten",
    "piece doubled",
    "piece cut out",
    "another type",
    "size forged",
)
COUNT = 2_000
MOST_MEGABYTES = 900  # of the whole process, whose imports take some 250 of them


def seeds() -> list[bytes]:
    """Small sound pictures of every format, in every mode that the format knows."""
    import pillow_heif

    pillow_heif.register_heif_opener()
    rng, made = random.Random(0), []
    noise = Image.frombytes("RGB", (24, 16), rng.randbytes(24 * 16 * 3))
    for mode in MODES:
        image = Image.new(mode, (24, 16)) if mode in ("LAB", "HSV", "PA", "I;16") else noise.convert(mode)
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"):
            made.append(saved(image, kind))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        made += [saved(noise, kind, icc_profile=profile), saved(noise, kind, exif=exif)]
        made += [
            saved(noise, kind, icc_profile=rng.randbytes(200)),
            saved(noise, kind, exif=b"Exif\0\0" + rng.randbytes(60)),
        ]
    frames = [noise.rotate(turn) for turn in range(0, 80, 10)]
    made += [saved(noise, kind, save_all=True, append_images=frames) for kind in ("GIF", "PNG", "WEBP", "TIFF", "AVIF")]
    made += [
        saved(noise, "JPEG", progressive=True),
        saved(noise, "PNG", bits=2),
        saved(noise, "TIFF", compression="lzma"),
    ]
    made += [saved(noise.convert("CMYK"), "JPEG"), saved(noise.convert("P", colors=3), "PNG", transparency=b"\0\x80")]
    return [picture for picture in made if picture]


def saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    """The picture as a file; empty where the format does not know the mode."""
    file = io.BytesIO()
    try:
        image.save(file, kind, **how)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SyntaxError):
        return b""
    return file.getvalue()


def spoilt(picture: bytes, kind: str, rng: random.Random) -> bytes:
    data, at = bytearray(picture), rng.randrange(len(picture))
    piece = slice(at, at + rng.randrange(1, 40))
    if kind == "truncated":
        return picture[:at]
    if kind == "bits flipped":
        for _ in range(rng.randrange(1, 12)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if kind == "overwritten":
        data[piece] = rng.randbytes(len(data[piece]))
    if kind == "doubled":
        data[piece] = bytes(data[piece]) * rng.randrange(2, 60)
    if kind == "cut out":
        del data[piece]
    if kind == "another type":
        data[:12] = rng.choice(MAGIC)
    return resized(data, rng) if kind == "size forged" else bytes(data)


MAGIC = (
    b"\x89PNG\r\n\x1a\n\0\0\0\r",
    b"\xff\xd8\xff\xe0\0\x10JFIF\0\1",
    b"GIF89a\xff\xff\xff\xff\0\0",
    b"BM" + b"\xff" * 10,
    b"II*\0\x08\0\0\0\xff\xff\0\0",
    b"RIFF\xff\xff\xff\x7fWEBP",
    b"\0\0\0\x1cftypavif",
    b"%PDF-1.7 %%EO",
    b"<svg onload='",
    b"8BPS\0\1\0\0\0\0\0\0",
)


def resized(data: bytearray, rng: random.Random) -> bytes:
    """Another width and height in the header of a PNG, and a sound checksum; large numbers early on in others."""
    sides = [rng.choice((0, 1, 3, 4_000, 20_000, 65_535, 2**31 - 1)) for _ in range(2)]
    if data[1:4] == b"PNG":
        data[16:24] = struct.pack(">II", *sides)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    else:
        at = rng.randrange(4, min(60, len(data)))
        data[at : at + 4] = struct.pack("<HH", *(side & 0xFFFF for side in sides))
    return bytes(data)


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that would be large."""
    allowed, huge = (Image.new("1", (side, side)) for side in (6_300, 20_000))
    for kind, how in (("PNG", {}), ("GIF", {}), ("TIFF", {"compression": "tiff_deflate"})):
        yield f"{kind} of 39.7 megapixels", saved(allowed, kind, **how)
    yield "PNG of 400 megapixels", saved(huge, "PNG")
    for keyword in ("text", "icc"):
        info, how = PngImagePlugin.PngInfo(), {}
        if keyword == "text":
            info.add_text("a", "x" * 60_000_000, zip=True)  # 60 MB in 58 KB
        else:
            how["icc_profile"] = bytes(60_000_000)
        yield f"PNG {keyword}", saved(Image.new("L", (8, 8)), "PNG", pnginfo=info, **how)


def outcome(picture: bytes, name: str) -> str:
    """ "shown" or "refused"; anything else is an error."""
    try:
        image = open_image(picture, name).image
    except ImageError as error:
        return "refused" if re.match(rf"{re.escape(name)} (is|has|cannot) .*\. .*\.$", str(error)) else str(error)
    assert image.mode == "RGB"
    assert 0 < max(image.size) <= MAX_SIDE
    assert len(image.tobytes()) == image.width * image.height * 3
    return "shown"


def spoilt_pictures() -> Iterator[tuple[str, bytes]]:
    rng, sound = random.Random(8), seeds()
    for number in range(COUNT):
        kind = KINDS[number % len(KINDS)]
        yield f"{kind} {number}.png", spoilt(rng.choice(sound), kind, rng)


def peak() -> int:
    """The most bytes that this process had. Linux hands the figure of `resource` on from the parent process."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def main() -> None:
    """What the test reads: how many were shown and refused, and the most memory it took in megabytes."""
    from collections import Counter

    counts = Counter(outcome(picture, name) for name, picture in spoilt_pictures())
    told = Counter(outcome(picture, name) for name, picture in bombs() if picture)
    most = peak() // 2**20
    print(counts["shown"], counts["refused"], told["shown"], told["refused"], most)


@pytest.mark.skipif(sys.platform == "win32", reason="counts memory with the resource module, which Windows lacks")
def test_two_thousand_spoilt_pictures_and_bombs_are_shown_or_named_in_bounded_memory() -> None:
    command = [sys.executable, "-c", "from tests.security.test_pictures import main; main()"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert told.returncode == 0, told.stderr[-2000:]
    shown, refused, bombs_shown, bombs_refused, most = map(int, told.stdout.split())
    assert shown + refused == COUNT
    assert min(shown, refused) > COUNT / 10  # it is a test of both
    assert bombs_refused >= 2
    assert most < MOST_MEGABYTES, f"{most} MB; {bombs_shown} bombs shown"


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(mode, "PNG") for mode in ("L", "LA", "P", "RGB", "RGBA", "I;16")]
    + [("CMYK", "TIFF"), ("CMYK", "JPEG"), ("YCbCr", "JPEG"), ("I", "TIFF"), ("F", "TIFF")],
)
def test_every_mode_is_seen_in_its_colours(mode: str, kind: str) -> None:
    left, right = (250, 20, 20), (255, 255, 255)
    image = Image.new("RGB", (32, 16), left)
    image.paste(right, (16, 0, 32, 16))
    image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) << 8) if mode == "I;16" else image.convert(mode)
    seen = open_image(saved(image, kind)).image
    (red, green, _), white = seen.getpixel((4, 8)), seen.getpixel((28, 8))
    assert min(white) > 240
    if mode in ("P", "RGB", "RGBA", "CMYK", "YCbCr"):
        assert red > 200 > 80 > green
    else:
        assert red == green < 130  # grey, and darker than white
