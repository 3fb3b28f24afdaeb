"""The folder of a generation: what was asked for, the contexts, the ledger, reviews, and what came of it.

Everything but the ledger and the reviews can be made again from the rest.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.instruct.context import Context, read_contexts, read_text, write_contexts
from llava_app.errors import DataError


@dataclass(frozen=True)
class Settings:
    """What must stay the same from the first question to the last."""

    kinds: tuple[str, ...]
    domain: str
    prompts: dict[str, str]  # kind → version
    teacher: str  # as given on the command line
    max_tokens: int
    contexts: str  # sha256 of the contexts


@dataclass(frozen=True)
class Folder:
    """Where the files of a generation lie."""

    path: Path

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def reviews(self) -> Path:
        return self.path / "reviews.jsonl"

    @property
    def contexts(self) -> Path:
        return self.path / "contexts.jsonl"

    @property
    def settings(self) -> Path:
        return self.path / "settings.json"

    def read_settings(self) -> Settings:
        """Raises DataError where no generation has begun."""
        if not self.settings.exists():
            raise DataError(f"{self.path} holds no generation. Give the pictures' captions and boxes to begin one.")
        stored = json.loads(read_text(self.settings))
        return Settings(**(stored | {"kinds": tuple(stored["kinds"])}))

    def read_contexts(self) -> list[Context]:
        return read_contexts([self.contexts])

    def begin(self, settings: Settings, contexts: list[Context]) -> None:
        """Write down what is asked for; the same again is a resumption. DataError where the folder holds another."""
        self.refuse_other(settings)
        if not self.settings.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_contexts(self.contexts, contexts)
            write_json(self.settings, asdict(settings))

    def refuse_other(self, settings: Settings) -> None:
        """DataError where the folder was begun with other settings than these."""
        if not self.settings.exists():
            return
        before, now = asdict(self.read_settings()), asdict(settings)
        changed = [name for name in now if now[name] != before[name]]
        if changed:
            name = changed[0]
            raise DataError(
                f"{self.path} was begun with {name} {before[name]!s:.80}, not {now[name]!s:.80}. "
                "Give the same again to go on, or another --out."
            )


def hash_contexts(contexts: list[Context]) -> str:
    """sha256 over every context's id, file name and text."""
    told = "\0".join(f"{context.id}\0{context.image}\0{context.text()}" for context in contexts)
    return hashlib.sha256(told.encode()).hexdigest()


def write_json(file: Path, content: Any) -> None:
    """Write by rename, so that a crash leaves the old file or the new one."""
    partial = file.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1, ensure_ascii=False)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
