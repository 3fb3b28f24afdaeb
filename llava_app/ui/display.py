"""What the page shows of a conversation and of a model: values in, Chatbot messages and small pieces of HTML out.

Nothing here decides anything: the true conversation stays on the server, and forging what is shown changes nothing.
"""

import base64
import html
import io
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from weakref import WeakKeyDictionary

from llava_app.chat import Progress
from llava_app.checkpoints import Card
from llava_app.conversation import Conversation, Turn
from llava_app.engine.watch import Snapshot
from llava_app.images import Picture

SHOWN_SIDE = 640  # px; what is sent to the browser of a picture of up to 2,048
PHASES = {"queued": "Waiting for its turn …", "reading": "Looking …"}
FINISHES = {
    "length": "reached the longest answer allowed",
    "stopped": "stopped by you",
    "time": "stopped at the time limit",
    "failed": "broke off",
}
STAGES = {"base": "not trained yet", "align": "stage 1: only captions"}
KINDS = {"built-in": "built in", "run": "trained here", "hub": "from the Hub", "server": "on a server"}

_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
_data_urls: WeakKeyDictionary[Picture, str] = WeakKeyDictionary()  # made once, gone with the picture


@dataclass(frozen=True)
class Notes:
    """What there is to say about an answer beside its text."""

    seconds_to_first: float | None = None
    tokens_per_second: float | None = None
    left_out: str | None = None  # what the model was not shown


@dataclass(frozen=True)
class Talk:
    """What the server keeps for one tab: the conversation, and notes about each of its answers."""

    conversation: Conversation = field(default_factory=Conversation)
    notes: tuple[Notes, ...] = ()

    def ask(self, question: str, pictures: tuple[Picture, ...]) -> Self:
        """The talk with an open turn."""
        return replace(self, conversation=self.conversation.ask(question, pictures))

    def retry(self) -> Self:
        """The talk with its last turn open again."""
        return replace(self, conversation=self.conversation.retry(), notes=self.notes[:-1])

    def undo(self) -> Self:
        """The talk without its last turn."""
        return replace(self, conversation=self.conversation.undo(), notes=self.notes[:-1])

    def cut(self) -> Self:
        """What to keep of this open talk if nothing more came: the question, and that nothing was written."""
        return replace(self, conversation=self.conversation.answer("", "stopped"), notes=(*self.notes, Notes()))

    def advance(self, progress: Progress) -> Self:
        """This open talk with as much of the answer as has come."""
        about = Notes(progress.seconds_to_first, progress.tokens_per_second, progress.left_out)
        return replace(self, conversation=progress.conversation, notes=(*self.notes, about))


def messages(talk: Talk, phase: str | None = None) -> list[dict[str, Any]]:
    """The Chatbot's value. `phase` is what the last answer is doing now, None when nothing is being answered."""
    shown = []
    last = len(talk.conversation.turns) - 1
    for index, turn in enumerate(talk.conversation.turns):
        shown.append({"role": "user", "content": _question(turn)})
        about = talk.notes[index] if index < len(talk.notes) else Notes()
        foot = _foot(turn, about) if phase is None or index < last else _waiting(phase)
        answer = [_text(as_written(turn.answer))] if turn.answer else []
        if answer or foot:
            shown.append({"role": "assistant", "content": [*answer, *foot]})
    return shown


def as_written(text: str) -> str:
    """A model's answer as Markdown that shows tags as text and fetches nothing: no HTML, no pictures."""
    parts = _CODE.split(text)  # code, at the odd places, is shown as it stands
    parts[::2] = [html.escape(part, quote=False).replace("&gt;", ">").replace("![", "!\\[") for part in parts[::2]]
    return "".join(parts)


def as_typed(text: str) -> str:
    """Markdown that shows a question character for character."""
    text = re.sub(r"([\\`*_~\[\]|])", r"\\\1", html.escape(text, quote=False))
    text = re.sub(r"^( *)(#|[-+=])", r"\1\\\2", text, flags=re.MULTILINE)
    text = re.sub(r"^( *\d+)([.)])", r"\1\\\2", text, flags=re.MULTILINE)
    return re.sub(r"^ +", lambda spaces: "&nbsp;" * len(spaces[0]), text, flags=re.MULTILINE)


