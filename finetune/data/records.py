"""Files and folders of data → LLaVA records, one at a time: only where each one lies is kept in memory."""

import base64
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from llava_app.conversation import IMAGE_MARK
from llava_app.errors import DataError

BLOCK = 1 << 24  # bytes of a JSON list that are scanned at once
LONGEST = 1 << 28  # bytes of one record
METADATA = "metadata.jsonl"  # of a folder of pictures, as Hugging Face's imagefolder has it
SAVED = ("state.json", "dataset_dict.json")  # of a dataset that save_to_disk wrote
GAP = " \t\r\n,"  # between the items of a JSON list
PICTURES = ("image", "images", "file_name", "file_names")  # fields that name pictures, in the layouts that are read
CAPTIONS = ("text", "caption")  # fields that hold one
DATA_URL = "data:"  # begins the address of a picture that holds the picture
PARTS = ("image", "image_url")  # kinds of parts of a message's content that show a picture
ROLES = {"user": "human", "assistant": "gpt"}  # of "messages" → of "conversations"


@dataclass(frozen=True)
class Unread:
    """Stands where a message has no text, for what cannot be read there."""

    reason: str

    def __str__(self) -> str:
        return self.reason


class Records(Sequence[Any]):
    """LLaVA records, read when asked for. An item is whatever the file holds there, whether it is right or wrong.

    Reading one raises DataError where the file holds no JSON.
    """

    def row(self, number: int) -> Any:
        """What the file holds there, in its own layout."""
        raise NotImplementedError

    @overload
    def __getitem__(self, number: int) -> Any: ...
    @overload
    def __getitem__(self, number: slice) -> list[Any]: ...
    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        return as_record(self.row(number))


@dataclass(frozen=True)
class JsonFile(Records):
    """A JSON list or a file of JSON lines, with the byte at which each record begins and ends."""

    path: Path
    begins: np.ndarray  # (N,) int64
    ends: np.ndarray  # (N,) int64

    def __len__(self) -> int:
        return len(self.begins)

    def row(self, number: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self.begins[number])
            text = file.read(self.ends[number] - self.begins[number])
        try:
            return json.loads(text)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise _not_json(self.path, int(self.begins[number])) from error


@dataclass(frozen=True)
class Table(Records):
    """The rows of a Hugging Face dataset; pictures stay the encoded bytes that they are."""

    rows: Any  # datasets.Dataset that gives Arrow tables

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, number: int) -> Any:
        return self.rows[number].to_pylist()[0]


def open_records(path: Path) -> Records:
    """The records of a JSON list, JSON lines, a folder with metadata.jsonl, or a Hugging Face dataset's folder.

    Raises DataError when it is none of these, or cannot be read.
    """
    if path.is_dir():
        return open_records(path / METADATA) if (path / METADATA).is_file() else _open_dataset(path)
    spans = array("q")
    try:
        with path.open("rb") as file:
            begins = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
        for span in (_list_spans if begins.startswith(b"[") else _line_spans)(path):
            spans.extend(span)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. Give a JSON or JSON lines file of LLaVA records.") from error
    bounds = np.frombuffer(spans, dtype=np.int64) if spans else np.zeros(0, np.int64)
    return JsonFile(path, bounds[0::2].copy(), bounds[1::2].copy())


def read_records(file: Path) -> list[Any]:
    """All records of a small file. Raises DataError with the place of the first mistake."""
    return list(open_records(file))


def image_names(record: dict[str, Any]) -> list[Any]:
    """The pictures of a record in order: file names or, from a dataset's table, encoded bytes."""
    names = record.get("image") or []
    return names if isinstance(names, list) else [names]


def as_record(row: Any) -> Any:
    """A row of the other layouts as a LLaVA record; a LLaVA record and what is none at all stay as they are.

    The layouts: "messages" with roles and contents; a picture with a caption in "text". Pictures stand in "image",
    "images", "file_name" or "file_names", as names or as Hugging Face's {"bytes", "path"}; or else in the parts of a
    message's content, as names or data URLs. The fields that were read are not in the record.
    """
    if not isinstance(row, dict) or _is_record(row):
        return row
    field = next((name for name in PICTURES if row.get(name)), None)
    given = row[field] if field else _in_parts(row.get("messages"))
    images = [_encoded(image) for image in (given if isinstance(given, list) else [given])]
    turns = _conversations(row, len(images))
    read = {*PICTURES, *(("messages", *CAPTIONS) if turns else ())}
    others = {name: value for name, value in row.items() if name not in read}
    return {**others, "image": images, "conversations": turns}


def _is_record(row: dict[str, Any]) -> bool:
    named, image = row.keys() & PICTURES <= {"image"}, row.get("image", "")
    return named and "conversations" in row and isinstance(image, str) and not image.startswith(DATA_URL)


