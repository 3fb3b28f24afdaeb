"""Backgrounds. Each takes the same random numbers whether it paints or not (canvas None), so that labels match."""

import random

from PIL import ImageColor, ImageDraw

from finetune.memeworld.shapes import RGB, Point


def _shades(rng: random.Random, *colours: str) -> list[RGB]:
    shift = rng.randint(-10, 10)
    rgbs = [ImageColor.getrgb(colour) for colour in colours]
    return [(_clamp(r + shift), _clamp(g + shift), _clamp(b + shift)) for r, g, b in (rgb[:3] for rgb in rgbs)]


def _clamp(value: int) -> int:
    return max(0, min(255, value))


def _layers(canvas: ImageDraw.ImageDraw | None, side: int, *bands: tuple[float, RGB]) -> None:
    if canvas:
        for top, colour in bands:
            canvas.rectangle((0, top * side, side, side), fill=colour)


def _dots(canvas: ImageDraw.ImageDraw | None, side: int, spots: list[Point], radius: float, colour: RGB) -> None:
    if canvas:
        for x, y in spots:
            canvas.ellipse(
                ((x - radius) * side, (y - radius) * side, (x + radius) * side, (y + radius) * side), fill=colour
            )


def _spots(rng: random.Random, count: int, top: float, bottom: float) -> list[Point]:
    return [(rng.random(), rng.uniform(top, bottom)) for _ in range(count)]


def _meadow(canvas: ImageDraw.ImageDraw | None, rng: random.Random, side: int) -> None:
    sky, grass, blades = _shades(rng, "#bfe3f5", "#a9d18e", "#86b86b")
    horizon = rng.uniform(0.52, 0.64)
    _layers(canvas, side, (0, sky), (horizon, grass))
    _dots(canvas, side, _spots(rng, 14, horizon + 0.03, 1), 0.011, blades)


def _beach(canvas: ImageDraw.ImageDraw | None, rng: random.Random, side: int) -> None:
    sky, sea, sand = _shades(rng, "#cdeaf2", "#7fc4c9", "#f0dfb4")
    shore = rng.uniform(0.56, 0.66)
    _layers(canvas, side, (0, sky), (shore - 0.16, sea), (shore, sand))


def _night(canvas: ImageDraw.ImageDraw | None, rng: random.Random, side: int) -> None:
    sky, hills, stars = _shades(rng, "#3a4270", "#2c3358", "#e8e6c8")
    _layers(canvas, side, (0, sky), (rng.uniform(0.7, 0.78), hills))
    _dots(canvas, side, _spots(rng, 16, 0.02, 0.66), 0.008, stars)


def _snow(canvas: ImageDraw.ImageDraw | None, rng: random.Random, side: int) -> None:
    sky, ground, flakes = _shades(rng, "#c3cbd8", "#eef1f5", "#f5f5f5")
    _layers(canvas, side, (0, sky), (rng.uniform(0.56, 0.68), ground))
    _dots(canvas, side, _spots(rng, 20, 0, 0.6), 0.011, flakes)


def _room(canvas: ImageDraw.ImageDraw | None, rng: random.Random, side: int) -> None:
    wall, stripe, floor = _shades(rng, "#ead9cf", "#dfc9bc", "#b08d74")
    edge = rng.uniform(0.7, 0.76)
    _layers(canvas, side, (0, wall))
    if canvas:
        for i in range(0, 10, 2):
            canvas.rectangle((i * side / 10, 0, (i + 1) * side / 10, side), fill=stripe)
    _layers(canvas, side, (edge, floor))


PAINT_BACKGROUND = {"meadow": _meadow, "beach": _beach, "night": _night, "snow": _snow, "room": _room}