def choices(cards: dict[str, Card]) -> list[tuple[str, str]]:
    """The model list: what is shown, and the key it stands for. Models of one name are told apart by their folder."""
    bearers = Counter(card.name for card in cards.values())
    return [(_label(card, unique=bearers[card.name] == 1), key) for key, card in cards.items()]


def status(about: str, *, state: str, why: str = "") -> str:
    """The line about the model: what it knows, then how it runs. `state`: "loading" | "ready" | "failed"."""
    detail = f"<span class='why'>{html.escape(why)}</span>" if why else ""
    return (
        f"<div class='status {state}' role='status'><span class='dot' aria-hidden='true'></span>"
        f"<p><span class='about'>{html.escape(about)}</span> {detail}</p></div>"
    )


def activity(snapshot: Snapshot) -> str:
    """One line about an engine: who is being answered, how fast, and what its cache saved."""
    parts = [f"{snapshot.answering} being answered", f"{snapshot.queued} waiting"]
    if snapshot.tokens_per_second:
        parts.append(f"{snapshot.tokens_per_second:,.0f} tokens/s while writing")
    if snapshot.seconds_to_first is not None:
        parts.append(f"first word after {snapshot.seconds_to_first:.2f} s")
    prompts = snapshot.tokens_read + snapshot.tokens_reused
    if prompts:
        parts.append(f"{snapshot.tokens_reused / prompts:.0%} of what was asked was read before")
    parts.append(f"{snapshot.cache_bytes / 1e6:,.0f} MB remembered")
    return f"<p class='activity'>{' · '.join(parts)}</p>"


def _label(card: Card, *, unique: bool) -> str:
    name = card.name if unique else f"{card.name} ({Path(card.source).name})"
    return f"{name} · {STAGES.get(card.stage, KINDS[card.kind])}"


def _question(turn: Turn) -> list[dict[str, Any]]:
    pictures = "".join(
        f"<img src='{_data_url(picture)}' alt='Picture {number} of this question'>"
        for number, picture in enumerate(turn.images, start=1)
    )
    content = [_html(f"<div class='pictures'>{pictures}</div>")] if pictures else []
    return [*content, _text(as_typed(turn.question))] if turn.question.strip() else content


def _foot(turn: Turn, notes: Notes) -> list[dict[str, Any]]:
    """The small line under an answer: why it ended, when not by itself, how fast it came, what it did not see."""
    parts = ["no words came"] if turn.answer == "" else []
    if turn.finish in FINISHES:
        parts.append(FINISHES[turn.finish])
    if notes.seconds_to_first is not None:
        parts.append(f"first word after {notes.seconds_to_first:.2f} s")
    if notes.tokens_per_second is not None:
        parts.append(f"{notes.tokens_per_second:.0f} tokens/s")
    if notes.left_out is not None:
        parts.append(html.escape(notes.left_out))
    return [_html(f"<div class='foot'>{' · '.join(parts)}</div>")] if parts else []


def _waiting(phase: str) -> list[dict[str, Any]]:
    if phase == "writing":
        return []
    return [_html(f"<div class='foot waiting'>{html.escape(PHASES.get(phase, phase))}</div>")]


def _data_url(picture: Picture) -> str:
    url = _data_urls.get(picture)
    if url is None:
        small = picture.image.copy()
        small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        file = io.BytesIO()
        small.save(file, "WEBP", quality=90)
        url = _data_urls[picture] = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return url


def _text(text: str) -> dict[str, Any]:
    """Text as a dictionary: a plain string would lose its indentation on the way."""
    return {"type": "text", "text": text}


def _html(value: str) -> dict[str, Any]:
    """HTML of our own making; nobody else's text goes in here unescaped."""
    return {"type": "component", "component": "html", "value": value, "constructor_args": {}, "props": {}}
