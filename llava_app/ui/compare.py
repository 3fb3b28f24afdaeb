"""Two models answer the same conversation side by side, and somebody says which did better.

As in `handlers`, every handler is a public endpoint and believes only what it checks.
"""

import html
import secrets
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import gradio as gr

from llava_app.chat import reply
from llava_app.checkpoints import Card
from llava_app.engine import Sampling
from llava_app.errors import ModelError, UserError
from llava_app.images import Picture
from llava_app.limits import LOCAL, Gate
from llava_app.ui.api import read_text
from llava_app.ui.display import Talk, doing, messages
from llava_app.ui.door import visitor
from llava_app.ui.files import open_files
from llava_app.ui.models import Models, Ready
from llava_app.ui.votes import Vote, Votes

HEARTBEAT = 0.2  # s between two signs of life, so that Stop and a closed tab are noticed
REDRAW = 0.1  # s between two drawings
HIDDEN = ("Model A", "Model B")

Update = tuple[Any, Any, Any, Any, Any]  # the match, the two windows, the box, the line below
UNCHANGED: Update = (gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip())


@dataclass(frozen=True)
class Match:
    """What the server keeps for one tab: two models, as they stand left and right, and their talks."""

    models: tuple[str, str] = ("", "")  # keys of the model list
    talks: tuple[Talk, Talk] = field(default_factory=lambda: (Talk(), Talk()))
    blind: bool = False
    voted: bool = False

    @property
    def begun(self) -> bool:
        return bool(self.talks[0].conversation.turns)

    def ask(self, question: str, pictures: tuple[Picture, ...]) -> Self:
        left, right = self.talks
        return replace(self, talks=(left.ask(question, pictures), right.ask(question, pictures)))


