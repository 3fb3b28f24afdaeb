"""Votes and corrections, kept as LLaVA records that stage 2 can train on.

FOLDER/records.jsonl   answers somebody liked or corrected: python -m finetune instruct --data FOLDER/records.jsonl
FOLDER/disliked.jsonl  answers somebody disliked, kept apart so that nothing learns from them
FOLDER/pictures/       the pictures of both, each once
"""

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

MOST_BYTES = 4_000_000_000
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
        DataError when the folder is full.
        """
        conversation = conversation.spread()  # training knows pictures
        identifier = secrets.token_hex(8)
        record = to_record(conversation, identifier, [_file_name(picture) for picture in conversation.pictures])
        about = {"vote": vote, "model": model, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        record["feedback"] = about | ({"answer": answer} if vote == "corrected" else {})
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            self._check_room()
            for picture in conversation.pictures:
                self._keep_picture(picture)
            self._append(self.folder / RECORDS[vote], record)
            if replaces:  # only now: who is killed in between has it twice, not lost
                self._drop(replaces)
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

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        """One line in one write, so that a reader never sees half of it."""
        line = json.dumps(record, ensure_ascii=False) + "\n"
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def _drop(self, identifier: str) -> None:
        for name in set(RECORDS.values()):
            path = self.folder / name
            lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
            kept = [line + "\n" for line in lines if json.loads(line)["id"] != identifier]
            if len(kept) < len(lines):
                temporary = path.with_suffix(".tmp")
                temporary.write_text("".join(kept), encoding="utf-8")
                os.replace(temporary, path)


def judged(conversation: Conversation, turn: int, answer: str | None = None) -> Conversation:
    """The conversation up to `turn`, with `answer` in place of what the model wrote there."""
    turns = conversation.turns[: turn + 1]
    if answer is not None:
        turns = (*turns[:-1], replace(turns[-1], answer=answer, finish="stop"))
    return replace(conversation, turns=turns)


def _file_name(picture: Picture) -> str:
    return f"pictures/{picture.digest[:32]}.png"
