"""Engines in a process of their own. Python runs one thread at a time: in one process, drawing pages for eight people
and writing their answers would take turns, and torch would hold up the page's start for seconds.

The page's side sends calls, numbered, through a pipe; the other side answers each with one item or, for an answer of
the model, with many. When the process dies, what was asked ends with a named error, and the next question starts it
anew.
"""

import logging
import multiprocessing
import pickle
import queue
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from llava_app.checkpoints import Card, Outlook
from llava_app.conversation import Conversation
from llava_app.engine import Piece, Sampling
from llava_app.engine.request import collect
from llava_app.engine.watch import Snapshot
from llava_app.errors import ModelError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from llava_app.memory import Plan

ENDED = (
    "The process that the models run in has ended, most often because the memory was full. "
    "Send the question again, which starts it anew, or choose a smaller model."
)

logger = logging.getLogger(__name__)


class EndedError(ModelError):
    """The models' process has ended, by itself or by the system's hand."""

    def __init__(self) -> None:
        super().__init__(ENDED)


@dataclass(frozen=True)
class Opened:
    """What the page knows of a model that the other process has loaded."""

    why: str  # as in `loading.Loaded`
    packed: bytes

    @cached_property
    def parts(self) -> tuple["ProcessorMixin", "Plan"]:
        """As in `loading.Loaded`; unpacked when somebody asks, because that imports torch."""
        return pickle.loads(self.packed)


class ModelProcess:
    """A process that models are loaded into; it starts with the first of them, and again after it has died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._line: _Line | None = None

    def choose(self) -> tuple[Card, str]:
        """The model to start with on this machine, and the reason; see `outlook.default_card`."""
        return self.line().call("choose")

    def clear(self) -> None:
        """Give the memory back of weights that no engine uses; the last are kept for the next model of the same."""
        with suppress(EndedError):
            self.line().call("clear")

    def weigh(self, cards: Sequence[Card], precision: str) -> dict[Card, Outlook]:
        """What each would take here; those are missing of which nothing is known."""
        return self.line().call("weigh", cards, precision)

    def free(self) -> float:
        """Bytes of memory that nobody uses where the models run."""
        return self.line().call("free")

    def line(self) -> "_Line":
        """To the process that lives now."""
        with self._lock:
            if self._line and self._line.dead:
                logger.error("The models' process ended with exit code %s and is started anew.", self._line.exit_code)
                self._line = None
            self._line = self._line or _Line()
            return self._line


class ProcessEngine:
    """An engine of the other process. Made by loading, which takes seconds and raises ModelError."""

    def __init__(self, models: ModelProcess, card: Card, precision: str, *, share: float = 1.0) -> None:
        """`precision` and `share` as in `loading.load`."""
        self.card = card
        self._models = models
        self._wanted = (card, precision, share)
        self._lock = threading.Lock()
        self._line = models.line()
        self._number, self.opened = self._load()

    def _load(self) -> tuple[int, Opened]:
        return self._line.call("load", *self._wanted)

    def _where(self) -> tuple["_Line", int]:
        with self._lock:
            if self._line.dead:
                self._line = self._models.line()
                self._number, self.opened = self._load()
            return self._line, self._number

    def answer(self, conversation: Conversation, sampling: Sampling) -> Iterator[Piece]:
        """Stream the answer to the open last turn; see `Engine.answer`."""
        line, engine = self._where()
        number, arrivals = line.send("answer", engine, conversation, sampling)
        piece = Piece("", phase="reading")
        try:
            while piece.finish is None:
                piece = collect(arrivals, Piece("", phase=piece.phase, wait=piece.wait))
                yield piece
        finally:
            line.forget(number)

    def snapshot(self) -> Snapshot | None:
        """What the engine is doing now; None while its process is gone."""
        try:
            return self._line.call("snapshot", self._number)
        except EndedError:
            return None

    def close(self) -> None:
        """End running and waiting answers, and give the model's memory back, which a process that has ended has."""
        with suppress(EndedError):
            self._line.call("close", self._number)


class _Line:
    """The pipe to one process, and who waits for what comes out of it."""

    def __init__(self) -> None:
        spawning = multiprocessing.get_context("spawn")  # a fork would take over threads and their locks
        self._connection, theirs = spawning.Pipe()
        self._process = spawning.Process(target=serve, args=(theirs,), name="models", daemon=True)
        self._process.start()
        theirs.close()  # so that its end is noticed
        self.dead = False
        self._numbers = count()
        self._waiting: dict[int, queue.SimpleQueue[Any]] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._read, name="from the models", daemon=True).start()

    @property
    def exit_code(self) -> int | None:
        return self._process.exitcode

    def call(self, verb: str, *arguments: Any) -> Any:
        """Send, and wait for the one item that answers. Raises what the other side raised."""
        number, arrivals = self.send(verb, *arguments)
        item = arrivals.get()
        self.forget(number)
        if isinstance(item, Exception):
            raise item
        return item

    def send(self, verb: str, *arguments: Any) -> tuple[int, "queue.SimpleQueue[Any]"]:
        """Its number, and where the items arrive that answer it."""
        arrivals: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with self._lock:
            number = next(self._numbers)
            self._waiting[number] = arrivals
            self._post(number, verb, arguments)
            if self.dead:
                arrivals.put(EndedError())
        return number, arrivals

    def forget(self, number: int) -> None:
        """Nobody waits for this any more; the other side stops with it."""
        with self._lock:
            if self._waiting.pop(number, None):
                self._post(number, "stop", ())

    def _post(self, number: int, verb: str, arguments: tuple[Any, ...]) -> None:
        try:
            self._connection.send((number, verb, arguments))
        except OSError:
            self.dead = True

    def _read(self) -> None:
        while True:
            try:
                number, item = self._connection.recv()
            except (EOFError, OSError):
                break
            arrivals = self._waiting.get(number)
            if arrivals:
                arrivals.put(item)
        with self._lock:
            self.dead = True
            for arrivals in self._waiting.values():
                arrivals.put(EndedError())


def serve(connection: Connection) -> None:
    """What the process does until the page's side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the page, which then ends this
    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    from llava_app.engine.host import Host  # torch is for this side only

    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which this process would leave behind
    disable_progress_bar()  # the page shows how far loading is, and each line of the log is to be a message
    Host(connection).work()
