"""What a teacher is. There are three: endpoint.py, local.py and template.py."""

from dataclasses import dataclass
from typing import Protocol

from finetune.instruct.budget import Usage
from finetune.instruct.context import Context
from finetune.instruct.prompts import Message
from llava_app.errors import UserError


class TeacherError(UserError):
    """A teacher that cannot be used at all: no key, no such model, no quota left."""


class NoReply(Exception):
    """This question got no answer.

    `again`: it is worth asking once more, `after` so many seconds where the server says so.
    `billed`: it may have been worked on and billed, so it counts in full.
    """

    def __init__(self, reason: str, *, again: bool, billed: bool, after: float | None = None) -> None:
        super().__init__(reason)
        self.again = again
        self.billed = billed
        self.after = after


@dataclass(frozen=True)
class Task:
    """One question to the teacher: a kind of data for a picture."""

    context: Context
    kind: str
    messages: tuple[Message, ...]
    prompt: str  # version of the system prompt and the examples; "" for a teacher that reads none

    @property
    def key(self) -> str:
        return f"{self.context.id}/{self.kind}"


@dataclass(frozen=True)
class Reply:
    """What a teacher wrote; `finish` is "stop", or "length" at the token limit."""

    text: str
    finish: str
    usage: Usage


class Teacher(Protocol):
    """`most` bounds what `ask` may use; `at_once` is how many questions it takes at the same time."""

    name: str
    at_once: int

    def most(self, task: Task) -> Usage: ...

    def ask(self, task: Task) -> Reply:
        """Raises NoReply, or TeacherError where no further question would be answered either."""
        ...
