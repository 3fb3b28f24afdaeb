"""What the page shows of a conversation and of a model: values in, Chatbot messages and small pieces of HTML out.

Nothing here decides anything: the true conversation stays on the server, and forging what is shown changes nothing.
"""

import base64
import html
import io
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary

from PIL import Image

from llava_app.chat import Progress
from llava_app.checkpoints import Card
from llava_app.conversation import Conversation, Turn
from llava_app.engine.watch import Snapshot, Wait
from llava_app.images import Picture
from llava_app.ui.markdown import as_typed, as_written

SHOWN_SIDE = 640  # px; what is sent to the browser of a picture of up to 2,048
Vote = Literal["up", "down", "corrected"]
CUT = ("length", "stopped", "time")  # an answer that ended so can be continued
CONTINUE = {"value": "continue", "label": "Continue the answer"}
PHASES = {"queued": "Waiting for its turn …", "reading": "Reading …"}
FINISHES = {
    "stop": "finished",
    "length": "reached the longest answer allowed",
    "stopped": "stopped by you",
    "time": "stopped at the time limit",
    "failed": "broke off",
}
STAGES = {"base": "not trained yet", "align": "stage 1: only captions"}
TRAINED = {
    "base": "not yet",
    "align": "stage 1: it only captions pictures and cannot talk",
    "instruct": "stage 2: it answers questions",
}
IMAGE_MODES = {
    "pad": "padded to a square, nothing is cut off",
    "crop": "the middle, as a square",
    "anyres": "an overview and tiles in full resolution",
}
KINDS = {"built-in": "built in", "run": "trained here", "hub": "from the Hub", "server": "on a server"}
AWAY = " that cannot be reached"  # after the last of KINDS

_data_urls: WeakKeyDictionary[Picture, str] = WeakKeyDictionary()  # made once, gone with the picture


@dataclass(frozen=True)
class Notes:
    """What there is to say about an answer beside its text."""

    seconds_to_first: float | None = None
    tokens_per_second: float | None = None
    left_out: str | None = None  # what the model was not shown
    vote: Vote | None = None
    record: str | None = None  # the id under which the vote is kept


def new_key() -> str:
    return secrets.token_urlsafe(16)


@dataclass(frozen=True)
class Talk:
    """One of a person's conversations as the server keeps it, with notes about each of its answers."""

    conversation: Conversation = field(default_factory=Conversation)
    notes: tuple[Notes, ...] = ()
    key: str = field(default_factory=new_key, compare=False)  # who knows it may read it

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same under a key of its own: so Gradio makes what each session begins with of what it was built with."""
        return replace(self, key=new_key())

    def ask(self, question: str, pictures: tuple[Picture, ...]) -> Self:
        """The talk with an open turn."""
        return replace(self, conversation=self.conversation.ask(question, pictures))

    def retry(self) -> Self:
        """The talk with its last turn open again."""
        return replace(self, conversation=self.conversation.retry(), notes=self.notes[:-1])

    def resume(self) -> Self:
        """The talk with its last answer open where it stopped."""
        return replace(self, conversation=self.conversation.resume(), notes=self.notes[:-1])

    def edit(self, turn: int, question: str) -> Self:
        """The talk up to `turn`, which asks `question` about the same pictures and is open."""
        return replace(self, conversation=self.conversation.edit(turn, question), notes=self.notes[:turn])

    def under(self, system: str | None) -> Self:
        """The talk with this system prompt; None is the template's own."""
        return replace(self, conversation=replace(self.conversation, system=system))

    def undo(self) -> Self:
        """The talk without its last turn."""
        return replace(self, conversation=self.conversation.undo(), notes=self.notes[:-1])

    def cut(self) -> Self:
        """What to keep of this open talk if nothing more came: the question, and that nothing was written."""
        written = self.conversation.turns[-1].answer or ""
        return replace(self, conversation=self.conversation.answer(written, "stopped"), notes=(*self.notes, Notes()))

    def broken_off(self) -> Self:
        """The talk, whose last answer broke off where it is."""
        written = self.conversation.turns[-1].answer or ""
        return replace(self, conversation=self.conversation.retry().answer(written, "failed"))

    def advance(self, progress: Progress) -> Self:
        """This open talk with as much of the answer as has come."""
        about = Notes(progress.seconds_to_first, progress.tokens_per_second, progress.left_out)
        written = self.conversation.answer(progress.text, progress.conversation.turns[-1].finish or "stopped")
        return replace(self, conversation=written, notes=(*self.notes, about))


