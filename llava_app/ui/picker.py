"""What happens around the list of models: what each is and needs, which one is chosen, how its loading goes."""

import html
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import gradio as gr

from llava_app.checkpoints import Card
from llava_app.limits import LOCAL, Gate
from llava_app.ui.display import activity, choices, facts, status
from llava_app.ui.door import visitor
from llava_app.ui.handlers import HEARTBEAT, explain
from llava_app.ui.model_table import figures, getting, table
from llava_app.ui.models import Models, Ready


class Picker:
    """The events of the model list, on the models of this process."""

    def __init__(self, models: Models, gate: Gate | None = None) -> None:
        """`gate`: where every model that has to be loaded passes; by default that of a page of one's own."""
        self.models = models
        self.gate = gate or Gate(LOCAL)

    def greet(self, request: gr.Request) -> Iterator[tuple[Any, Any]]:
        """Model list and status for a new tab, as soon as it is known which model to start with: the one that the
        address names with ?model=, or that of the app."""
        while not self.models.first.done():
            yield gr.skip(), status("Starting …", state="loading")
            wait([self.models.first], timeout=HEARTBEAT)
        try:
            key = self.models.first.result()
        except Exception as error:
            yield gr.update(choices=self._choices(self.models.cards())), status(explain(error), state="failed")
            return
        cards = self.models.cards()
        key = _named(request.query_params.get("model"), cards) or key
        yield gr.update(choices=self._choices(cards), value=key), gr.skip()

    def choose(self, model: str | None, request: gr.Request | None = None) -> Iterator[str]:
        """Load the chosen model, which counts as a question, and say how that goes. The conversation stays."""
        if not model:
            return
        try:
            card = self.models.card(model)
            with self._entered(card, request), self.models.lend(card) as ready:
                while not ready.done():
                    yield status(getting(card), state="loading")
                    wait([ready], timeout=HEARTBEAT)
                yield self._line(model, card, ready.result())
        except Exception as error:
            yield status(explain(error), state="failed")

    def table(self) -> str:
        """Every model, what it would take here, and how it scored."""
        cards = self.models.cards()
        return table(cards, self.models.weigh(list(cards.values())))

    def use(self, chosen: gr.EventData) -> Any:
        """Choose the model that was clicked in the table."""
        key = chosen._data.get("model")
        return gr.update(value=key) if isinstance(key, str) and key in self.models.cards() else gr.skip()

    def refresh(self, listed: list[tuple[str, str]], model: str | None) -> tuple[Any, Any, Any]:
        """The model list, when it is no longer the one that this tab shows, and the status of a model on a server. The
        selection stays while it can, also when its server is away."""
        cards = self.models.cards()
        now = self._choices(cards)
        if now == listed:
            return gr.skip(), gr.skip(), gr.skip()
        if model is None or model in cards:
            card = cards.get(model or "")
            ready = self.models.ready(card) if card and card.kind == "server" else None
            line = self._line(model, card, ready) if model and card and ready else gr.skip()
            return now, gr.update(choices=now), line
        gr.Warning(html.escape(f"The model “{Path(model).name}” is gone; {now[0][0]} takes its place."))
        return now, gr.update(choices=now, value=now[0][1]), gr.skip()

    def watch(self, model: str | None) -> Any:
        """What the engine of the chosen model is doing."""
        card = self.models.cards().get(model or "")
        engine = self.models.loaded(card) if card else None
        snapshot = engine.snapshot() if engine else None
        return activity(snapshot) if snapshot else ""

    def _choices(self, cards: dict[str, Card]) -> list[tuple[str, str]]:
        return choices(cards, self.models.is_away)

    def _line(self, model: str, card: Card, ready: Ready) -> str:
        """The status of the chosen model, which is loaded."""
        if self.models.is_away(card):
            away = f"The server of {card.name} cannot be reached. Choose another model, or wait until it is back."
            return status(away, state="failed")
        here = ("Here", self.models.why(model, ready))
        more = [here, *facts(card), *figures(card, self.models.weigh([card]).get(card))]
        return status(card.about, state="ready", facts=more)

    def _entered(self, card: Card, request: gr.Request | None) -> AbstractContextManager[None]:
        """The gate, unless the model is there already."""
        return nullcontext() if self.models.loaded(card) else self.gate.enter(visitor(request))


def _named(name: str | None, cards: dict[str, Card]) -> str | None:
    """The key of the model with this key or name; None when there is none."""
    return next((key for key, card in cards.items() if name in (key, card.name)), None)
