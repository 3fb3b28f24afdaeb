"""Which models the page offers, and the engines that are loaded now.

Models load one at a time on a thread of their own, so that the page answers at once and goes on answering. Memory holds
one big model, or two that are asked together: before another loads, the answers that run are waited for, up to a limit,
and its engine is closed. The built-in models are small and stay, and those on servers need no memory here.
"""

import math
import queue
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava_app.checkpoints import Card, Outlook, catalogue, find
from llava_app.engine import Engine
from llava_app.engine.process import ModelProcess, Opened, ProcessEngine
from llava_app.errors import BusyError, ModelError
from llava_app.presets import PRESETS

if TYPE_CHECKING:
    from llava_app.engine.servers import Servers

LIGHT = ("built-in", "server")  # kinds of models that take next to no memory here
SMALL = tuple(preset.source for preset in PRESETS if preset.parameters < 1e9)  # what a CPU can run beside others
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
    shares: bool = False  # whether it left memory for another


class Models:
    """The list of models and the loaded engines of this process. All methods may be called from any thread."""

    def __init__(
        self,
        load: Callable[[Card], Ready],
        choose: Callable[[], tuple[Card, str]],
        *,
        runs: Path,
        load_half: Callable[[Card], Ready] | None = None,
        elsewhere: Callable[[], list[Card]] = list,
        reaches: Callable[[Card], bool] = lambda card: True,
        let_go: Callable[[], None] = lambda: None,
        weigh: Callable[[Sequence[Card]], dict[Card, Outlook]] = lambda cards: {},
        public: bool = False,
        free: Callable[[], float] = lambda: math.inf,
    ) -> None:
        """`choose` names the model to start with, and why; `load` opens any. Both run on the loading thread.

        `load_half` opens one in half of the free memory. `elsewhere` lists the models on servers, and `reaches`
        says whether a server offers one now; both without waiting.
        `let_go` gives back what is kept of closed engines for the next one.
        `weigh` says what models would take here, of those that it knows; `free`, how many bytes nobody uses.
        Visitors of a `public` page cannot have big models fetched from the Hub, nor put the first one out of memory.
        """
        self.first: Future[str] = Future()  # the key of the model to start with
        self.first_why = ""
        self._load = load
        self._load_half = load_half or load
        self.runs = runs
        self._elsewhere = elsewhere
        self._reaches = reaches
        self._let_go = let_go
        self.weigh = weigh
        self._public = public
        self.free = free
        self._slots: dict[Card, _Slot] = {}
        self._pairs: list[frozenset[Card]] = []  # lent together
        self._pinned: tuple[Card, ...] = ()
        self._closing = False
        self._lock = threading.Lock()
        self._returned = threading.Condition(self._lock)  # an engine that was lent is free again
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs.put(lambda: self._load_first(choose))

    def start(self) -> None:
        """Begin to load, with the model to start with. Before this, whoever needs a model waits."""
        threading.Thread(target=self._work, name="model-loader", daemon=True).start()

    def cards(self) -> dict[str, Card]:
        """The models to choose from, by a key that stays the same whatever else is in the list."""
        listed = [card for card in catalogue(self.runs) + self._elsewhere() if self._offers(card)]
        sources = {card.source for card in listed}
        pinned = {_pinned_key(card): card for card in self._pinned if card.source not in sources}
        return pinned | {_key(card): card for card in listed}

    def add(self, name: str) -> str:
        """Put the model of this Hub id or folder into the list; returns its key. Raises ModelError."""
        card = find(name, self.runs)
        key = next((key for key, other in self.cards().items() if other.source == card.source), None)
        if key is None:
            self._pinned = (*self._pinned, card)
            key = _pinned_key(card)
        return key

    def _offers(self, card: Card) -> bool:
        if not self._public or card.kind != "hub":
            return True
        return card.source in SMALL and all(first.kind in LIGHT for first in self._pinned)

    def card(self, key: str) -> Card:
        """The model with this key. Raises ModelError when it is not in the list."""
        card = self.cards().get(key)
        if card is None:
            raise ModelError(f"The model “{Path(key).name}” is not in the list any more. Choose another one.")
        return card

    def is_away(self, card: Card) -> bool:
        """Whether it is the model of a server that cannot be reached now."""
        return card.kind == "server" and not self._reaches(card)

    def why(self, key: str, ready: Ready) -> str:
        """Why this model, if it is the one to start with, and why it runs as it does."""
        started = self.first.done() and not self.first.exception() and self.first.result() == key
        return f"{self.first_why} {ready.why}".strip() if started else ready.why

    def ready(self, card: Card) -> Ready | None:
        """What is known of `card` and its engine, if it is loaded now."""
        with self._lock:
            slot = self._slots.get(card)
        return slot.ready.result() if slot and _is_loaded(slot) else None

    def loaded(self, card: Card) -> Engine | None:
        """The engine of `card`, if it is loaded now."""
        ready = self.ready(card)
        return ready.engine if ready else None

    @contextmanager
    def lend(self, card: Card) -> Iterator[Future[Ready]]:
        """The engine of `card`, loading if need be; it is not closed while it is lent. Raises BusyError at the end."""
        with self._lock:
            if self._closing:
                raise BusyError("The app is about to start anew. Send the question again in a minute.")
            slot = self._slots.get(card)
            if slot is None or (slot.ready.done() and slot.ready.exception()):
                slot = self._slots[card] = _Slot(Future())
                self._jobs.put(lambda: self._fill(card, slot))
            slot.listeners += 1
        try:
            yield slot.ready
        finally:
            with self._lock:
                slot.listeners -= 1
                self._returned.notify_all()

    @contextmanager
    def lend_two(self, one: Card, other: Card) -> Iterator[tuple[Future[Ready], Future[Ready]]]:
        """Two engines at once, which share the memory; neither is closed for the other.

        One that has all the memory to itself is loaded anew in half of it. What does not fit is the ModelError of the
        later one.
        """
        pair = frozenset((one, other))
        with self._lock:
            self._pairs.append(pair)
            if not any(card.kind in LIGHT for card in pair):
                alone = [card for card in pair if card in self._slots and not self._slots[card].shares]
                slots = [self._slots.pop(card) for card in alone if _is_loaded(self._slots[card])]
                self._jobs.put(lambda: self._close(slots, SWITCH_LIMIT))
        try:
            with self.lend(one) as first, self.lend(other) as second:
                yield first, second
        finally:
            with self._lock:
                self._pairs.remove(pair)

    @property
    def state(self) -> str:
        """Whether questions can be answered: "ready", "loading", "failed", or "closing" at the end."""
        if self._closing:
            return "closing"
        if not self.first.done():
            return "loading"
        with self._lock:
            slots = {card: slot for card, slot in self._slots.items() if slot.ready.done()}
        if any(_is_loaded(slot) and not self.is_away(card) for card, slot in slots.items()):
            return "ready"
        return "failed" if slots or self.first.exception() else "loading"

    def engines(self) -> dict[str, Engine]:
        """The engines that are loaded now, by the names of their models."""
        with self._lock:
            return {card.name: slot.ready.result().engine for card, slot in self._slots.items() if _is_loaded(slot)}

    def close(self, limit: float) -> None:
        """Lend nothing any more, let the answers that run finish for `limit` seconds, then end them where they are."""
        with self._lock:
            self._closing = True
            slots = [slot for slot in self._slots.values() if _is_loaded(slot)]
        self._close(slots, limit)

    @property
    def holds_memory(self) -> bool:
        """Whether `give_back` has something to give."""
        with self._lock:
            return any(card.kind not in LIGHT and _is_loaded(slot) for card, slot in self._slots.items())

    def give_back(self) -> list[str]:
        """Close every big engine, when its answers have ended or at the limit; returns the names of their models."""
        names = self._close_all_but(set())
        self._let_go()
        return names

    def _work(self) -> None:
        while True:
            self._jobs.get()()

    def _load_first(self, choose: Callable[[], tuple[Card, str]]) -> None:
        try:
            card, self.first_why = choose()
        except Exception as error:
            self.first.set_exception(error)
            return
        self._pinned = (*self._pinned, card)
        self.first.set_result(next(key for key, other in self.cards().items() if other.source == card.source))
        with self.lend(card):
            pass  # loads in the background; whoever writes first waits for less

    def _fill(self, card: Card, slot: _Slot) -> None:
        beside = self._beside(card)
        try:
            if not beside and card.kind not in LIGHT:
                self._check(card)
            self._make_room(card, beside)
            slot.shares = bool(beside)
            later = any(self.loaded(other) for other in beside)
            slot.ready.set_result(self._load_half(card) if beside and not later else self._load(card))
        except ModelError as error:
            slot.ready.set_exception(ModelError(f"Two models at once share the memory. {error}") if beside else error)
        except Exception as error:
            slot.ready.set_exception(error)

    def _check(self, card: Card) -> None:
        """Raise ModelError for a model that does not fit, before another is closed for it."""
        expected = self.weigh([card]).get(card)
        if expected and expected.refusal:
            raise ModelError(expected.refusal)

    def _beside(self, card: Card) -> set[Card]:
        """The big models that are lent together with `card` now."""
        with self._lock:
            together = {other for pair in self._pairs if card in pair for other in pair - {card}}
        return {other for other in together if other.kind not in LIGHT and card.kind not in LIGHT}

    def _make_room(self, card: Card, beside: set[Card]) -> None:
        """Close every big engine but that of `card`, which is about to load, and those `beside` it."""
        if card.kind not in LIGHT:
            self._close_all_but({card} | beside)

    def _close_all_but(self, stay: set[Card]) -> list[str]:
        """Of the big engines; returns the names of their models."""
        with self._lock:
            others = [
                other
                for other, slot in self._slots.items()
                if other not in stay and other.kind not in LIGHT and _is_loaded(slot)
            ]
            slots = [self._slots.pop(other) for other in others]  # whoever asks for one of them now loads it anew
        self._close(slots, SWITCH_LIMIT)
        return [other.name for other in others]

    def _close(self, slots: Sequence[_Slot], limit: float) -> None:
        """Close these engines when their answers have ended, or at the limit, which ends them."""
        with self._lock:
            self._returned.wait_for(lambda: not any(slot.listeners for slot in slots), limit)
        for slot in slots:
            slot.ready.result().engine.close()


