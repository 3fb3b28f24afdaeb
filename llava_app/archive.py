"""A conversation as one zip file, out and in: a LLaVA record, its pictures, and the same to read as Markdown."""

import io
import json
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_app.conversation import Conversation, from_record, to_record
from llava_app.errors import DataError
from llava_app.images import Picture, open_image
from llava_app.limits import LOCAL, Limits, check_kept, check_room

RECORD = "conversation.json"
MARKDOWN = "conversation.md"
MAX_ENTRIES = 200
MAX_PICTURES = 50  # decoded, 600 MB at most
MAX_RECORD = 5_000_000  # bytes
MAX_PICTURE = 64_000_000  # bytes of one picture's file
MAX_TOTAL = 256_000_000  # bytes of all files, unpacked
MAX_TURNS = 500


def pack(conversation: Conversation, *, typed: Callable[[str], str], written: Callable[[str], str]) -> bytes:
    """A zip file of a finished conversation; see `markdown`. ValueError when its last turn is open or it has none."""
    names = [f"pictures/{number}.png" for number in range(1, len(conversation.pictures) + 1)]
    record = to_record(conversation, "conversation", names)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(RECORD, json.dumps([record], ensure_ascii=False, indent=2))
        archive.writestr(MARKDOWN, markdown(conversation, names, typed=typed, written=written))
        for name, picture in zip(names, conversation.pictures, strict=True):
            archive.writestr(zipfile.ZipInfo(name), _png(picture))
    return file.getvalue()


def unpack(path: Path, limits: Limits = LOCAL) -> Conversation:
    """The conversation in a zip file made by `pack`, or by hand in the same form; nothing is written to the disk.

    Raises DataError: no zip file, or one that is too large, has no record, names a file outside of itself or one that
    it lacks. ImageError: a picture that cannot be used, or too many. ContextError: texts beyond `limits`. BusyError: no
    room in memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = _checked(archive)
            record = _record(archive, sizes)
            names = record.get("image") or []
            names = names if isinstance(names, list) else [names]
            most = min(MAX_PICTURES, limits.pictures_kept)
            if len(names) > most:
                raise DataError(f"The record names {len(names):,} pictures; the limit is {most}.")
            pictures = [_picture(archive, str(name), sizes, limits) for name in names]
    except (
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        RuntimeError,
        EOFError,
    ) as error:  # the last but one: it is encrypted
        raise DataError("This is no zip file that can be read here. Choose one that this page exported.") from error
    conversation = from_record(record, pictures)
    if len(conversation.turns) > MAX_TURNS:
        raise DataError(f"The conversation has {len(conversation.turns):,} questions; the limit is {MAX_TURNS}.")
    check_kept(conversation, limits)
    return conversation


def markdown(
    conversation: Conversation, names: list[str], *, typed: Callable[[str], str], written: Callable[[str], str]
) -> str:
    """The conversation to read; `names` are the files of its pictures, in order.

    `typed` and `written` make Markdown of what a person typed and a model wrote, so that no viewer fetches anything.
    """
    remaining = iter(names)
    parts = [] if conversation.system is None else [f"*System prompt: {typed(conversation.system)}*"]
    for turn in conversation.turns:
        parts.append(f"**Question:** {typed(turn.question)}".strip())
        parts += [f"![]({next(remaining)})" for _ in turn.images]
        parts.append(f"**Answer:** {written(turn.answer or '')}".strip())
    return "\n\n".join(parts) + "\n"


def _checked(archive: zipfile.ZipFile) -> dict[str, int]:
    """The files of an archive with their sizes, as it states them. Raises DataError when it asks for too much."""
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise DataError(f"The zip file holds {len(entries):,} files; the limit is {MAX_ENTRIES}.")
    total = sum(entry.file_size for entry in entries)
    if total > MAX_TOTAL:
        raise DataError(f"The zip file unpacks to {total / 1e6:,.0f} MB; the limit is {MAX_TOTAL // 1_000_000} MB.")
    for entry in entries:
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise DataError(f"{Path(entry.filename).name} in the zip file is a link. Put the file itself in.")
    return {entry.filename: entry.file_size for entry in entries}


def _record(archive: zipfile.ZipFile, sizes: dict[str, int]) -> dict[str, Any]:
    text = _read(archive, RECORD, sizes, MAX_RECORD)
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{RECORD} in the zip file is not JSON. Export the conversation again.") from error
    record = stored[0] if isinstance(stored, list) and len(stored) == 1 else stored
    if not isinstance(record, dict):
        raise DataError(f"{RECORD} in the zip file must hold one LLaVA record.")
    return record


def _picture(archive: zipfile.ZipFile, name: str, sizes: dict[str, int], limits: Limits) -> Picture:
    check_room(limits)
    return open_image(_read(archive, name, sizes, MAX_PICTURE), name)


def _read(archive: zipfile.ZipFile, name: str, sizes: dict[str, int], most: int) -> bytes:
    """One file of the archive, at most `most` bytes; no more than it states is unpacked."""
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise DataError(f"The record names “{name[:80]}”, which lies outside of the zip file.")
    if name not in sizes:
        raise DataError(f"The zip file holds no {name[:80]}. Choose one that this page exported.")
    if sizes[name] > most:
        raise DataError(f"{name} in the zip file has {sizes[name] / 1e6:,.0f} MB; the limit is {most // 1_000_000} MB.")
    with archive.open(name) as file:
        return file.read(most + 1)[: sizes[name]]


def _png(picture: Picture) -> bytes:
    file = io.BytesIO()
    picture.image.save(file, "PNG")
    return file.getvalue()
