"""memeworld as a source of contexts: pictures of which everything is known."""

from pathlib import Path

from finetune.instruct.context import Box, Context
from finetune.memeworld.draw import boxes, draw
from finetune.memeworld.talk import description
from finetune.memeworld.world import make_scene


def draw_contexts(folder: Path, pictures: int) -> list[Context]:
    """Draw the first pictures of the split "train" below `folder`; returns what they show."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    return [_draw(folder, index) for index in range(pictures)]


def _draw(folder: Path, index: int) -> Context:
    scene = make_scene("train", index)
    name = f"pictures/{index:06}.png"
    draw(scene, index).save(folder / name)
    found = tuple(Box(thing.kind, corners) for thing, corners in zip(scene.things, boxes(scene, index), strict=True))
    lines = tuple(line for line in scene.lines() if line)
    return Context(f"memeworld-{index:06}", name, (description(scene).split(". ")[0] + ".",), found, ocr=lines)
