"""Votes and corrections of answers."""

import html
from dataclasses import replace
from typing import Any

import gradio as gr

from llava_app.errors import BusyError, DataError
from llava_app.feedback import Feedback, judged
from llava_app.limits import LOCAL, Gate
from llava_app.ui.display import Notes, Talk, messages
from llava_app.ui.door import visitor
from llava_app.ui.handlers import explain
from llava_app.ui.models import Models

MAX_ANSWER = 20_000  # characters of a correction
NOT_KEPT = (gr.skip(), gr.skip())


class Verdicts:
    """The events of the buttons under an answer, kept in `feedback`; None keeps nothing."""

    def __init__(self, models: Models, feedback: Feedback | None, gate: Gate | None = None) -> None:
        """`gate`: where every verdict passes, as a question does; by default that of a page of one's own."""
        self._gate = gate or Gate(LOCAL)
        self.models = models
        self.feedback = feedback

    def vote(
        self, voted: gr.EventData, talk: Talk, model: str | None, request: gr.Request | None = None
    ) -> tuple[Any, Any]:
        """Like or dislike an answer."""
        turn, vote = voted._data.get("turn"), voted._data.get("vote")
        if not self._can(talk, turn) or vote not in ("up", "down"):
            return NOT_KEPT
        return self._keep(talk, turn, vote, model, answer=None, visitor=visitor(request))

    def correct(
        self, corrected: gr.EventData, talk: Talk, model: str | None, request: gr.Request | None = None
    ) -> tuple[Any, Any]:
        """Put a better answer in the place of the model's; the conversation goes on with it."""
        turn, text = corrected._data.get("turn"), corrected._data.get("text")
        if not self._can(talk, turn) or not isinstance(text, str) or not text.strip():
            return NOT_KEPT
        if len(text) > MAX_ANSWER:
            gr.Warning(f"The answer has {len(text):,} characters; the limit is {MAX_ANSWER:,}. Shorten it.")
            return NOT_KEPT
        return self._keep(talk, turn, "corrected", model, answer=text.strip(), visitor=visitor(request))

    def _can(self, talk: Talk, turn: Any) -> bool:
        turns = talk.conversation.turns
        return self.feedback is not None and type(turn) is int and 0 <= turn < len(turns) and bool(turns[turn].answer)

    def _keep(
        self, talk: Talk, turn: int, vote: Any, model: str | None, *, answer: str | None, visitor: str
    ) -> tuple[Any, Any]:
        assert self.feedback is not None
        before = talk.notes[turn] if turn < len(talk.notes) else Notes()
        card = self.models.cards().get(model or "")
        written = talk.conversation.turns[turn].answer or ""
        better = judged(talk.conversation, turn, answer)
        try:
            self._gate.count(visitor)
            record = self.feedback.keep(
                better, vote, model=card.name if card else "", answer=written, replaces=before.record
            )
        except (OSError, DataError, BusyError) as error:
            gr.Warning(html.escape(explain(error)))
            return NOT_KEPT
        gr.Info("Thank you. Kept on this server: the conversation up to here with its pictures, and your verdict.")
        notes = [*talk.notes, *[Notes()] * (turn + 1 - len(talk.notes))]
        notes[turn] = replace(before, vote=vote, record=record)
        conversation = replace(talk.conversation, turns=(*better.turns, *talk.conversation.turns[turn + 1 :]))
        talk = replace(talk, conversation=conversation, notes=tuple(notes))
        return talk, messages(talk)
