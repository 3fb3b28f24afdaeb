"""A question on its way to the engine's thread, and its answer on the way back."""

import queue
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llava_app.engine import Piece, Sampling
from llava_app.images import Picture

if TYPE_CHECKING:
    from llava_app.prompts import Prepared  # imports torch, and the page reads pieces without it

HEARTBEAT = 0.1  # seconds without news after which a waiting consumer gets an empty piece


@dataclass(frozen=True)
class Shown:
    """A picture in a prompt: its image tokens are those from `start` to `end`."""

    picture: Picture
    start: int
    end: int
    together: bool = False  # as in `prompts.prepare`

    @property
    def key(self) -> str:
        """What the features are kept by: those of one picture differ with the way it is seen."""
        return features_key(self.picture, together=self.together)


def features_key(picture: Picture, *, together: bool) -> str:
    return f"{picture.digest} together" if together else picture.digest


@dataclass(eq=False)
class Request:
    """A question on its way to the thread, and the pieces on their way back."""

    ids: list[int]  # the prompt
    shown: list[Shown]
    sampling: Sampling
    prepared: dict[str, "Prepared"]  # by key, the pictures whose features were not there when it was asked
    continued: bool = False  # whether the prompt ends in the middle of an answer
    asked: float = field(default_factory=time.monotonic)
    outbox: "queue.SimpleQueue[Piece | Exception]" = field(default_factory=queue.SimpleQueue)
    given_up: threading.Event = field(default_factory=threading.Event)  # set when nobody reads the answer any more
    phase: str = "queued"  # as in Piece

    @property
    def contents(self) -> list[int]:
        """The prompt as `Slots` compares it: text by its ids, a picture by a negative number of its own."""
        contents = list(self.ids)
        for shown in self.shown:
            number = -1 - hash(shown.key) % 2**62
            contents[shown.start : shown.end] = [number] * (shown.end - shown.start)
        return contents


def collect(arrivals: "queue.SimpleQueue[Piece | Exception]", heartbeat: Piece) -> Piece:
    """All that has arrived, as one piece; the `heartbeat` when nothing has for a while. Raises an exception that has
    arrived.

    Joining keeps a slow consumer at the model's heels instead of one redraw per token behind.
    """
    try:
        arrived = [arrivals.get(timeout=HEARTBEAT)]
    except queue.Empty:
        return heartbeat
    while not arrivals.empty():
        arrived.append(arrivals.get())
    pieces = []
    for item in arrived:
        if isinstance(item, Exception):
            raise item
        pieces.append(item)
    last = pieces[-1]
    left_out = next((piece.left_out for piece in pieces if piece.left_out), None)
    return Piece("".join(piece.text for piece in pieces), last.finish, last.tokens, last.phase, left_out, last.wait)
