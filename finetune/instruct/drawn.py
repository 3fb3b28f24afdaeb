"""memeworld as a source of contexts: pictures of which everything is known."""

from pathlib import Path

from finetune.instruct.context import Box, Context
from finetune.memeworld.draw import boxes, draw
from finetune.memeworld.talk import description
from finetune.memeworld.world import make_scene


def drawn_contexts(pictures: int) -> list[Context]:
    """What the first pictures of the split "train" show."""
    return [_context(index) for index in range(pictures)]


def draw_pictures(folder: Path, pictures: int) -> None:
    """Draw them below `folder`, where their contexts say."""
    for index in range(pictures):
        path = folder / _name(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(make_scene("train", index), index).save(path)


def _name(index: int) -> str:
    return f"pictures/{index:06}.png"


def _context(index: int) -> Context:
    scene = make_scene("train", index)
    found = tuple(Box(thing.kind, corners) for thing, corners in zip(scene.things, boxes(scene, index), strict=True))
    lines = tuple(line for line in scene.lines() if line)
    return Context(f"memeworld-{index:06}", _name(index), (description(scene).split(". ")[0] + ".",), found, ocr=lines)
