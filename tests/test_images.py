"""Pictures of every kind come in upright, bounded and bare, or are refused by name."""

import subprocess
import sys
import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import pillow_heif
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageDraw

from llava_app import images
from llava_app.errors import ImageError
from llava_app.images import MAX_PIXELS, MAX_SIDE, Picture, framed, living_bytes, open_image, pad_to_square, picture_of

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
WITH_EXIF = ("PNG", "JPEG", "WEBP", "TIFF", "AVIF", "HEIF")


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    pillow_heif.register_heif_opener()
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def red_left_blue_right(width: int = 64, height: int = 32) -> Image.Image:
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def near(image: Image.Image, where: tuple[int, int], colour: tuple[int, int, int]) -> bool:
    """Whether a pixel has the colour, give or take what lossy formats lose."""
    pixel = image.getpixel(where)
    assert isinstance(pixel, tuple)
    return all(abs(a - b) < 24 for a, b in zip(pixel, colour, strict=True))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_becomes_rgb(kind: str) -> None:
    picture = open_image(saved(red_left_blue_right(), kind))
    assert picture.image.mode == "RGB"
    assert picture.image.size == (64, 32)
    assert near(picture.image, (4, 16), RED)
    assert near(picture.image, (60, 16), BLUE)


@pytest.mark.parametrize("kind", WITH_EXIF)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(kind: str, orientation: int) -> None:
    upright = Image.new("RGB", (64, 32), WHITE)
    ImageDraw.Draw(upright).rectangle((0, 0, 31, 15), RED)
    undo = [0, 1, 2, 3, 4, 5, 8, 7, 6][orientation]  # 6 and 8, quarter turns, undo each other
    stored = upright if undo == 1 else upright.transpose(TRANSPOSES[undo])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = open_image(saved(stored, kind, exif=exif.tobytes()))  # HEIC: becomes a rotation of its own
    assert picture.image.size == (64, 32)
    assert near(picture.image, (8, 8), RED)
    assert near(picture.image, (56, 8), WHITE)
    assert near(picture.image, (8, 24), WHITE)


TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def test_metadata_is_dropped() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "somebody"
    jpeg = saved(red_left_blue_right(), "JPEG", exif=exif, comment=b"secret", icc_profile=b"profile", dpi=(300, 300))
    image = open_image(jpeg).image
    assert image.info == {}
    assert dict(image.getexif()) == {}


def test_a_picture_that_many_people_send_is_in_memory_once() -> None:
    file = BytesIO()
    Image.new("RGB", (30, 20), "teal").save(file, "PNG")
    first, second = open_image(file.getvalue(), "a.png"), open_image(file.getvalue(), "b.png")
    assert first.image is second.image
    assert (first.name, second.name) == ("a.png", "b.png")


def test_damaged_exif_does_not_spoil_a_sound_picture() -> None:
    for damage in (b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own remarks about the damage
            assert open_image(saved(red_left_blue_right(), "JPEG", exif=damage)).image.size == (64, 32)


def test_the_first_frame_of_an_animation_is_shown() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        animation = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        assert near(open_image(animation).image, (8, 8), RED), kind


def half_transparent(mode: str) -> Image.Image:
    """Left half opaque and dark, right half fully transparent."""
    image = Image.new("RGBA", (64, 32), (0, 0, 0, 0))
    image.paste((20, 20, 20, 255), (0, 0, 32, 32))
    return image.convert(mode)


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("RGBA", "WEBP"), ("LA", "PNG"), ("RGBA", "TIFF")])
def test_transparency_becomes_white(mode: str, kind: str) -> None:
    image = open_image(saved(half_transparent(mode), kind)).image
    assert near(image, (8, 16), (20, 20, 20))
    assert near(image, (56, 16), WHITE)


def test_palette_transparency_becomes_white() -> None:
    palette = Image.new("P", (64, 32), 0)
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.paste(1, (32, 0, 64, 32))
    for kind, transparency in (("PNG", 1), ("PNG", bytes([255, 0])), ("GIF", 1)):
        image = open_image(saved(palette, kind, transparency=transparency)).image
        assert near(image, (8, 16), (200, 0, 0))
        assert near(image, (56, 16), WHITE)


