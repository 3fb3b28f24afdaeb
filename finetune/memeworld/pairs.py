"""Questions about two pictures of memeworld: which of them has the cat, and what changed from one to the other.

python -m finetune.memeworld.pairs FOLDER --count N writes them as LLaVA records for stage 2.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from finetune.memeworld.dataset import write_questions
from finetune.memeworld.draw import draw
from finetune.memeworld.talk import BACKGROUND
from finetune.memeworld.world import BACKGROUNDS, COLOURS, HELD_OUT, KINDS, SIZES, Scene, Thing, make_scene, plural

WHICH = (
    "Which of the two pictures has the {thing}?",
    "In which picture is the {thing}?",
    "Where do you see the {thing}?",
)
CHANGED = ("What changed?", "What is different in the second picture?", "Find the difference.")


@dataclass(frozen=True)
class Pair:
    """Two scenes, a question about both, and its right answer."""

    kind: str  # "which" or "changed"
    first: Scene
    second: Scene
    question: str
    answer: str
    seed: int  # of the drawing: what did not change is drawn alike

    def pictures(self) -> tuple[Image.Image, Image.Image]:
        """Both, drawn."""
        return draw(self.first, self.seed), draw(self.second, self.seed)


def make_pair(split: str, index: int) -> Pair:
    """The pair with this number in a split, always the same one; even numbers ask which, odd ones what changed."""
    rng = random.Random(f"memeworld/pairs/{split}/{index}")
    first = _bare(make_scene(split, 2 * index))
    if index % 2:
        second, answer = _changed(rng, first, unseen=split == "combinations")
        return Pair("changed", first, second, rng.choice(CHANGED), answer, index)
    second = _bare(make_scene(split, 2 * index + 1))
    kind = rng.choice([thing.kind for thing in (*first.things, *second.things)] + [rng.choice(KINDS)])
    question = rng.choice(WHICH).format(thing=kind)
    return Pair("which", first, second, question, which_answer(first, second, kind), index)


def which_answer(first: Scene, second: Scene, kind: str) -> str:
    """Which of two pictures shows a thing."""
    in_first, in_second = bool(first.of_kind(kind)), bool(second.of_kind(kind))
    if in_first and in_second:
        return "Both pictures."
    if not in_first and not in_second:
        return "Neither picture."
    return "The first picture." if in_first else "The second picture."


def write_pairs(folder: Path, *, count: int) -> Path:
    """Draw `count` pairs of the split "train" into `folder`; returns the file of their records."""
    made = (make_pair("train", index) for index in range(count))
    return write_questions(folder, "pair", ((pair.pictures(), pair.question, pair.answer) for pair in made))


def _bare(scene: Scene) -> Scene:
    """Without its text: the questions are about what is drawn."""
    return replace(scene, claim=None, tag=None, joke=None)


def _changed(rng: random.Random, scene: Scene, *, unseen: bool) -> tuple[Scene, str]:
    """The scene with one thing different, and what that is."""
    return rng.choice((_recoloured, _resized, _moved))(rng, scene, unseen)


def _recoloured(rng: random.Random, scene: Scene, unseen: bool) -> tuple[Scene, str]:
    kind, before = scene.things[0].kind, scene.things[0].colour
    colours = [colour for colour in COLOURS if colour != before and (unseen or (kind, colour) not in HELD_OUT)]
    after = rng.choice(colours)
    return _with(scene, kind, lambda thing: replace(thing, colour=after)), _said(scene, kind, before, after)


def _resized(_: random.Random, scene: Scene, unseen: bool) -> tuple[Scene, str]:
    kind, before = scene.things[0].kind, scene.things[0].size
    after = next(size for size in SIZES if size != before)
    return _with(scene, kind, lambda thing: replace(thing, size=after)), _said(scene, kind, before, after)


def _moved(rng: random.Random, scene: Scene, unseen: bool) -> tuple[Scene, str]:
    after = rng.choice([background for background in BACKGROUNDS if background != scene.background])
    answer = f"The background was {BACKGROUND[scene.background]} and is now {BACKGROUND[after]}."
    return replace(scene, background=after), answer


def _with(scene: Scene, kind: str, change: Callable[[Thing], Thing]) -> Scene:
    return replace(scene, things=tuple(change(thing) if thing.kind == kind else thing for thing in scene.things))


def _said(scene: Scene, kind: str, before: str, after: str) -> str:
    several = len(scene.of_kind(kind)) > 1
    noun, was, now = (plural(kind), "were", "are") if several else (kind, "was", "is")
    return f"The {noun} {was} {before} and {now} now {after}."


def main() -> None:
    """Write records and pictures."""
    parser = argparse.ArgumentParser(prog="python -m finetune.memeworld.pairs", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=10_000, help="of pairs (10000)")
    options = parser.parse_args()
    print(write_pairs(options.folder, count=options.count))


if __name__ == "__main__":
    main()