Message = dict[str, Any]


def messages(talk: Talk, phase: str | None = None, earlier: Sequence[Message] | None = None) -> list[Message]:
    """The Chatbot's value. `phase` is what the last answer is doing now, None when nothing is being answered.

    `earlier`: the messages of all turns but the last, where they are known already; while an answer streams, its own
    turn is all that is drawn anew.
    """
    last = len(talk.conversation.turns) - 1
    if earlier is None:
        earlier = [message for index in range(last) for message in _turn_messages(talk, index, None)]
    return [*earlier, *_turn_messages(talk, last, phase)] if last >= 0 else []


def _turn_messages(talk: Talk, index: int, phase: str | None) -> list[Message]:
    turn = talk.conversation.turns[index]
    about = talk.notes[index] if index < len(talk.notes) else Notes()
    is_last = index == len(talk.conversation.turns) - 1
    shown = [{"role": "user", "content": [*_question(turn, index), *_question_acts(turn, index)]}]
    foot = _foot(turn, about, index) if phase is None else _waiting(phase, turn)
    answer = [_text(as_written(turn.answer))] if turn.answer else []
    if answer or foot:
        options = [CONTINUE] if is_last and phase is None and turn.answer and turn.finish in CUT else []
        shown.append({"role": "assistant", "content": [*answer, *foot], "options": options})
    return shown


def doing(progress: Progress) -> str | None:
    """What an answer is doing, as the `phase` of `messages`."""
    if progress.phase == "done":
        return None
    return _queued(progress.wait) if progress.wait else progress.phase


def choices(cards: dict[str, Card], is_away: Callable[[Card], bool] = lambda card: False) -> list[tuple[str, str]]:
    """The model list: what is shown, and the key it stands for. Models of one name are told apart by their folder;
    of one whose server is away that is said."""
    bearers = Counter(card.name for card in cards.values())
    labels = [_label(card, unique=bearers[card.name] == 1) + (AWAY if is_away(card) else "") for card in cards.values()]
    return list(zip(labels, cards, strict=True))


def status(about: str, *, state: str, why: str = "", facts: Sequence[tuple[str, str]] = ()) -> str:
    """The line about the model: what it knows, then how it runs. `state`: "idle" | "loading" | "ready" | "failed".

    `facts` are names and values for whoever asks for more.
    """
    detail = f"<span class='why'>{html.escape(why)}</span>" if why else ""
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts)
    more = f"<details><summary>Details</summary><dl>{rows}</dl></details>" if rows else ""
    return (
        f"<div class='status {state}' role='status'><span class='dot' aria-hidden='true'></span>"
        f"<div><p><span class='about'>{html.escape(about)}</span> {detail}</p>{more}</div></div>"
    )


def facts(card: Card) -> list[tuple[str, str]]:
    """What else a card says of its model, as names and values."""
    data = ", ".join(f"{name}: {value}" for name, value in card.data.items() if not isinstance(value, dict))
    return [
        ("Trained", TRAINED[card.stage]),
        ("From", KINDS.get(card.kind, card.kind) + (f", on {card.base}" if card.base else "")),
        ("Pictures", IMAGE_MODES.get(card.image_mode, card.image_mode)),
        ("Template", card.template),
        *([("Data", data)] if data else []),
    ]


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


def data_url(image: Image.Image, side: int) -> str:
    """The image in the address itself, at most `side` pixels long and wide."""
    small = image.copy()
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _label(card: Card, *, unique: bool) -> str:
    name = card.name if unique else f"{card.name} ({Path(card.source).name})"
    return f"{name} · {STAGES.get(card.stage, KINDS[card.kind])}"