def test_a_colour_marked_transparent_becomes_white() -> None:
    image = open_image(saved(red_left_blue_right(), "PNG", transparency=BLUE)).image
    assert near(image, (8, 16), RED)
    assert near(image, (56, 16), WHITE)


def test_half_transparent_black_is_grey() -> None:
    assert near(open_image(saved(Image.new("RGBA", (8, 8), (0, 0, 0, 128)))).image, (4, 4), (127, 127, 127))


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    grey = Image.fromarray(np.full((8, 8), 0x8000, np.uint16))
    for kind in ("PNG", "TIFF"):
        assert near(open_image(saved(grey, kind)).image, (4, 4), (128, 128, 128))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_grey_of_unknown_range_is_stretched(kind: type[np.generic]) -> None:
    ramp = np.linspace(-1000, 3000, 64).astype(kind).reshape(8, 8)
    image = open_image(saved(Image.fromarray(ramp), "TIFF")).image
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert image.getpixel((7, 7)) == WHITE
    assert near(image, (4, 4), (146, 146, 146))


def test_a_float_picture_of_one_value_or_of_none_is_black() -> None:
    for value in (0.5, np.nan, np.inf):
        image = open_image(saved(Image.fromarray(np.full((4, 4), value, np.float32)), "TIFF")).image
        assert image.getpixel((0, 0)) == (0, 0, 0)


