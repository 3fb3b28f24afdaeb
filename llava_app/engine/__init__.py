"""What every engine is, local or remote: it takes a conversation and hands out the answer in pieces."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

from llava_app.checkpoints import Card
from llava_app.conversation import Conversation
from llava_app.engine.watch import Snapshot, Wait


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; a seed makes a sampled answer repeatable.

    `top_k` 0 means every token; `repetition_penalty` 1 none; a text of `stop` ends the answer before it.
    Raises ValueError for a value outside its bounds; `clamped` moves it to the nearest bound instead.
    """

    temperature: float = 0.2
    top_p: float = 0.95
    max_new_tokens: int = 512
    seed: int | None = None
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    TEMPERATURE: ClassVar[tuple[float, float]] = (0.0, 2.0)
    TOP_P: ClassVar[tuple[float, float]] = (0.05, 1.0)
    MAX_NEW_TOKENS: ClassVar[tuple[int, int]] = (1, 2048)
    SEED: ClassVar[tuple[int, int]] = (0, 2**32 - 1)
    TOP_K: ClassVar[tuple[int, int]] = (0, 1000)
    REPETITION_PENALTY: ClassVar[tuple[float, float]] = (0.5, 2.0)

    def __post_init__(self) -> None:
        bounded = {
            "temperature": (self.temperature, self.TEMPERATURE),
            "top_p": (self.top_p, self.TOP_P),
            "max_new_tokens": (self.max_new_tokens, self.MAX_NEW_TOKENS),
            "seed": (self.SEED[0] if self.seed is None else self.seed, self.SEED),
            "top_k": (self.top_k, self.TOP_K),
            "repetition_penalty": (self.repetition_penalty, self.REPETITION_PENALTY),
        }
        for name, (value, (low, high)) in bounded.items():
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must lie between {low} and {high}.")
        if not all(self.stop):
            raise ValueError("stop holds an empty text, which would end every answer at once.")

    @classmethod
    def clamped(
        cls,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        max_new_tokens: float | None = None,
        seed: float | None = None,
        repetition_penalty: float | None = None,
    ) -> "Sampling":
        """The nearest allowed setting to numbers from outside; None and NaN mean the default."""
        return cls(
            temperature=_clamp(temperature, cls.temperature, cls.TEMPERATURE),
            top_p=_clamp(top_p, cls.top_p, cls.TOP_P),
            max_new_tokens=int(_clamp(max_new_tokens, cls.max_new_tokens, cls.MAX_NEW_TOKENS)),
            seed=None if seed is None or math.isnan(seed) else int(_clamp(seed, 0, cls.SEED)),
            repetition_penalty=_clamp(repetition_penalty, cls.repetition_penalty, cls.REPETITION_PENALTY),
        )


def _clamp(value: float | None, default: float, bounds: tuple[float, float]) -> float:
    if value is None or math.isnan(value):
        return default
    low, high = bounds
    return min(max(value, low), high)


@dataclass(frozen=True)
class Piece:
    """A part of an answer, in order; the texts joined are the answer.

    An empty text without `finish` is a heartbeat, sent at least every 0.2 s while there is nothing to show.
    """

    text: str
    # On the last piece only: "stop" (end token or stop text) | "length" | "stopped" (engine closed) | "time".
    finish: str | None = None
    tokens: int = 0  # written so far, the end token included; 0 where the engine cannot count
    phase: str = "writing"  # what the engine is doing: "queued" | "reading" (the prompt) | "writing"
    left_out: str | None = None  # on the first piece, what of the conversation the model could not be shown
    wait: Wait | None = None  # while "queued", where the engine knows it


class Engine(Protocol):
    """Something that answers. `answer` may be called from any thread."""

    card: Card

    def answer(self, conversation: Conversation, sampling: Sampling) -> Iterator[Piece]:
        """The answer to the open last turn. Closing the iterator stops the model within one token and never waits.

        Raises UserError (ContextError when the conversation is too long) or, for a fault, whatever went wrong.
        """
        ...

    def snapshot(self) -> Snapshot | None:
        """What it is doing now, in figures; None where it cannot know."""
        ...

    def close(self) -> None:
        """Give the model's memory back. Running and waiting answers end."""
        ...