def _encoded(image: Any) -> Any:
    """A picture's name or encoded bytes, where a dataset's column or a data URL holds them."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or image.get("url")
    if not isinstance(image, str) or not image.startswith(DATA_URL):
        return image
    try:
        return base64.b64decode(image.partition(",")[2], validate=True)
    except ValueError:
        return b"no base64"  # which is refused as any damaged picture is


def _in_parts(messages: Any) -> list[Any]:
    """The pictures that the parts of messages hold, in order; a part can also leave it to a field of the row."""
    messages = messages if isinstance(messages, list) else []
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    held = [part.get("image_url") or part.get("image") or part for part in parts if part.get("type") in PARTS]
    return [image for image in held if _encoded(image)]


def _conversations(row: dict[str, Any], images: int) -> Any:
    """The dialogue of a row; where no message says where the pictures stand, they stand before the first question."""
    if "conversations" in row:
        return row["conversations"]
    messages = row.get("messages")
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        turns = [{"from": _role(message), "value": _content(message.get("content"))} for message in messages]
    else:
        caption = next((row[name] for name in CAPTIONS if row.get(name)), None)
        turns = [{"from": "human", "value": ""}, {"from": "gpt", "value": caption}] if caption else []
    asked = next((turn for turn in turns if turn["from"] == "human"), None)
    marked = any(isinstance(turn["value"], str) and IMAGE_MARK in turn["value"] for turn in turns)
    if asked and isinstance(asked["value"], str) and not marked:
        asked["value"] = f"{IMAGE_MARK}\n" * images + asked["value"]
    return turns


def _role(message: dict[str, Any]) -> str:
    role = str(message.get("role"))
    return ROLES.get(role, role)


def _content(content: Any) -> Any:
    """The text of a message, also where it is a list of parts; Unread where one of them is neither text nor picture."""
    if not isinstance(content, list):
        return content
    texts = [_part(part) for part in content]
    return next((text for text in texts if isinstance(text, Unread)), None) or "".join(map(str, texts))


def _part(part: Any) -> "str | Unread":
    if not isinstance(part, dict):
        return Unread("a part of a message that is no object")
    if part.get("type") in PARTS:
        return f"{IMAGE_MARK}\n"
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    return Unread(f"a part of a message that is no text and no picture, of type {part.get('type')!r}")


def dataset_files(folder: Path) -> list[Path]:
    """The files that the records of a Hugging Face dataset's folder are read from; none where it is no dataset."""
    tables = sorted(folder.rglob("train*.parquet")) or sorted(folder.rglob("*.parquet"))
    if tables or not any((folder / name).is_file() for name in SAVED):
        return tables
    return sorted(path for name in (*SAVED, "data-*.arrow") for path in folder.rglob(name))


def _open_dataset(folder: Path) -> Records:
    files = dataset_files(folder)
    if not files:
        raise DataError(
            f"{folder} is a folder without {METADATA} and no Hugging Face dataset. "
            "Give its data file, or a folder that has one of these."
        )
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{folder} is a Hugging Face dataset, which needs the package datasets. "
            "Run pip install datasets, or give the records as JSON lines."
        ) from error
    if files[0].suffix == ".parquet":
        rows = datasets.Dataset.from_parquet([str(table) for table in files])
    else:
        rows = datasets.load_from_disk(str(folder))
    if isinstance(rows, datasets.DatasetDict):
        rows = rows["train"] if "train" in rows else next(iter(rows.values()))
    return Table(rows.with_format("arrow"))


def _line_spans(path: Path) -> Iterator[tuple[int, int]]:
    place = 0
    with path.open("rb") as file:
        for line in file:
            if not line.isspace():
                yield place, place + len(line)
            place += len(line)


def _list_spans(path: Path) -> Iterator[tuple[int, int]]:
    """Read as Latin-1, each byte is a character, and all that divides the items of a list is ASCII."""
    decoder = json.JSONDecoder()
    with path.open("rb") as file:
        text, base = file.read(BLOCK).decode("latin-1"), 0
        place = text.index("[") + 1
        while True:
            while place < len(text) and text[place] in GAP:
                place += 1
            if text.startswith("]", place):
                return
            end = _item_end(decoder, text, place)
            if end < len(text):
                yield base + place, base + end
                place = end
                continue
            more = file.read(max(BLOCK, len(text) - place))
            if not more or len(text) - place > LONGEST:
                raise _not_json(path, base + place)
            base, text, place = base + place, text[place:] + more.decode("latin-1"), 0


def _item_end(decoder: json.JSONDecoder, text: str, place: int) -> int:
    """Where the item at `place` ends; the end of the text where it is not whole."""
    try:
        return decoder.raw_decode(text, place)[1]
    except json.JSONDecodeError:
        return len(text)


def _not_json(path: Path, place: int) -> DataError:
    with path.open("rb") as file:
        line = file.read(place).count(b"\n") + 1
    return DataError(f"{path}, line {line}: not JSON from here. Give a JSON list, or one record per line.")