class Compare:
    """The events of the tab, on the models of this process."""

    def __init__(self, models: Models, votes: Votes, gate: Gate | None = None) -> None:
        """`gate`: where every question passes, as in the chat; by default that of a page of one's own."""
        self._models = models
        self._votes = votes
        self._gate = gate or Gate(LOCAL)

    def send(
        self,
        message: dict[str, Any] | None,
        match: Match,
        left: str | None,
        right: str | None,
        blind: bool,
        temperature: float | None,
        max_new_tokens: float | None,
        request: gr.Request | None = None,
    ) -> Iterator[Update]:
        """Ask both what is in the box and stream both answers. After a vote, and for other models, anew."""
        message = message or {}
        question, files = message.get("text") or "", message.get("files") or []
        if not question.strip() and not files:
            gr.Info("Type a question or add a picture, then send.")
            yield UNCHANGED
            return
        box = {"text": question, "files": files}
        try:
            with self._gate.enter(visitor(request)):
                chosen = self._match(match, left, right, blind=bool(blind))
                asked = chosen.ask(read_text("The question", question), open_files(files))
                emptied = gr.update(value=None, submit_btn=False, stop_btn=True)
                yield *self._draw(asked, ("reading", "reading")), emptied, ""
                sampling = Sampling.clamped(temperature=temperature, max_new_tokens=max_new_tokens)
                for so_far, phases in self._answers(asked, sampling):
                    yield *self._draw(so_far, phases), gr.skip(), gr.skip()
        except UserError as error:
            gr.Warning(html.escape(str(error)), duration=20)
            yield *self._draw(match), gr.update(value=box), gr.skip()

    def settle(self, match: Match) -> tuple[Any, Any, Any, Any]:
        """The windows, the box and the line below once nothing is being answered."""
        return *self._draw(match)[1:], gr.update(submit_btn=True, stop_btn=False), self.line(match)

    def vote(self, match: Match, verdict: str) -> tuple[Any, Any, Any, Any]:
        """Keep the verdict and show who is who."""
        if not match.begun or match.voted:
            gr.Info("Ask both models something first." if not match.begun else "You have voted. Ask something new.")
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        self._votes.add(Vote(*match.models, verdict, match.blind))
        shown = replace(match, voted=True)
        return *self._draw(shown), self.line(shown)

    def clear(self) -> tuple[Any, Any, Any, Any]:
        """Start anew."""
        return Match(), gr.update(value=[], label=HIDDEN[0]), gr.update(value=[], label=HIDDEN[1]), ""

    def choices(self) -> tuple[Any, Any]:
        """The two model lists as they are now."""
        listed = [(card.name, key) for key, card in self._models.cards().items()]
        return gr.update(choices=listed), gr.update(choices=listed)

    def base_against_tuned(self, right: str | None) -> tuple[Any, Any]:
        """The chosen model, or the first that has one, on the right, and the model it was trained from on the left."""
        cards = self._models.cards()
        keys = [key for key in (right, *cards) if key in cards]
        for key in keys:
            base = base_key(cards[key], cards)
            if base:
                return gr.update(value=base), gr.update(value=key)
        gr.Info("No model in the list was trained from another one in it. Train one first.")
        return gr.skip(), gr.skip()

    def line(self, match: Match) -> str:
        """Who is who, where that is not hidden, and how the votes between the two stand."""
        if not match.begun:
            return ""
        if match.blind and not match.voted:
            return "<p>Which answer is better? The names are shown once you have voted.</p>"
        left, right = (html.escape(name) for name in self._names(match))
        counts = self._votes.tally(*match.models)
        return (
            f"<p><b>{left}</b> {counts['left']} · <b>{right}</b> {counts['right']} · "
            f"equally good {counts['tie']} · neither {counts['neither']}</p>"
        )

    def _match(self, match: Match, left: str | None, right: str | None, *, blind: bool) -> Match:
        """The match to go on with. Raises UserError unless two different models are chosen."""
        if not left or not right or left == right:
            raise ModelError("Choose two different models, one on each side.")
        self._models.card(left), self._models.card(right)
        if not match.voted and match.blind == blind and set(match.models) == {left, right}:
            return match
        swapped = blind and secrets.choice((True, False))
        return Match((right, left) if swapped else (left, right), blind=blind)

    def _answers(self, match: Match, sampling: Sampling) -> Iterator[tuple[Match, tuple[str | None, str | None]]]:
        """The match so far and what each side is doing; None once it is done."""
        left, right = (self._models.card(key) for key in match.models)
        with self._models.lend_two(left, right) as ready, ExitStack() as stack:
            while not all(future.done() for future in ready):
                yield match, (_loading(ready[0]), _loading(ready[1]))
                wait(ready, timeout=HEARTBEAT)
            sides = [
                stack.enter_context(closing(_side(future.result(), talk, sampling)))
                for future, talk in zip(ready, match.talks, strict=True)
            ]
            talks, phases, next_at = list(match.talks), ["reading", "reading"], 0.0
            while any(phases):
                for number in (0, 1):
                    if phases[number]:
                        talks[number], phases[number] = next(sides[number])
                if time.monotonic() >= next_at or not all(phases):
                    yield replace(match, talks=(talks[0], talks[1])), (phases[0] or None, phases[1] or None)
                    next_at = time.monotonic() + REDRAW

    def _names(self, match: Match) -> tuple[str, str]:
        cards = self._models.cards()
        left, right = (cards[key].name if key in cards else key for key in match.models)
        return left, right

    def _draw(self, match: Match, phases: Sequence[str | None] = (None, None)) -> tuple[Any, Any, Any]:
        """The match as it is kept, and the two windows."""
        hidden = not match.begun or (match.blind and not match.voted)
        names = HIDDEN if hidden else self._names(match)
        kept = replace(match, talks=(_kept(match.talks[0]), _kept(match.talks[1])))
        left, right = (
            gr.update(value=messages(talk, phase), label=name)
            for talk, phase, name in zip(kept.talks, phases, names, strict=True)
        )
        return kept, left, right


def _side(ready: Ready, talk: Talk, sampling: Sampling) -> Generator[tuple[Talk, str], None, None]:
    """One side's talk and phase, "" at its end. A failure ends this side only."""
    so_far = talk.cut()
    try:
        with closing(reply(ready.engine, talk.conversation, sampling)) as answer:
            for progress in answer:
                so_far = talk.advance(progress)
                yield so_far, doing(progress) or ""
    except UserError as error:
        gr.Warning(html.escape(str(error)), duration=20)
        yield so_far.broken_off(), ""


def _kept(talk: Talk) -> Talk:
    """The talk with what to keep of it if nothing more came."""
    return talk.cut() if talk.conversation.is_open else talk


def _loading(ready: Future[Ready]) -> str:
    return "queued" if ready.done() else "Loading …"


def base_key(tuned: Card, cards: dict[str, Card]) -> str | None:
    """The key of the model that `tuned` was trained from, where it is in the list.

    Of the built-in model, stage 1 is not shipped: there it is the model that stage 1 began with.
    """
    for key, card in cards.items():
        if card != tuned and tuned.base and Path(tuned.base).name in (card.name, Path(card.source).name):
            return key
    built_in = (key for key, card in cards.items() if card.kind == "built-in" and card.stage == "base")
    return next(built_in, None) if tuned.kind == "built-in" and tuned.stage != "base" else None
