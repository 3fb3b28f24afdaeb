"""The conversations that this server still knows, with their pictures, by their keys."""

import threading
from collections import OrderedDict
from collections.abc import Sequence

from llava_app.images import Picture
from llava_app.ui.display import Talk, new_key

MOST_TALKS = 1_000
MOST_BYTES = 512_000_000  # of pictures, three bytes a pixel


class Live:
    """A bounded memory: the conversation that was not touched for longest goes first. For any thread."""

    def __init__(self, *, most_talks: int = MOST_TALKS, most_bytes: int = MOST_BYTES) -> None:
        self._most_talks = most_talks
        self._most_bytes = most_bytes
        self._talks: OrderedDict[str, Talk] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, talk: Talk) -> None:
        """Remember `talk` as it is now."""
        with self._lock:
            self._forget(talk.key)
            self._talks[talk.key] = talk
            self._bytes += _bytes(talk)
            while len(self._talks) > 1 and (self._bytes > self._most_bytes or len(self._talks) > self._most_talks):
                self._forget(next(iter(self._talks)))

    def key_for(self, talk: Talk) -> str:
        """Under which key `talk` goes on: its own, unless another tab asked there what it does not know; both live.

        An empty one, whose only question was taken back, keeps its own.
        """
        known, asked = self.get(talk.key), _asked(talk)
        before = _asked(known) if known and asked else []
        return talk.key if asked[: len(before)] == before else new_key()

    def get(self, key: str) -> Talk | None:
        """The conversation with this key, while it lives."""
        with self._lock:
            if key in self._talks:
                self._talks.move_to_end(key)
            return self._talks.get(key)

    def forget(self, key: str) -> None:
        """Drop the conversation with this key, if there is one."""
        with self._lock:
            self._forget(key)

    def _forget(self, key: str) -> None:
        talk = self._talks.pop(key, None)
        self._bytes -= _bytes(talk) if talk else 0


def _asked(talk: Talk) -> Sequence[tuple[str, int]]:
    return [(turn.question, len(turn.images)) for turn in talk.conversation.turns]


def _bytes(talk: Talk) -> int:
    return sum(map(_size, talk.conversation.pictures))


def _size(picture: Picture) -> int:
    return sum(still.image.width * still.image.height * 3 for still in {picture, *picture.stills})
