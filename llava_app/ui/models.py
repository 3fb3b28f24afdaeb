"""Which models the page offers, and the engines that are loaded now.

Models load one at a time on a thread of their own, so that the page answers at once and goes on answering. Memory holds
one big model: before another loads, the answers that run are waited for, up to a limit, and its engine is closed. The
built-in models are small and stay.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llava_app.checkpoints import Card, catalogue
from llava_app.engine import Engine
from llava_app.engine.process import ModelProcess, Opened, ProcessEngine
from llava_app.errors import ModelError

SWITCH_LIMIT = 30.0  # seconds that the answers of one model can hold up the next


@dataclass(frozen=True)
class Ready:
    """An engine that answers, and one sentence for the page: where and how it runs, and why."""

    engine: Engine
    why: str
    opened: Opened | None = None  # None where the model runs elsewhere


@dataclass
class _Slot:
    ready: Future[Ready]
    listeners: int = 0


class Models:
    """The list of models and the loaded engines of this process. All methods may be called from any thread."""

    def __init__(self, load: Callable[[Card], Ready], choose: Callable[[], tuple[Card, str]], *, runs: Path) -> None:
        """`choose` names the model to start with, and why; `load` opens any. Both run on the loading thread."""
        self.first: Future[str] = Future()  # the key of the model to start with
        self.first_why = ""
        self._load = load
        self._runs = runs
        self._slots: dict[Card, _Slot] = {}
        self._pinned: tuple[Card, ...] = ()
        self._lock = threading.Lock()
        self._returned = threading.Condition(self._lock)  # an engine that was lent is free again
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs.put(lambda: self._load_first(choose))

    def start(self) -> None:
        """Begin to load, with the model to start with. Before this, whoever needs a model waits."""
        threading.Thread(target=self._work, name="model-loader", daemon=True).start()

    def cards(self) -> dict[str, Card]:
        """The models to choose from, by a key that stays the same whatever else is in the list."""
        listed = catalogue(self._runs)
        sources = {card.source for card in listed}
        pinned = {f"folder/{Path(card.source).name}": card for card in self._pinned if card.source not in sources}
        return pinned | {_key(card): card for card in listed}

    def card(self, key: str) -> Card:
        """The model with this key. Raises ModelError when it is not in the list."""
        card = self.cards().get(key)
        if card is None:
            raise ModelError(f"The model “{Path(key).name}” is not in the list any more. Choose another one.")
        return card

    def why(self, key: str, ready: Ready) -> str:
        """Why this model, if it is the one to start with, and why it runs as it does."""
        started = self.first.done() and not self.first.exception() and self.first.result() == key
        return f"{self.first_why} {ready.why}".strip() if started else ready.why

    def ready(self, card: Card) -> Ready | None:
        """What is known of `card` and its engine, if it is loaded now."""
        with self._lock:
            slot = self._slots.get(card)
        loaded = slot is not None and slot.ready.done() and not slot.ready.exception()
        return slot.ready.result() if slot and loaded else None

    def loaded(self, card: Card) -> Engine | None:
        """The engine of `card`, if it is loaded now."""
        ready = self.ready(card)
        return ready.engine if ready else None

    @contextmanager
    def lend(self, card: Card) -> Iterator[Future[Ready]]:
        """The engine of `card`, loading if need be; it is not closed while it is lent."""
        with self._lock:
            slot = self._slots.get(card)
            if slot is None or (slot.ready.done() and slot.ready.exception()):
                slot = self._slots[card] = _Slot(Future())
                self._jobs.put(lambda: self._fill(card, slot.ready))
            slot.listeners += 1
        try:
            yield slot.ready
        finally:
            with self._lock:
                slot.listeners -= 1
                self._returned.notify_all()

    def _work(self) -> None:
        while True:
            self._jobs.get()()

    def _load_first(self, choose: Callable[[], tuple[Card, str]]) -> None:
        try:
            card, self.first_why = choose()
        except Exception as error:
            self.first.set_exception(error)
            return
        self._pinned = (card,)
        self.first.set_result(next(key for key, other in self.cards().items() if other.source == card.source))
        with self.lend(card):
            pass  # loads in the background; whoever writes first waits for less

    def _fill(self, card: Card, ready: Future[Ready]) -> None:
        try:
            self._make_room(card)
            ready.set_result(self._load(card))
        except Exception as error:
            ready.set_exception(error)

    def _make_room(self, card: Card) -> None:
        """Close every big engine but that of `card`, which is about to load: when its answers have ended, or at the
        limit, which ends them."""
        if card.kind == "built-in":
            return
        with self._lock:
            others = [
                other
                for other, slot in self._slots.items()
                if other != card and other.kind != "built-in" and slot.ready.done() and not slot.ready.exception()
            ]
            slots = [self._slots.pop(other) for other in others]  # whoever asks for one of them now loads it anew
            self._returned.wait_for(lambda: not any(slot.listeners for slot in slots), SWITCH_LIMIT)
        for slot in slots:
            slot.ready.result().engine.close()


def _key(card: Card) -> str:
    return card.source if card.kind == "hub" else f"{card.kind}/{Path(card.source).name}"


def load_locally(models: ModelProcess, card: Card, precision: str) -> Ready:
    """Load `card` onto this machine, in the models' process. Raises ModelError."""
    engine = ProcessEngine(models, card, precision)
    return Ready(engine, engine.opened.why, engine.opened)
