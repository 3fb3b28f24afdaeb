"""Who may open the page: names with passwords from files or the environment, for Gradio's login."""

import hashlib
import hmac
import os
import secrets
from asyncio import Lock, sleep
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_app.errors import UserError

VARIABLE = "LLAVA_PASSWORD"
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # s after a wrong password: doubled each time, up to the longest


class Passwords:
    """Compares in constant time, one attempt at a name after the other, and answers a wrong one late.

    So guessing is slow however many guess at once, while the right password always works.
    """

    def __init__(self, known: Mapping[str, str]) -> None:
        """`known`: names and their passwords, of which only keyed hashes are kept."""
        self._key = secrets.token_bytes(32)
        self._hashes = {name: self._hash(password) for name, password in known.items()}
        self._nobody = secrets.token_bytes(32)
        self._locks: defaultdict[str | None, Lock] = defaultdict(Lock)
        self._failures: Counter[str | None] = Counter()  # since the last success; None: of all names that there are not

    async def check(self, name: str, password: str) -> bool:
        """Whether `password` is that of `name`."""
        whose = name if name in self._hashes else None
        async with self._locks[whose]:
            if hmac.compare_digest(self._hash(password), self._hashes.get(name, self._nobody)):
                self._failures[whose] = 0
                return True
            await sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(self._failures[whose], 10)))
            self._failures[whose] += 1
            return False

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
