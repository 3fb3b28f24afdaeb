"""Turns and conversations as immutable values, and the LLaVA record in which they are kept and trained on."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Self

from llava_app.errors import DataError
from llava_app.images import Picture, framed

IMAGE_MARK = "<image>"  # a picture's place in the text of a record and of a prompt
FINISHES = ("stop", "length", "stopped", "time", "failed", "open")
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Turn:
    """A question with its pictures and, once there is one, its answer.

    `finish` says why the answer ended: "stop" (the model's end token), "length" (token limit), "stopped" (by the
    person), "time" (time limit) or "failed"; "open" means that it goes on where it stopped. Half of a surrogate pair,
    which no encoding can write, becomes U+FFFD.
    """

    question: str
    images: tuple[Picture, ...] = ()
    answer: str | None = None
    finish: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", well_formed(self.question))
        if self.answer is not None:
            object.__setattr__(self, "answer", well_formed(self.answer))
        if self.finish is not None and self.finish not in FINISHES:
            raise ValueError(f"finish is {self.finish!r}; it must be one of {', '.join(FINISHES)}")
        if self.finish is not None and self.answer is None:
            raise ValueError(f"finish is {self.finish!r} but there is no answer that could have ended")

    @property
    def is_open(self) -> bool:
        """Whether the question waits for its answer, or the answer for its rest."""
        return self.answer is None or self.finish == "open"


@dataclass(frozen=True)
class Conversation:
    """Turns in order; only the last may be open, that is, not answered yet. `system` None: the template's own."""

    turns: tuple[Turn, ...] = ()
    system: str | None = None

    def __post_init__(self) -> None:
        if self.system is not None:
            object.__setattr__(self, "system", well_formed(self.system))
        for number, turn in enumerate(self.turns[:-1], start=1):
            if turn.is_open:
                raise ValueError(f"turn {number} of {len(self.turns)} has no answer; only the last turn may be open")

    @property
    def is_open(self) -> bool:
        """Whether the last turn is open."""
        return bool(self.turns) and self.turns[-1].is_open

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures, in the order in which the prompt shows them."""
        return tuple(chain.from_iterable(turn.images for turn in self.turns))

    def spread(self) -> Self:
        """The conversation with the frames of each clip as pictures in its place."""
        return replace(self, turns=tuple(replace(turn, images=_stills(turn.images)) for turn in self.turns))

    def framed(self, mode: str) -> Self:
        """The conversation with every picture as `images.framed` makes it."""
        shown = [replace(turn, images=tuple(framed(image, mode) for image in turn.images)) for turn in self.turns]
        return replace(self, turns=tuple(shown))

    def ask(self, question: str, images: Sequence[Picture] = ()) -> Self:
        """Add an open turn. ValueError when the last question still waits for its answer."""
        if self.is_open:
            raise ValueError("the last question has no answer yet; answer it or undo it before asking another")
        return replace(self, turns=(*self.turns, Turn(question, tuple(images))))

    def answer(self, text: str, finish: str = "stop") -> Self:
        """Fill the open turn with its whole answer. ValueError when there is none."""
        if not self.is_open:
            raise ValueError("there is no open question to answer; ask one first")
        return self._with_last(replace(self.turns[-1], answer=text, finish=finish))

    def retry(self) -> Self:
        """Open the last turn again. ValueError when there is no turn."""
        if not self.turns:
            raise ValueError("there is nothing to retry; the conversation has no turns")
        return self._with_last(replace(self.turns[-1], answer=None, finish=None))

    def resume(self) -> Self:
        """Open the last answer where it stopped, to be continued. ValueError when there is none."""
        if not self.turns or self.turns[-1].answer is None:
            raise ValueError("there is no answer to continue; ask something first")
        return self._with_last(replace(self.turns[-1], finish="open"))

    def undo(self) -> Self:
        """Remove the last turn. ValueError when there is no turn."""
        if not self.turns:
            raise ValueError("there is nothing to undo; the conversation has no turns")
        return replace(self, turns=self.turns[:-1])

    def edit(self, index: int, question: str) -> Self:
        """Ask turn `index` (from 0) anew, with its pictures, and drop the turns after it. ValueError out of range."""
        if not 0 <= index < len(self.turns):
            raise ValueError(
                f"there is no turn {index} to edit; the conversation has {len(self.turns)}, counted from 0"
            )
        return replace(self, turns=(*self.turns[:index], Turn(question, self.turns[index].images)))

    def _with_last(self, turn: Turn) -> Self:
        return replace(self, turns=(*self.turns[:-1], turn))


def from_record(record: Mapping[str, Any], pictures: Sequence[Picture] = ()) -> Conversation:
    """Read a LLaVA record: {"id", "image"?, "conversations": [{"from": "human" | "gpt", "value": str}, ...]}.

    Every `<image>` in a question takes the next of `pictures`, wherever it stands; a first message from "system"
    sets the system prompt. DataError when roles do not alternate from "human" to a last "gpt", when a value is not
    text, when an answer holds an `<image>`, or when there are not as many pictures as `<image>`.
    """
    messages = _messages(record)
    system = messages.pop(0)[1] if messages[0][0] == "system" else None
    _check_roles([role for role, _ in messages], offset=1 if system is None else 2)
    questions = [_split_marks(value) for _, value in messages[::2]]
    answers = [value for _, value in messages[1::2]]
    wanted = sum(count for count, _ in questions)
    if wanted != len(pictures):
        raise DataError(f"the questions hold {wanted} {IMAGE_MARK} but there are {len(pictures)} pictures")
    for number, answer in enumerate(answers, start=1):
        if IMAGE_MARK in answer:
            raise DataError(f"answer {number} holds an {IMAGE_MARK}; only questions may show pictures")
    remaining = iter(pictures)
    turns = [
        Turn(_unescape(question), tuple(next(remaining) for _ in range(count)), _unescape(answer), "stop")
        for (count, question), answer in zip(questions, answers, strict=True)
    ]
    return Conversation(tuple(turns), None if system is None else _unescape(system))


def to_record(conversation: Conversation, identifier: str, image_names: Sequence[str] = ()) -> dict[str, Any]:
    """Write a finished conversation as a LLaVA record; `image_names` are the file names of its pictures, in order.

    An `<image>` that somebody typed is written with an invisible word joiner (U+2060) after the `<`, so that no
    trainer takes it for a picture; `from_record` gives it back as typed. ValueError when the last turn is open or
    when names and pictures differ in number.
    """
    if conversation.is_open or not conversation.turns:
        raise ValueError("a record needs at least one turn and an answer in every turn")
    if len(image_names) != len(conversation.pictures):
        raise ValueError(f"{len(image_names)} image names for {len(conversation.pictures)} pictures")
    messages = [] if conversation.system is None else [{"from": "system", "value": _escape(conversation.system)}]
    for turn in conversation.turns:
        marks = f"{IMAGE_MARK}\n" * len(turn.images)
        messages.append({"from": "human", "value": marks + _escape(turn.question)})
        messages.append({"from": "gpt", "value": _escape(turn.answer or "")})
    record: dict[str, Any] = {"id": identifier}
    if image_names:
        record["image"] = image_names[0] if len(image_names) == 1 else list(image_names)
    return record | {"conversations": messages}


def _stills(images: Sequence[Picture]) -> tuple[Picture, ...]:
    return tuple(chain.from_iterable(image.stills for image in images))


def _messages(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The record's messages as (role, text)."""
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise DataError('the record has no "conversations": a list of messages, at least one question and its answer')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("value"), str):
            raise DataError(f'message {number} has no text in "value"')
    return [(str(message.get("from")), message["value"]) for message in messages]


def _check_roles(roles: Sequence[str], offset: int) -> None:
    """DataError unless the roles are human, gpt, human, gpt …; `offset` is the number of the first message."""
    for index, role in enumerate(roles):
        expected = ("human", "gpt")[index % 2]
        if role != expected:
            raise DataError(f'message {index + offset} is from "{role}"; it must be from "{expected}"')
    if not roles or len(roles) % 2:
        raise DataError(f'question {len(roles) // 2 + 1} has no answer; the last message must be from "gpt"')


def _split_marks(value: str) -> tuple[int, str]:
    """How many pictures a question shows, and its text without their marks."""
    count = value.count(IMAGE_MARK)
    marks = f"{IMAGE_MARK}\n" * count
    if value.startswith(marks):
        return count, value.removeprefix(marks)
    return count, value.replace(IMAGE_MARK, "").strip()


def _escape(text: str) -> str:
    return re.sub("<(\u2060*)image>", "<\u2060\\1image>", text)


def _unescape(text: str) -> str:
    return re.sub("<\u2060(\u2060*)image>", "<\\1image>", text)


def well_formed(text: str) -> str:
    return _SURROGATES.sub("\ufffd", text)
