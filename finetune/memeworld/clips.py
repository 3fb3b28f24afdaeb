"""Clips of memeworld: a ball that moves, and the question which way."""

import random
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw

from finetune.memeworld import draw
from finetune.memeworld.backgrounds import PAINT_BACKGROUND
from finetune.memeworld.dataset import write_questions
from finetune.memeworld.world import BACKGROUNDS, COLOURS, SIZES, Thing

FRAMES = 4
FRAME_TIME = 250  # milliseconds
SIDE = 224  # pixels
BEGIN, END = (0.15, 0.3), (0.7, 0.85)  # where the ball starts and stops along its way, in sides of the picture
ASIDE = (0.2, 0.8)  # and across it
WAYS = {  # answer: across or down, and whether towards the picture's origin
    "It moves to the left.": ("x", True),
    "It moves to the right.": ("x", False),
    "It moves up.": ("y", True),
    "It moves down.": ("y", False),
}
QUESTIONS = ("Which way does the ball move?", "Where does the ball go?", "In which direction does the ball move?")


@dataclass(frozen=True)
class BallClip:
    """A ball that goes from `begin` to `end` (x, y in sides of the picture), a question about it and its answer."""

    background: str
    ball: Thing
    begin: tuple[float, float]
    end: tuple[float, float]
    question: str
    answer: str
    seed: int  # of the drawing

    def frames(self) -> list[Image.Image]:
        """The pictures in order, evenly over the way."""
        return [self._frame(number / (FRAMES - 1)) for number in range(FRAMES)]

    def gif(self) -> bytes:
        """The clip as a file."""
        first, *rest = self.frames()
        file = BytesIO()
        first.save(file, "GIF", save_all=True, append_images=rest, duration=FRAME_TIME)
        return file.getvalue()

    def _frame(self, part: float) -> Image.Image:
        rng = random.Random(f"draw/{self.seed}")
        image = Image.new("RGB", (SIDE, SIDE))
        canvas = ImageDraw.Draw(image)
        PAINT_BACKGROUND[self.background](canvas, rng, SIDE)
        x, y = (a + part * (b - a) for a, b in zip(self.begin, self.end, strict=True))
        draw.draw_thing(canvas, self.ball, replace(draw.pose_of(rng, self.ball), x=x, y=y), SIDE)
        return image


def make_clip(split: str, index: int) -> BallClip:
    """The clip with this number in a split, always the same one."""
    rng = random.Random(f"memeworld/clips/{split}/{index}")
    answer = rng.choice(list(WAYS))
    axis, backwards = WAYS[answer]
    along = (rng.uniform(*BEGIN), rng.uniform(*END))
    aside = rng.uniform(*ASIDE)
    begin, end = ((at, aside) if axis == "x" else (aside, at) for at in (reversed(along) if backwards else along))
    ball = Thing("ball", rng.choice(COLOURS), rng.choice(SIZES), "middle")
    return BallClip(rng.choice(BACKGROUNDS), ball, begin, end, rng.choice(QUESTIONS), answer, index)


def write_clips(folder: Path, *, count: int) -> Path:
    """Draw `count` clips of the split "train" into `folder`, frame by frame; returns the file of their records."""
    made = (make_clip("train", index) for index in range(count))
    return write_questions(folder, "clip", ((clip.frames(), clip.question, clip.answer) for clip in made))
