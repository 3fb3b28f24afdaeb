"""What a text-only teacher is told of a picture: captions and boxes, and how they are written down."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_app.errors import DataError

FORM = 'Give lines such as {"id": "1", "image": "1.jpg", "captions": ["A cat."], "instances": [{"category": "cat", '
FORM += '"bbox": [0.1, 0.2, 0.5, 0.9]}]}.'


@dataclass(frozen=True)
class Box:
    """A thing and where it is: (x1, y1, x2, y2) as fractions of the picture's width and height, from the top left."""

    category: str
    corners: tuple[float, float, float, float]
    crowd: bool = False  # a whole group in one box, as COCO marks it: it cannot be counted

    @property
    def area(self) -> float:
        """The share of the picture, 0 to 1."""
        x1, y1, x2, y2 = self.corners
        return (x2 - x1) * (y2 - y1)


@dataclass(frozen=True)
class Context:
    """Everything that is known of one picture."""

    id: str
    image: str  # file name, as the records will give it
    captions: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    ocr: tuple[str, ...] = ()  # lines of text that can be read in the picture
    tags: tuple[str, ...] = ()
    metadata: str = ""

    @property
    def words(self) -> str:
        """All but the boxes, one after the other."""
        return "\n".join([*self.captions, *self.ocr, *self.tags, self.metadata])

    def text(self) -> str:
        """The context as the LLaVA paper gives it (Liu et al. 2023, table 1): captions, then a line per box."""
        parts = [
            "\n".join(self.captions),
            "\n".join(f"{box.category}: {_corners(box)}" for box in self.boxes),
            "\n".join(["Text in the picture:", *self.ocr]) if self.ocr else "",
            f"Tags: {', '.join(self.tags)}" if self.tags else "",
            f"Metadata: {self.metadata}" if self.metadata else "",
        ]
        return "\n\n".join(part for part in parts if part)

    @property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of the text's sha256."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]


def read_contexts(files: Sequence[Path], *, metadata: str | None = None) -> list[Context]:
    """The contexts of a file of JSON lines, or of COCO annotation files (captions, instances or both).

    `metadata` names a further field of the JSON lines. Raises DataError: unreadable, malformed, or an id twice.
    """
    coco = [file for file in files if file.suffix == ".json"]
    contexts = [context for file in files if file.suffix != ".json" for context in _read_lines(file, metadata)]
    if coco:
        from finetune.instruct.coco import read_coco

        contexts += read_coco(coco)
    seen: set[str] = set()
    for context in contexts:
        if context.id in seen:
            raise DataError(f"The id {context.id} is there twice. Give every picture an id of its own.")
        seen.add(context.id)
    if not contexts:
        raise DataError(f"No picture in {', '.join(map(str, files)) or 'nothing'}. {FORM}")
    return contexts


def write_contexts(file: Path, contexts: Iterable[Context]) -> None:
    """JSON lines that `read_contexts` reads."""
    file.write_text("".join(json.dumps(_row(context), ensure_ascii=False) + "\n" for context in contexts), "utf-8")


def read_text(file: Path) -> str:
    """Raises DataError where there is no such file, or it is no UTF-8 text."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({type(error).__name__}). Check its path.") from error


def _read_lines(file: Path, metadata: str | None) -> list[Context]:
    lines = read_text(file).split("\n")
    return [_parse_line(f"{file}, line {n}", line, metadata) for n, line in enumerate(lines, 1) if line.strip()]


def _parse_line(place: str, line: str, metadata: str | None) -> Context:
    try:
        return _context(json.loads(line), metadata)
    except KeyError as error:
        raise DataError(f"{place}: no {error}. {FORM}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{place}: {error}. {FORM}") from error


def _context(row: dict[str, Any], metadata: str | None) -> Context:
    return Context(
        id=str(row.get("id") or row["image"]),
        image=str(row["image"]),
        captions=_texts(row, "captions"),
        boxes=tuple(_box(found) for found in row.get("instances") or []),
        ocr=_texts(row, "ocr"),
        tags=_texts(row, "tags"),
        metadata=str(row[metadata] if metadata else row.get("metadata") or ""),
    )


def _texts(row: dict[str, Any], field: str) -> tuple[str, ...]:
    texts = row.get(field) or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{field} is {texts!r:.60}; it must be a list of texts")
    return tuple(" ".join(text.split()) for text in texts if text.strip())


def _box(found: dict[str, Any]) -> Box:
    x1, y1, x2, y2 = (float(number) for number in found["bbox"])
    if not (0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1):
        raise ValueError(f"the box {found['bbox']} is not x1, y1, x2, y2 between 0 and 1")
    return Box(str(found["category"]), (x1, y1, x2, y2), bool(found.get("crowd")))


def _row(context: Context) -> dict[str, Any]:
    row = {name: value for name, value in asdict(context).items() if value and name != "boxes"}
    crowd = [{"crowd": True} if box.crowd else {} for box in context.boxes]
    boxes = [{"category": box.category, "bbox": list(box.corners)} for box in context.boxes]
    return row | {"instances": [box | mark for box, mark in zip(boxes, crowd, strict=True)]}


def _corners(box: Box) -> str:
    return f"[{', '.join(f'{number:.3f}' for number in box.corners)}]"