def _question(turn: Turn, index: int) -> list[dict[str, Any]]:
    pictures = "".join(
        f"<button data-act='view' data-turn='{index}' data-picture='{number - 1}' aria-label='Open picture {number}'>"
        f"<img src='{_data_url(picture)}' alt='Picture {number} of this question'></button>"
        for number, picture in enumerate(turn.images, start=1)
    )
    content = [_html(f"<div class='pictures'>{pictures}</div>")] if pictures else []
    return [*content, _text(as_typed(turn.question))] if turn.question.strip() else content


def _question_acts(turn: Turn, index: int) -> list[dict[str, Any]]:
    return [_html(f"<div class='acts'>{_act('edit', 'Edit', index, text=turn.question)}</div>")]


def _answer_acts(turn: Turn, notes: Notes, index: int) -> str:
    """Copying an answer, judging it, and writing a better one."""
    buttons = [
        _act("copy", "Copy", index, text=turn.answer),
        _act("up", "👍", index, name="Good answer", pressed=notes.vote == "up"),
        _act("down", "👎", index, name="Bad answer", pressed=notes.vote == "down"),
        _act("correct", "Correct", index, text=turn.answer, pressed=notes.vote == "corrected"),
    ]
    return f"<div class='acts'>{''.join(buttons)}</div>"


def _act(
    act: str, label: str, index: int, *, name: str = "", text: str | None = None, pressed: bool | None = None
) -> str:
    """A button that page.js listens to. `text` is what it copies or lets a person change."""
    state = "" if pressed is None else f" aria-pressed='{str(pressed).lower()}'"
    held = "" if text is None else f" data-text='{html.escape(text)}'"
    named = f"title='{name or label}' aria-label='{name or label}'"
    return f"<button data-act='{act}' data-turn='{index}' {named}{state}{held}>{label}</button>"


def _foot(turn: Turn, notes: Notes, index: int) -> list[dict[str, Any]]:
    """The small line under an answer, why it ended, how fast it came, what it did not see, and what one can do."""
    parts = ["no words came"] if turn.answer == "" else []
    if turn.finish in FINISHES:
        parts.append(FINISHES[turn.finish])
    if notes.seconds_to_first is not None:
        parts.append(f"first word after {notes.seconds_to_first:.2f} s")
    if notes.tokens_per_second is not None:
        parts.append(f"{notes.tokens_per_second:.0f} tokens/s")
    if notes.left_out is not None:
        parts.append(html.escape(notes.left_out))
    about = f"<div class='foot'>{' · '.join(parts)}</div>" if parts else ""
    return [_html(about + (_answer_acts(turn, notes, index) if turn.answer else ""))]


def _waiting(phase: str, turn: Turn) -> list[dict[str, Any]]:
    if phase == "writing":
        return []
    told = "Reading the picture …" if phase == "reading" and turn.images else PHASES.get(phase, phase)
    return [_html(f"<div class='foot waiting'>{html.escape(told)}</div>")]


def _queued(wait: Wait) -> str:
    place = f"{wait.ahead} before you" if wait.ahead else "you are next"
    if wait.seconds is None:
        return f"Waiting for its turn: {place} …"
    minutes = round(wait.seconds / 60)
    length = f"{minutes} min" if minutes else f"{max(1, round(wait.seconds))} s"
    return f"Waiting for its turn: {place}, about {length} …"


def _data_url(picture: Picture) -> str:
    url = _data_urls.get(picture)
    if url is None:
        url = _data_urls[picture] = data_url(picture.image, SHOWN_SIDE)
    return url


def _text(text: str) -> dict[str, Any]:
    """Text as a dictionary: a plain string would lose its indentation on the way."""
    return {"type": "text", "text": text}


def _html(value: str) -> dict[str, Any]:
    """HTML of our own making; nobody else's text goes in here unescaped."""
    return {"type": "component", "component": "html", "value": value, "constructor_args": {}, "props": {}}