def test_cmyk_and_one_bit_pictures_keep_their_colours() -> None:
    cmyk = saved(red_left_blue_right().convert("CMYK"), "JPEG")
    assert near(open_image(cmyk).image, (8, 16), RED)
    one_bit = open_image(saved(Image.new("1", (8, 8), 1))).image
    assert one_bit.getpixel((4, 4)) == WHITE


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_large_pictures_shrink_to_the_limit_and_keep_their_shape(kind: str) -> None:
    image = open_image(saved(red_left_blue_right(6000, 1500), kind)).image
    assert image.size == (MAX_SIDE, MAX_SIDE // 4)
    assert near(image, (10, 10), RED)
    assert near(image, (2030, 500), BLUE)


@pytest.mark.parametrize("size", [(1, 1), (1000, 1), (1, 1000), (100_000, 1)])
def test_extreme_shapes_are_read(size: tuple[int, int]) -> None:
    image = open_image(saved(Image.new("RGB", size, RED))).image
    assert max(image.size) == min(max(size), MAX_SIDE)
    assert min(image.size) == 1


@pytest.mark.parametrize(
    ("size", "megapixels"), [((8000, 5001), "40.1"), ((10_000, 9500), "95"), ((14_000, 14_000), "196")]
)
def test_too_many_megapixels_are_refused_before_decoding(size: tuple[int, int], megapixels: str) -> None:
    header_only = saved(Image.new("1", size))[:64]  # decoding it would fail
    with pytest.raises(ImageError, match=rf"^cat\.png is {megapixels} megapixels; the limit is 40\. Resize"):
        open_image(header_only, "cat.png")


def test_a_decompression_bomb_never_ends_in_a_warning(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(saved(Image.new("1", (10_000, 9500))))
    program = (
        "import sys, llava_app.images as images\ntry: images.open_image(sys.argv[1])\nexcept images.ImageError: pass"
    )
    command = [sys.executable, "-W", "default", "-c", program, str(tmp_path / "bomb.png")]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stderr == ""


def test_exactly_the_limit_is_allowed() -> None:
    assert open_image(saved(Image.new("1", (8000, MAX_PIXELS // 8000)))).image.size == (2048, 1280)


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_pictures_are_refused_by_name(kind: str) -> None:
    whole = saved(Image.effect_noise((64, 64), 60).convert("RGB"), kind)
    for part in (20, len(whole) // 2):
        with pytest.raises(ImageError, match=r"^cat is (damaged or cut short|not a picture).* try again\.$"):
            open_image(whole[:part], "cat")


@pytest.mark.parametrize("content", [b"hello", b"%PDF-1.7", b"<svg></svg>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0" * 99])
def test_what_is_not_a_picture_is_refused(content: bytes) -> None:
    with pytest.raises(ImageError, match=r"^notes\.txt is not a picture .*PNG or JPEG and try again\.$"):
        open_image(content, "notes.txt")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"^empty\.png is empty \(0 bytes\)\. Choose another file\.$"):
        open_image(tmp_path / "empty.png")
    with pytest.raises(ImageError, match=r"^picture is empty"):
        open_image(b"")


def test_missing_and_unreadable_files_are_refused_without_their_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageError, match=r"^There is no file cat\.png\. Check its name, or choose another\.$"):
        open_image(tmp_path / "cat.png")
    with pytest.raises(ImageError, match=r"^folder\.png cannot be opened as a file\."):
        open_image(str(tmp_path / "folder.png"))
    with pytest.raises(ImageError, match=r"^nul\.png cannot be opened as a file\."):
        open_image(str(tmp_path / "n\0ul.png"))


@pytest.mark.parametrize("path", ["C:\\Users\\me\\cat.png", "/home/me/cat.png", "../cat.png", "c\nat.png"])
def test_messages_name_the_file_and_never_its_folder(path: str) -> None:
    with pytest.raises(ImageError, match=r"^cat\.png is not a picture"):
        open_image(b"hello", path)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.data())
def test_damaged_bytes_give_a_picture_or_a_named_error(kind: str, data: st.DataObject) -> None:
    content = bytearray(saved(Image.radial_gradient("L").resize((24, 24)), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow's own remarks about the damage
        with suppress(ImageError):
            assert open_image(bytes(content)).image.mode == "RGB"


def test_pictures_are_equal_when_their_pixels_are(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(saved(red_left_blue_right()))
    picture = open_image(tmp_path / "a.png")
    assert picture.name == "a.png"
    again = open_image(saved(red_left_blue_right(), "BMP"), "b.bmp")
    assert picture == again
    assert hash(picture) == hash(again)
    assert picture != open_image(saved(red_left_blue_right(32, 64)))
    assert "image=" not in repr(picture)
    assert isinstance(picture, Picture)


def test_padding_centres_the_picture_on_a_square_of_the_mean_colour() -> None:
    square = pad_to_square(red_left_blue_right(64, 32))
    assert square.size == (64, 64)
    assert square.getpixel((32, 0)) == (122, 116, 104)
    assert square.getpixel((0, 16)) == RED
    assert square.getpixel((63, 47)) == BLUE
    assert square.getpixel((0, 48)) == (122, 116, 104)
    assert pad_to_square(red_left_blue_right(32, 64), WHITE).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("size", [(90, 30), (31, 90), (1, 7)])
def test_a_framed_picture_is_a_square_that_shows_all_or_the_middle(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    image.putpixel((size[0] // 2, size[1] // 2), (0, 0, 255))
    picture = picture_of(image, "a.png")
    pad, crop = framed(picture, "pad"), framed(picture, "crop")
    assert pad.image.size == (max(size),) * 2
    assert crop.image.size == (min(size),) * 2
    assert all((0, 0, 255) in {colour for _, colour in shown.image.getcolors()} for shown in (pad, crop))
    assert (len(pad.image.getcolors()), len(crop.image.getcolors())) == (3, 2 if min(size) > 1 else 1)
    assert framed(picture, "own") is picture
    assert framed(crop, "pad") is crop


def test_the_pictures_in_memory_are_counted_once_and_while_they_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_in_use", WeakValueDictionary())
    held = [open_image(saved(red_left_blue_right())) for _ in range(3)]
    other = open_image(saved(red_left_blue_right(10, 10)))
    assert living_bytes() == 64 * 32 * 3 + 10 * 10 * 3
    held.clear()
    assert living_bytes() == 3 * other.image.width * other.image.height
