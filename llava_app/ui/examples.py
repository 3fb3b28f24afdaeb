"""Pictures to try, each with a question about it: memes of the drawn world, and others for models that know more."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"
WORLD = EXAMPLES / "world"  # what only a real LLaVA can answer


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


def gallery(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """The examples as a Chatbot takes them."""
    return [
        {"text": example.question, "icon": str(example.image), "files": [str(example.image)]} for example in examples
    ]
