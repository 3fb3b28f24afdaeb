"""Whose tab is whose, so that nobody takes the room of the others, and which tabs the server knows no longer."""

import time
from collections import OrderedDict
from dataclasses import dataclass

from gradio.state_holder import StateHolder

from llava_app.errors import BusyError

ASLEEP = 90.0  # s; an open tab looks for new models every 5 s, in the background every minute
IDLE = 1800.0  # s after which nobody is there any more
MOST_LOST = 10_000  # names of tabs that are remembered as lost


@dataclass
class _Tab:
    visitor: str
    used: float
    is_kept: bool = False  # whether Gradio has made room for its contents


class Tabs:
    """The open tabs of each visitor, and what Gradio keeps of them. For the thread of the event loop."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._tabs: OrderedDict[str, _Tab] = OrderedDict()  # the one that was used longest ago first
        self._lost: OrderedDict[str, None] = OrderedDict()

    def enter(self, name: str, visitor: str, kept: StateHolder) -> None:
        """Before an event of the tab. Raises BusyError when the visitor has as many others open as are allowed.

        Of a visitor's own tabs, one that sleeps makes room; the tabs of others never do.
        """
        now = time.monotonic()
        while self._tabs and now - next(iter(self._tabs.values())).used > IDLE:
            self.lose(next(iter(self._tabs)), kept)
        if name not in self._tabs:
            self._make_room(visitor, now, kept)
            self._tabs[name] = _Tab(visitor, now)
        tab = self._tabs[name]
        tab.used = now
        self._tabs.move_to_end(name)
        if tab.is_kept and name not in kept:
            self._note_loss(name)
        tab.is_kept = name in kept

    def leave(self, name: str) -> None:
        """The tab was closed; it may come back while its contents are kept."""
        self._tabs.pop(name, None)

    def lose(self, name: str, kept: StateHolder) -> None:
        """Forget the tab and its contents."""
        self._tabs.pop(name, None)
        kept.session_data.pop(name, None)
        kept.time_last_used.pop(name, None)
        self._note_loss(name)

    def is_lost(self, name: str) -> bool:
        """Whether the contents of this tab were forgotten while it was open."""
        return name in self._lost

    def _make_room(self, visitor: str, now: float, kept: StateHolder) -> None:
        own = [name for name, tab in self._tabs.items() if tab.visitor == visitor]
        if len(own) < self._most:
            return
        if now - self._tabs[own[0]].used <= ASLEEP:
            raise BusyError(f"You have {self._most} tabs of this page open, which is the limit. Close some of them.")
        self.lose(own[0], kept)

    def _note_loss(self, name: str) -> None:
        self._lost[name] = None
        while len(self._lost) > MOST_LOST:
            self._lost.popitem(last=False)
