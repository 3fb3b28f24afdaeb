"""COCO annotation files → contexts. The boxes of COCO are (left, top, width, height) in pixels."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.instruct.context import Box, Context, read_text
from llava_app.errors import DataError


def read_coco(files: Sequence[Path]) -> list[Context]:
    """The pictures of captions and instances files, joined by image id, in the order of the first file.

    Pictures with neither caption nor box are left out. Raises DataError when a file is no COCO annotation file.
    """
    images: dict[Any, dict[str, Any]] = {}
    captions: dict[Any, list[str]] = defaultdict(list)
    boxes: dict[Any, list[Box]] = defaultdict(list)
    for file in files:
        try:
            _collect(json.loads(read_text(file)), images, captions=captions, boxes=boxes)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise DataError(
                f"{file} is no COCO annotation file: {error}. Give captions_*.json, instances_*.json or both."
            ) from error
    return [
        Context(str(number), image["file_name"], tuple(captions[number]), tuple(boxes[number]))
        for number, image in images.items()
        if captions[number] or boxes[number]
    ]


def _collect(
    content: dict[str, Any],
    images: dict[Any, dict[str, Any]],
    *,
    captions: dict[Any, list[str]],
    boxes: dict[Any, list[Box]],
) -> None:
    for image in content["images"]:
        images.setdefault(image["id"], image)
    names = {category["id"]: category["name"] for category in content.get("categories", [])}
    for found in content["annotations"]:
        number = found["image_id"]
        if "caption" in found:
            captions[number].append(" ".join(found["caption"].split()))
        else:
            boxes[number].append(_box(found, names[found["category_id"]], images[number]))


def _box(found: dict[str, Any], category: str, image: dict[str, Any]) -> Box:
    left, top, width, height = found["bbox"]
    across = [_fraction(x, image["width"]) for x in (left, left + width)]
    down = [_fraction(y, image["height"]) for y in (top, top + height)]
    return Box(category, (across[0], down[0], across[1], down[1]), bool(found.get("iscrowd")))


def _fraction(pixels: float, side: float) -> float:
    return min(1.0, max(0.0, round(pixels / side, 3)))
