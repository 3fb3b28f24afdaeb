"""Scene → picture, and what each patch of the picture shows.

A picture is the same for the same scene and seed. Sizes are fractions of the picture's side, so that a scene can be
drawn small for training and large for showing.
"""

import colorsys
import random
from dataclasses import dataclass, replace
from functools import lru_cache
from math import cos, radians, sin

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from finetune.memeworld import world
from finetune.memeworld.backgrounds import PAINT_BACKGROUND
from finetune.memeworld.shapes import RGB, SHAPES, Point
from finetune.memeworld.world import BACKGROUNDS, COLOURS, KINDS, PLACES, SIZES, Scene, Thing

# Hue in degrees, saturation, value: each a range. Neighbouring colours stay apart at every draw.
HUES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-6, 6), (0.78, 0.95), (0.78, 0.95)),
    "orange": ((24, 33), (0.85, 1.0), (0.92, 1.0)),
    "yellow": ((50, 58), (0.75, 0.95), (0.93, 1.0)),
    "green": ((105, 140), (0.55, 0.8), (0.55, 0.78)),
    "blue": ((208, 228), (0.7, 0.9), (0.75, 0.95)),
    "purple": ((268, 284), (0.6, 0.8), (0.6, 0.8)),
    "pink": ((322, 338), (0.35, 0.5), (0.97, 1.0)),
    "white": ((0, 60), (0.0, 0.04), (0.95, 1.0)),
}
UNLIKE = 60  # distance in RGB from the middle of every nameable colour
INK: RGB = (34, 30, 44)
LIGHT: RGB = (244, 246, 250)
RADIUS = {"big": (0.15, 0.166), "small": (0.095, 0.11)}
SLOTS = {"left": 1 / 6, "middle": 1 / 2, "right": 5 / 6}
BAND = 0.155  # the height kept free for a line of text at the top and at the bottom
TEXT_CENTRE = 0.07  # the middle of a line of text, from its edge
GRID = 8  # patches a side
WORDS = tuple(
    sorted(
        {word for tag in world.TAGS for word in tag.split()}
        | {word.upper() for kind in KINDS for word in (kind, world.plural(kind))}
        | {word.upper() for word in (*COLOURS, *SIZES, *world.NUMBERS[1:], "a", "an", "my")}
    )
)


@dataclass(frozen=True)
class PatchLabels:
    """What each of the 8×8 patches shows, row by row; 0 is nothing, i + 1 the i-th entry of its vocabulary."""

    kind: np.ndarray  # (64,) uint8, of KINDS
    colour: np.ndarray  # (64,) uint8, of COLOURS
    size: np.ndarray  # (64,) uint8, of SIZES
    place: np.ndarray  # (64,) uint8, of PLACES
    word: np.ndarray  # (64,) uint8, of WORDS
    background: np.ndarray  # (64,) uint8, of BACKGROUNDS, never 0


def draw(scene: Scene, seed: int, side: int = 224, *, repainted: bool = False) -> Image.Image:
    """The scene as an RGB picture of `side` × `side` pixels.

    `repainted`: every thing in a colour between the nameable ones, which all kinds of things share. Eyes that learn
    shapes from such pictures cannot learn that a kind never comes in the colour HELD_OUT for it.
    """
    rng = random.Random(f"draw/{seed}")
    image = Image.new("RGB", (side, side))
    canvas = ImageDraw.Draw(image)
    PAINT_BACKGROUND[scene.background](canvas, rng, side)
    for thing in scene.things:
        pose = pose_of(rng, thing)
        if repainted:
            pose = replace(pose, colour=_between_colours(random.Random(f"repaint/{seed}/{thing.place}")))
        draw_thing(canvas, thing, pose, side)
    for line, centre in zip(scene.lines(), (TEXT_CENTRE, 1 - TEXT_CENTRE), strict=True):
        if line:
            write_line(canvas, line, (side / 2, centre * side), side=side, scale=rng.uniform(0.92, 1.0))
    return image


def label(scene: Scene, seed: int) -> PatchLabels:
    """The patch labels of the picture that `draw` makes of the same scene and seed."""
    rng = random.Random(f"draw/{seed}")
    PAINT_BACKGROUND[scene.background](None, rng, 1)
    cover = Image.new("L", (14 * GRID, 14 * GRID))
    canvas = ImageDraw.Draw(cover)
    for number, thing in enumerate(scene.things, 1):
        for points in _placed(thing, pose_of(rng, thing), 14 * GRID):
            canvas.polygon(points, fill=number)
    owner = _owners(np.asarray(cover), len(scene.things))
    word = np.zeros((GRID, GRID), np.uint8)
    for line, row in zip(scene.lines(), (0, GRID - 1), strict=True):
        if line:
            word[row] = _words_of_patches(line, scale=rng.uniform(0.92, 1.0))

    def of_owner(values: list[int]) -> np.ndarray:
        return np.array([0, *values], np.uint8)[owner]

    return PatchLabels(
        kind=of_owner([1 + KINDS.index(thing.kind) for thing in scene.things]),
        colour=of_owner([1 + COLOURS.index(thing.colour) for thing in scene.things]),
        size=of_owner([1 + SIZES.index(thing.size) for thing in scene.things]),
        place=of_owner([1 + PLACES.index(thing.place) for thing in scene.things]),
        word=word.reshape(-1),
        background=np.full(GRID * GRID, 1 + BACKGROUNDS.index(scene.background), np.uint8),
    )


