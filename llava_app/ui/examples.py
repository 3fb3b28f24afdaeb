"""Memes to try, each with a question about it."""

import json
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Example:
    """A picture that lies next to the app and a question about it."""

    image: Path
    question: str


def read_examples(folder: Path = EXAMPLES) -> tuple[Example, ...]:
    """The examples that questions.json in `folder` lists; none where there is no such file."""
    path = folder / "questions.json"
    if not path.exists():
        return ()
    listed = json.loads(path.read_text(encoding="utf-8"))
    return tuple(Example(folder / entry["image"], entry["question"]) for entry in listed)
