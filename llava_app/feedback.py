"""Votes and corrections, kept as LLaVA records that stage 2 can train on.

FOLDER/records.jsonl   answers somebody liked or corrected: python -m finetune instruct --data FOLDER/records.jsonl
FOLDER/disliked.jsonl  answers somebody disliked, kept apart so that nothing learns from them
FOLDER/pictures/       the pictures of both, each once
"""

import errno
import json
import os
import secrets
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from llava_app.conversation import Conversation, to_record
from llava_app.errors import DataError
from llava_app.images import Picture
from llava_app.lines import append_line

MOST_BYTES = 4_000_000_000
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, none for this user, none for so large a file
NO_ROOM = (
    "The disk of this page is full, so your vote was not kept. Whoever runs the page can make room; then vote again."
)
RECORDS = {"up": "records.jsonl", "corrected": "records.jsonl", "down": "disliked.jsonl"}


class Feedback:
    """The feedback in one folder, which several pages may share. For any thread."""

    def __init__(self, folder: Path, *, most_bytes: int = MOST_BYTES) -> None:
        self.folder = folder
        self._most_bytes = most_bytes

    def keep(
        self, conversation: Conversation, vote: str, *, model: str, answer: str = "", replaces: str | None = None
    ) -> str:
        """Keep a judgement of the last answer of `conversation`, and give the id of its record.

        `vote`: "up", "down" or "corrected", where `answer` is what the model had answered. The record with the id
        `replaces` goes, so that a person who thinks again is counted once. ValueError when the last turn is open,
        DataError when the folder or the disk is full: then the records are as they were.
        """
        conversation = conversation.spread()  # training knows pictures
        identifier = secrets.token_hex(8)
        record = to_record(conversation, identifier, [_file_name(picture) for picture in conversation.pictures])
        about = {"vote": vote, "model": model, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        record["feedback"] = about | ({"answer": answer} if vote == "corrected" else {})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                self._check_room()
                for picture in conversation.pictures:
                    self._keep_picture(picture)
                self._add(self.folder / RECORDS[vote], record, replaces)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise DataError(NO_ROOM) from error
        return identifier

    def _check_room(self) -> None:
        size = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        if size > self._most_bytes:
            raise DataError(
                f"The folder of the feedback holds {size / 1e9:.1f} GB; the limit is {self._most_bytes / 1e9:g}. "
                "Your vote was not kept. Whoever runs this page can move the folder away."
            )

    def _keep_picture(self, picture: Picture) -> None:
        path = self.folder / _file_name(picture)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            picture.image.save(temporary, "PNG")
            os.replace(temporary, path)

    def _add(self, path: Path, record: dict[str, Any], replaces: str | None) -> None:
        before = append_line(path, json.dumps(record, ensure_ascii=False))
        if not replaces:
            return
        try:
            self._drop(replaces)  # only now: who is killed in between has it twice, not lost
        except OSError:
            os.truncate(path, before)
            raise

    def _drop(self, identifier: str) -> None:
        for name in set(RECORDS.values()):
            path = self.folder / name
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            kept = [line for line in lines if _identifier(line) != identifier]
            if len(kept) < len(lines):
                _replace(path, b"".join(kept))


def judged(conversation: Conversation, turn: int, answer: str | None = None) -> Conversation:
    """The conversation up to `turn`, with `answer` in place of what the model wrote there."""
    turns = conversation.turns[: turn + 1]
    if answer is not None:
        turns = (*turns[:-1], replace(turns[-1], answer=answer, finish="stop"))
    return replace(conversation, turns=turns)


def _identifier(line: bytes) -> str | None:
    """The id of a record; None of a line that is none, which a crash cut short."""
    try:
        return str(json.loads(line)["id"])
    except (ValueError, KeyError, TypeError):
        return None


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _file_name(picture: Picture) -> str:
    return f"pictures/{picture.digest[:32]}.png"
