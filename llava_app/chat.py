"""One message, from the open question to the finished conversation. Knows neither the page nor the model."""

import logging
import secrets
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from llava_app.conversation import Conversation
from llava_app.engine import Engine, Piece, Sampling
from llava_app.engine.watch import Wait
from llava_app.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far an answer has come."""

    conversation: Conversation  # what to keep if nothing more came: the answer so far, marked "stopped" until the last
    text: str  # the answer so far
    phase: str  # "queued" | "reading" | "writing" | "done" (the last one)
    seconds_to_first: float | None = None  # from the call to the first token; None before it
    tokens_per_second: float | None = None  # after the first token; None until it means something
    left_out: str | None = None  # what of the conversation the model was not shown, as one sentence
    tokens: int = 0  # written so far; 0 where the engine cannot count
    wait: Wait | None = None  # while "queued", where the engine knows it


@dataclass(frozen=True)
class Account:
    """What the log has of a question that was asked: nothing of its words, its pictures and its answer."""

    request: str  # the id that a fault is told with
    model: str
    outcome: str  # as Turn.finish; "left" when nobody read on; the kind of UserError; "fault"
    turns: int
    pictures: int
    tokens: int
    seconds: float  # from the question to the end
    seconds_to_first: float | None


def reply(engine: Engine, conversation: Conversation, sampling: Sampling) -> Generator[Progress, None, None]:
    """Stream the answer to the open last turn of `conversation`, or the rest of one that has begun; the last Progress
    holds the finished conversation.

    Closing the iterator stops the model; the conversation of the last Progress is then the one to keep.
    Raises UserError, for a fault with an id that finds it in the log; the caller's conversation is as it was, its
    question still open.
    """
    request, asked = secrets.token_hex(4), time.perf_counter()
    pieces = engine.answer(conversation, sampling)
    progress, outcome = Progress(conversation, "", "queued"), "left"
    try:
        for progress in _progress(pieces, conversation):
            outcome = (progress.conversation.turns[-1].finish or "") if progress.phase == "done" else outcome
            yield progress
    except UserError as error:
        outcome = type(error).__name__
        raise
    except Exception as error:
        outcome = "fault"
        logger.exception("Error %s while %s answered", request, engine.card.name)
        raise UserError(
            f"Something went wrong (error id {request}). Send the question again; if it fails again, "
            "start a new chat. The log of the app says more under this id."
        ) from error
    finally:
        if isinstance(pieces, Generator):
            pieces.close()  # at once, not when the garbage collector comes by
        seconds = round(time.perf_counter() - asked, 3)
        account = _account(request, engine.card.name, outcome, progress, seconds)
        logger.info("Question answered", extra={"account": account})


def _account(request: str, model: str, outcome: str, progress: Progress, seconds: float) -> Account:
    conversation, first = progress.conversation, progress.seconds_to_first
    turns, pictures = len(conversation.turns), len(conversation.pictures)
    first = None if first is None else round(first, 3)
    return Account(request, model, outcome, turns, pictures, progress.tokens, seconds, first)


def _progress(pieces: Iterator[Piece], conversation: Conversation) -> Iterator[Progress]:
    pace = _Pace(time.monotonic())
    text, left_out = conversation.turns[-1].answer or "", None
    for piece in pieces:
        text += piece.text
        left_out = piece.left_out or left_out
        pace = pace.after(piece, time.monotonic())
        yield Progress(
            conversation.answer(text, finish=piece.finish or "stopped"),
            text,
            "done" if piece.finish else piece.phase,
            pace.seconds_to_first,
            pace.tokens_per_second,
            left_out,
            pace.tokens,
            piece.wait,
        )


@dataclass(frozen=True)
class _Pace:
    """When tokens came, on the monotonic clock in seconds."""

    asked: float
    first: float | None = None
    first_tokens: int = 0  # how many had come by then
    last: float = 0.0
    tokens: int = 0

    def after(self, piece: Piece, now: float) -> "_Pace":
        if self.first is None:
            arrived = bool(piece.text or piece.tokens)
            return _Pace(self.asked, now, piece.tokens, now, piece.tokens) if arrived else self
        if piece.tokens <= self.tokens:
            return self
        return _Pace(self.asked, self.first, self.first_tokens, now, piece.tokens)

    @property
    def seconds_to_first(self) -> float | None:
        return None if self.first is None else self.first - self.asked

    @property
    def tokens_per_second(self) -> float | None:
        if self.first is None or self.last <= self.first:
            return None
        return (self.tokens - self.first_tokens) / (self.last - self.first)
