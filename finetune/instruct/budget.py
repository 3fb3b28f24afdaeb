"""What may be spent, and a promise: it is reserved before a question is asked, so it is never passed."""

import threading
from dataclasses import dataclass
from decimal import Decimal


@dataclass(frozen=True)
class Usage:
    """Tokens of a prompt and of its answer."""

    prompt: int = 0
    answer: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.prompt + other.prompt, self.answer + other.answer)

    @property
    def tokens(self) -> int:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Prices:
    """In money per million tokens."""

    prompt: Decimal = Decimal(0)
    answer: Decimal = Decimal(0)

    def cost(self, usage: Usage) -> Decimal:
        return (self.prompt * usage.prompt + self.answer * usage.answer) / 1_000_000


@dataclass(frozen=True)
class Limit:
    """At most so many tokens and so much money; None is no limit."""

    tokens: int | None = None
    money: Decimal | None = None
    prices: Prices = Prices()

    def allows(self, usage: Usage) -> bool:
        """Whether as much as `usage` may be spent in all."""
        enough_tokens = self.tokens is None or usage.tokens <= self.tokens
        return enough_tokens and (self.money is None or self.prices.cost(usage) <= self.money)


class Budget:
    """Spent and reserved together never pass the limit, from however many threads.

    The law needs that no question uses more than was reserved for it.
    """

    def __init__(self, limit: Limit, spent: Usage = Usage()) -> None:
        self.limit = limit
        self.spent = spent
        self.reserved = Usage()
        self._changed = threading.Condition()

    def reserve(self, most: Usage) -> bool:
        """Set `most` aside; waits while questions in flight may still give some back. False when it is too much."""
        with self._changed:
            while not self.limit.allows(self.spent + self.reserved + most):
                if not self.reserved.tokens:
                    return False
                self._changed.wait()
            self.reserved += most
            return True

    def settle(self, most: Usage, used: Usage) -> None:
        """A question that had `most` set aside has used `used`."""
        with self._changed:
            self.reserved += Usage(-most.prompt, -most.answer)
            self.spent += used
            self._changed.notify_all()