def _is_loaded(slot: _Slot) -> bool:
    return slot.ready.done() and not slot.ready.exception()


def _pinned_key(card: Card) -> str:
    return _key(card) if card.kind in ("hub", "server") else f"folder/{Path(card.source).name}"


def _key(card: Card) -> str:
    """A name of the Hub or of a server as it is. Where a server's files lie is nobody's business: of such a name only
    the end, and a number that tells it from others with the same end."""
    if card.kind == "server" and (card.source.startswith(("/", "~", ".")) or "\\" in card.source):
        return f"server/{card.name}-{zlib.crc32(card.source.encode()):08x}"
    return card.source if card.kind in ("hub", "server") else f"{card.kind}/{Path(card.source).name}"


def load_locally(models: ModelProcess, card: Card, precision: str, *, share: float = 1.0) -> Ready:
    """Load `card` onto this machine, in the models' process and a share of the free memory. Raises ModelError."""
    engine = ProcessEngine(models, card, precision, share=share)
    return Ready(engine, engine.opened.why, engine.opened)


def connect(addresses: Sequence[str]) -> "Servers | None":
    """The servers at these addresses, if there are any. Raises UserError for what is no address."""
    if not addresses:
        return None
    from llava_app.engine.servers import Servers  # openai takes a second to import, and few need it

    return Servers(addresses)


def ask_remotely(card: Card, servers: "Servers") -> Ready:
    """An engine for a model on `servers`."""
    from llava_app.engine.remote import RemoteEngine  # as above

    return Ready(RemoteEngine(card, servers), "Nothing is computed on this machine.")