def boxes(scene: Scene, seed: int) -> list[tuple[float, float, float, float]]:
    """Where `draw` puts the things of the same scene and seed: x1, y1, x2, y2 as fractions of the side, to 0.001."""
    rng = random.Random(f"draw/{seed}")
    PAINT_BACKGROUND[scene.background](None, rng, 1)
    found = []
    for thing in scene.things:
        points = [point for polygon in _placed(thing, pose_of(rng, thing), 1) for point in polygon]
        across, down = ([min(1.0, max(0.0, round(value, 3))) for value in axis] for axis in zip(*points, strict=True))
        found.append((min(across), min(down), max(across), max(down)))
    return found


def _owners(cover: np.ndarray, things: int) -> np.ndarray:
    """(112, 112) thing numbers → (64,): the thing that covers most of a patch, 0 where that is under a sixth of it."""
    patches = cover.reshape(GRID, 14, GRID, 14).swapaxes(1, 2).reshape(GRID * GRID, -1)
    shares = np.stack([(patches == number).mean(axis=1) for number in range(1, things + 1)])
    return np.where(shares.max(axis=0) >= 1 / 6, 1 + shares.argmax(axis=0), 0)


# Things


@dataclass(frozen=True)
class Pose:
    """Where a thing's middle is and how large it is, in sides of the picture, and how it is turned and coloured."""

    x: float
    y: float
    radius: float
    stretch: float
    degrees: float
    flip: int
    colour: RGB


def pose_of(rng: random.Random, thing: Thing) -> Pose:
    """How a thing stands in its place, as chance wants it."""
    radius = rng.uniform(*RADIUS[thing.size])
    return Pose(
        x=SLOTS[thing.place] + rng.uniform(-0.015, 0.015),
        y=rng.uniform(BAND + radius, 1 - BAND - radius),
        radius=radius,
        stretch=rng.uniform(0.93, 1.07),
        degrees=rng.uniform(-9, 9),
        flip=rng.choice((-1, 1)),
        colour=_rgb(*(rng.uniform(*bounds) for bounds in HUES[thing.colour])),
    )


def _rgb(hue: float, saturation: float, value: float) -> RGB:
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _between_colours(rng: random.Random) -> RGB:
    while True:
        rgb = _rgb(rng.uniform(0, 360), rng.random() ** 0.5, rng.uniform(0.25, 1))
        if min(_distance(rgb, _rgb(*(sum(bounds) / 2 for bounds in ranges))) for ranges in HUES.values()) > UNLIKE:
            return rgb


def _distance(one: RGB, other: RGB) -> float:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5


def _placed(thing: Thing, pose: Pose, side: int) -> list[list[Point]]:
    """The polygons of a thing in pixels."""
    across, along = cos(radians(pose.degrees)), sin(radians(pose.degrees))
    x0, y0, scale = pose.x * side, pose.y * side, pose.radius * side

    def place(point: Point) -> Point:
        x, y = pose.flip * pose.stretch * point[0], point[1] / pose.stretch
        return x0 + scale * (across * x - along * y), y0 + scale * (along * x + across * y)

    return [[place(point) for point in points] for _, points in SHAPES[thing.kind]]


def draw_thing(canvas: ImageDraw.ImageDraw, thing: Thing, pose: Pose, side: int) -> None:
    """Paint a thing as it stands on a picture of `side` × `side` pixels."""
    red, green, blue = pose.colour
    paints: dict[str, RGB] = {
        "body": pose.colour,
        "shade": (red * 3 // 4, green * 3 // 4, blue * 3 // 4),
        "dark": INK,
        "light": LIGHT,
    }
    outline = max(1, round(0.013 * side))
    for (paint, _), points in zip(SHAPES[thing.kind], _placed(thing, pose, side), strict=True):
        canvas.polygon(points, fill=paints.get(paint) or ImageColor.getrgb(paint)[:3])
        canvas.line([*points, points[0], points[1]], fill=INK, width=outline, joint="curve")


# Text


@lru_cache(maxsize=64)
def _font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(pixels)


def _font_pixels(line: str, side: int, scale: float) -> int:
    widest = 0.94 * side
    pixels = 0.125 * side * scale
    length = _font(100).getlength(line) / 100
    return max(6, int(min(pixels, widest / length)))


def write_line(canvas: ImageDraw.ImageDraw, line: str, middle: Point, *, side: int, scale: float) -> None:
    """Write a line around `middle` (pixels), as large as it is on a picture of `side` × `side` pixels."""
    font = _font(_font_pixels(line, side, scale))
    canvas.text(middle, line, "white", font, anchor="mm", stroke_width=max(1, side // 90), stroke_fill=INK)


def _words_of_patches(line: str, scale: float) -> np.ndarray:
    """(8,) word labels: the word that covers the middle of a patch, or most of what there is of it."""
    side = 14 * GRID
    font = _font(100)
    unit = _font_pixels(line, side, scale) / 100
    left = side / 2 - unit * font.getlength(line) / 2
    labels = np.zeros(GRID, np.uint8)
    best = np.full(GRID, 4.0)  # a word must cover at least four pixels of a patch
    for word, before in _words_with_prefix(line):
        start = left + unit * font.getlength(before)
        end = start + unit * font.getlength(word)
        for column in range(GRID):
            overlap = min(end, 14 * (column + 1)) - max(start, 14 * column)
            if overlap > best[column]:
                best[column], labels[column] = overlap, 1 + WORDS.index(word)
    return labels


def _words_with_prefix(line: str) -> list[tuple[str, str]]:
    words = line.split()
    return [(word, " ".join([*words[:i], ""])) for i, word in enumerate(words)]
