"""The outlines of memeworld's things, as polygons in a square from −1 to 1 with y pointing down.

A thing is a list of parts, painted in order. Each part has a paint: "body" is the thing's colour, "shade" the same
darker, "dark" the ink of the outlines, "light" a pale detail; any other value is a fixed colour.
"""

from math import cos, pi, sin

Point = tuple[float, float]
RGB = tuple[int, int, int]
Part = tuple[str, list[Point]]

WOOD, LEAF, BEAK, FLAME = "#8a5a33", "#3f9b46", "#f0a030", "#ff9d2e"


def oval(x: float, y: float, rx: float, ry: float | None = None, *, start: float = 0, end: float = 1) -> list[Point]:
    """An ellipse (or the arc from `start` to `end`, in turns clockwise from the right) as 18 points."""
    ry = rx if ry is None else ry
    angles = [2 * pi * (start + (end - start) * i / 18) for i in range(18 if end - start == 1 else 19)]
    return [(x + rx * cos(a), y + ry * sin(a)) for a in angles]


def box(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def mirrored(points: list[Point]) -> list[Point]:
    return [(-x, y) for x, y in points]


def _star() -> list[Point]:
    radii = (1.0, 0.42)
    return [
        (radii[i % 2] * sin(pi * i / 5), 0.08 - radii[i % 2] * cos(pi * i / 5)) for i in range(10)
    ]  # ten corners, outer and inner in turn


def _heart() -> list[Point]:
    angles = [2 * pi * i / 26 for i in range(26)]
    return [
        (sin(a) ** 3, -(13 * cos(a) - 5 * cos(2 * a) - 2 * cos(3 * a) - cos(4 * a)) / 16) for a in angles
    ]  # the usual heart curve, scaled to the square


def _moon() -> list[Point]:
    outer = [(0.95 * cos(a), 0.95 * sin(a)) for a in (pi * (0.28 + 1.44 * i / 20) for i in range(21))]
    inner = [(0.42 + 0.75 * cos(a), 0.75 * sin(a)) for a in (pi * (1.62 - 1.24 * i / 16) for i in range(17))]
    return outer + inner


_CAT_EAR = [(-0.78, -0.05), (-0.72, -0.98), (-0.12, -0.5)]
_PETALS: list[Part] = [
    ("body", oval(0.5 * cos(2 * pi * i / 6), -0.28 + 0.5 * sin(2 * pi * i / 6), 0.33)) for i in range(6)
]

SHAPES: dict[str, list[Part]] = {
    "cat": [
        ("body", _CAT_EAR),
        ("body", mirrored(_CAT_EAR)),
        ("body", oval(0, 0.2, 0.85, 0.7)),
        ("dark", oval(-0.33, 0.05, 0.11, 0.16)),
        ("dark", oval(0.33, 0.05, 0.11, 0.16)),
        ("dark", [(-0.12, 0.32), (0.12, 0.32), (0, 0.46)]),
        ("dark", [(0.4, 0.4), (1.0, 0.3), (1.0, 0.36), (0.4, 0.46)]),
        ("dark", [(-0.4, 0.4), (-1.0, 0.3), (-1.0, 0.36), (-0.4, 0.46)]),
    ],
    "dog": [
        ("body", oval(0, 0, 0.68, 0.8)),
        ("shade", oval(-0.72, 0.05, 0.25, 0.62)),
        ("shade", oval(0.72, 0.05, 0.25, 0.62)),
        ("light", oval(0, 0.42, 0.4, 0.34)),
        ("dark", oval(0, 0.28, 0.2, 0.14)),
        ("dark", oval(-0.28, -0.2, 0.1)),
        ("dark", oval(0.28, -0.2, 0.1)),
    ],
    "fish": [
        ("body", [(0.35, 0), (1.0, -0.6), (0.85, 0), (1.0, 0.6)]),
        ("body", oval(-0.2, 0, 0.8, 0.5)),
        ("shade", [(-0.2, -0.12), (0.25, 0.02), (-0.2, 0.2)]),
        ("light", oval(-0.6, -0.12, 0.14)),
        ("dark", oval(-0.62, -0.12, 0.07)),
    ],
    "bird": [
        (BEAK, [(-0.7, -0.55), (-1.05, -0.38), (-0.7, -0.25)]),
        (BEAK, box(-0.12, 0.55, -0.02, 0.95)),
        (BEAK, box(0.16, 0.55, 0.26, 0.95)),
        ("body", [(0.45, 0.1), (1.05, -0.35), (0.95, 0.3)]),
        ("body", oval(0.1, 0.2, 0.68, 0.46)),
        ("body", oval(-0.45, -0.4, 0.36)),
        ("shade", oval(0.2, 0.15, 0.36, 0.2)),
        ("dark", oval(-0.52, -0.46, 0.08)),
    ],
    "house": [
        ("body", box(-0.72, -0.1, 0.72, 0.9)),
        ("shade", [(-0.98, -0.05), (0, -0.95), (0.98, -0.05)]),
        ("dark", box(-0.5, 0.3, -0.12, 0.9)),
        ("light", box(0.15, 0.2, 0.52, 0.55)),
    ],
    "car": [
        ("body", [(-0.62, 0.05), (-0.38, -0.5), (0.36, -0.5), (0.66, 0.05)]),
        ("light", [(-0.4, 0.02), (-0.26, -0.36), (-0.04, -0.36), (-0.04, 0.02)]),
        ("light", [(0.08, 0.02), (0.08, -0.36), (0.28, -0.36), (0.46, 0.02)]),
        ("body", [(-1.0, 0.02), (0.95, 0.02), (1.0, 0.5), (-1.0, 0.5)]),
        ("dark", oval(-0.52, 0.5, 0.26)),
        ("dark", oval(0.52, 0.5, 0.26)),
        ("light", oval(-0.52, 0.5, 0.1)),
        ("light", oval(0.52, 0.5, 0.1)),
    ],
    "boat": [
        ("dark", box(-0.06, -0.95, 0.04, 0.35)),
        ("light", [(0.1, -0.9), (0.1, 0.2), (0.85, 0.2)]),
        ("light", [(-0.12, -0.7), (-0.12, 0.2), (-0.7, 0.2)]),
        ("body", [(-1.0, 0.32), (1.0, 0.32), (0.62, 0.88), (-0.62, 0.88)]),
    ],
    "hat": [
        ("body", [(-0.52, -0.8), (0.52, -0.8), (0.56, 0.5), (-0.56, 0.5)]),
        ("dark", [(-0.55, 0.12), (0.55, 0.12), (0.56, 0.42), (-0.56, 0.42)]),
        ("body", oval(0, 0.55, 1.0, 0.22)),
    ],
    "star": [("body", _star())],
    "tree": [
        (WOOD, box(-0.16, 0.4, 0.16, 0.98)),
        ("body", [(-0.8, 0.5), (0, -0.3), (0.8, 0.5)]),
        ("body", [(-0.64, 0.08), (0, -0.65), (0.64, 0.08)]),
        ("body", [(-0.45, -0.35), (0, -1.0), (0.45, -0.35)]),
    ],
    "flower": [
        (LEAF, box(-0.07, 0.1, 0.07, 1.0)),
        (LEAF, oval(0.3, 0.7, 0.28, 0.13)),
        *_PETALS,
        ("dark", oval(0, -0.28, 0.24)),
    ],
    "apple": [
        (WOOD, [(-0.05, -0.4), (0.02, -0.95), (0.14, -0.92), (0.06, -0.4)]),
        (LEAF, oval(0.4, -0.75, 0.3, 0.14)),
        ("body", oval(-0.3, 0.18, 0.58, 0.68)),
        ("body", oval(0.3, 0.18, 0.58, 0.68)),
        ("body", oval(0, 0.2, 0.55, 0.58)),
    ],
    "cup": [
        ("body", oval(0.55, 0.1, 0.42, 0.38)),
        ("light", oval(0.58, 0.1, 0.22, 0.2)),
        ("body", [(-0.75, -0.5), (0.5, -0.5), (0.38, 0.75), (-0.63, 0.75)]),
        ("dark", oval(-0.12, -0.5, 0.62, 0.14)),
        ("light", [(-0.3, -0.7), (-0.2, -1.0), (-0.1, -1.0), (-0.2, -0.7)]),
        ("light", [(0.05, -0.7), (0.15, -1.0), (0.25, -1.0), (0.15, -0.7)]),
    ],
    "heart": [("body", _heart())],
    "ball": [("body", oval(0, 0, 0.95)), ("light", oval(0, 0, 0.95, 0.22))],  # of clips only
    "moon": [("body", _moon())],
    "rocket": [
        (FLAME, [(-0.22, 0.55), (0, 1.05), (0.22, 0.55)]),
        ("shade", [(-0.32, 0.1), (-0.72, 0.75), (-0.28, 0.6)]),
        ("shade", [(0.32, 0.1), (0.72, 0.75), (0.28, 0.6)]),
        ("body", [(0, -1.0), (0.26, -0.6), (0.36, -0.1), (0.3, 0.6), (-0.3, 0.6), (-0.36, -0.1), (-0.26, -0.6)]),
        ("light", oval(0, -0.2, 0.17)),
    ],
}
