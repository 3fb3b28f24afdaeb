"""Who may open the page: names with passwords from files or the environment, for Gradio's login."""

import hashlib
import hmac
import os
import secrets
from asyncio import Lock, sleep
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from llava_app.errors import BusyError, UserError

VARIABLE = "LLAVA_PASSWORD"
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # s after a wrong password: doubled each time, up to the longest

MOST_WAITING = 8  # wrong passwords for a name from an address, whose answers are still to come
MOST_GUESSERS = 10_000  # that are remembered; the one that came first goes first
ADDRESS: ContextVar[str] = ContextVar("address", default="")  # of whoever sends the request, as the door counts it


@dataclass
class _Guesses:
    """Wrong passwords for one name, or for all names that there are not, from one address."""

    failures: int = 0  # since the last success
    waiting: int = 0  # for their answer
    turn: Lock = field(default_factory=Lock)


class Passwords:
    """Compares in constant time and answers a wrong password late, one of an address for a name after the other.

    So guessing is slow however many guesses are sent at once, and whoever guesses keeps nobody else out: a right
    password never waits.
    """

    def __init__(self, known: Mapping[str, str]) -> None:
        """`known`: names and their passwords, of which only keyed hashes are kept."""
        self._key = secrets.token_bytes(32)
        self._hashes = {name: self._hash(password) for name, password in known.items()}
        self._nobody = secrets.token_bytes(32)
        self._guesses: OrderedDict[tuple[str | None, str], _Guesses] = OrderedDict()

    async def check(self, name: str, password: str) -> bool:
        """Whether `password` is that of `name`. Raises BusyError, without looking at it, when as many wrong ones as
        may wait from the same address do."""
        guesses = self._guesses_at(name)
        if guesses.waiting >= MOST_WAITING:  # looking would tell at once whether it is the right one
            raise BusyError(
                f"{guesses.waiting} wrong passwords for this name wait for their answer, which is the limit. "
                "Try again when they have it."
            )
        if hmac.compare_digest(self._hash(password), self._hashes.get(name, self._nobody)):
            guesses.failures = 0
            return True
        guesses.waiting += 1
        try:
            async with guesses.turn:
                guesses.failures += 1
                await sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(guesses.failures - 1, 10)))
        finally:
            guesses.waiting -= 1
        return False

    def _guesses_at(self, name: str) -> _Guesses:
        guesses = self._guesses.setdefault((name if name in self._hashes else None, ADDRESS.get()), _Guesses())
        if len(self._guesses) > MOST_GUESSERS:
            self._guesses.popitem(last=False)
        return guesses

    def _hash(self, password: str) -> bytes:
        return hmac.digest(self._key, password.encode("utf-8", "replace"), hashlib.sha256)


def read_passwords(entries: Sequence[str]) -> dict[str, str]:
    """Names and passwords of entries like NAME:FILE, or NAME alone, whose password is in the environment.

    Raises UserError, which never holds what could be a password.
    """
    return dict(map(_read, entries))


def _read(entry: str) -> tuple[str, str]:
    name, _, file = entry.partition(":")
    try:
        password = Path(file).read_text(encoding="utf-8").strip() if file else os.environ.get(VARIABLE, "")
    except (OSError, ValueError):
        raise UserError(
            f"--auth {name}: the file with the password cannot be read. Give NAME:FILE, never the password itself."
        ) from None
    if not name or not password:
        where = "the file" if file else VARIABLE
        raise UserError(f"--auth needs a name and a password, and {where} holds none. Write one there.")
    return name, password
