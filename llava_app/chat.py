"""One message, from the open question to the finished conversation. Knows neither the page nor the model."""

import logging
import secrets
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from llava_app.conversation import Conversation
from llava_app.engine import Engine, Sampling
from llava_app.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far an answer has come."""

    conversation: Conversation  # what to keep if nothing more came: the answer so far, marked "stopped" until the last
    text: str  # the answer so far
    phase: str  # "queued" | "reading" | "writing" | "done" (the last one)
    seconds_to_first: float | None = None  # from the call to the first text; None before it
    tokens_per_second: float | None = None  # after the first token; None until two tokens were counted


def reply(engine: Engine, conversation: Conversation, sampling: Sampling) -> Iterator[Progress]:
    """Stream the answer to the open last turn of `conversation`; the last Progress holds the finished conversation.

    Closing the iterator stops the model; the conversation of the last Progress is then the one to keep.
    Raises UserError; the caller's conversation is as it was, its question still open.
    """
    raise NotImplementedError
