"""A person's conversations: listed, opened, renamed, deleted, exported, imported, and back after a reload.

Their text lies in the visitor's browser, one entry of its storage for each (see keeper.js); their pictures stay on the
server while it has room. What the browser sends is believed only where the server does not know better, and then it is
checked like an import.
"""

import html
import json
import re
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from llava_app.archive import pack, unpack
from llava_app.conversation import FINISHES, Conversation, Turn, well_formed
from llava_app.errors import DataError, UserError
from llava_app.limits import LOCAL, Gate, characters, check_kept
from llava_app.ui.asked import Tab
from llava_app.ui.display import Notes, Talk, messages
from llava_app.ui.door import visitor
from llava_app.ui.handlers import MAX_CHARACTERS, explain
from llava_app.ui.live import Live
from llava_app.ui.markdown import as_typed, as_written

MOST_TALKS = 100
MOST_TURNS = 500
MOST_PICTURES = 200  # of a question
FULL_TALKS = 10  # conversations as long as they may be that a list holds; a browser keeps some five million characters
TITLE_LENGTH = 60
KEY = re.compile(r"[A-Za-z0-9_-]{16,32}")
EMPTY = "New chat"


@dataclass(frozen=True)
class Entry:
    """A conversation in the list, whose pictures are left to `Live`: each tab keeps a list, and memory is bounded."""

    title: str
    talk: Talk  # without pictures
    time: float  # of the last change, in seconds since 1970
    pictures: tuple[int, ...]  # how many each of its questions has


Shelf = tuple[Entry, ...]  # newest first


class Conversations:
    """The events of the list, for conversations that `live` remembers with their pictures."""

    def __init__(self, live: Live, gate: Gate | None = None) -> None:
        """`gate`: where every import passes, as a question does; by default that of a page of one's own."""
        self.live = live
        self._gate = gate or Gate(LOCAL)

    def restore(self, stored: Any) -> tuple[Any, ...]:
        """The conversations of this browser, as keeper.js sends them, and the one that was open in this tab."""
        stored = stored if isinstance(stored, dict) else {}
        entries = sorted(self._entries(stored.get("talks")), key=lambda entry: entry.time, reverse=True)
        shelf = self._newest(entries)
        key = stored.get("current")
        found = [entry.talk for entry in shelf if entry.talk.key == key]
        talk = self._known(key) or (found[0] if found else Talk())
        return self._shown(talk, shelf)

    def keep(self, talk: Talk, shelf: Shelf) -> tuple[Any, ...]:
        """Note what has become of the open conversation: shelf, list, browser."""
        if not talk.conversation.turns:
            return shelf, _listing(shelf, talk), {"current": talk.key}
        self.live.put(talk)
        shelf = _with(shelf, talk)
        return shelf, _listing(shelf, talk), {"current": talk.key, "kept": _stored(_own(shelf, talk))}

    def new(self, tab: Tab, talk: Talk, shelf: Shelf) -> tuple[Any, ...]:
        """Start anew. The conversation before it stays in the list."""
        return self._shown(Talk(), _with(shelf, tab.leave(talk)))

    def open(self, key: str | None, tab: Tab, talk: Talk, shelf: Shelf) -> tuple[Any, ...]:
        """Show another conversation of the list."""
        chosen = [entry.talk for entry in shelf if entry.talk.key == key]
        if not chosen:
            return (gr.skip(),) * 5
        return self._shown(self.live.get(chosen[0].key) or chosen[0], _with(shelf, tab.leave(talk)))

    def rename(self, title: str | None, talk: Talk, shelf: Shelf) -> tuple[Any, ...]:
        """Give the open conversation another title."""
        title = _titled(title or "")
        if not title or not talk.conversation.turns:
            gr.Info("Ask something first, then type a title.")
            return gr.skip(), gr.skip(), gr.skip()
        entry = replace(_own(_with(shelf, talk), talk), title=title)
        shelf = (entry, *_without(shelf, talk))
        return shelf, _listing(shelf, talk), {"current": talk.key, "kept": _stored(entry)}

    def delete(self, tab: Tab, talk: Talk, shelf: Shelf) -> tuple[Any, ...]:
        """Forget the open conversation, here and in the browser."""
        tab.leave(talk)
        self.live.forget(talk.key)
        talk, gone, *shown = (Talk(), talk.key, *self._shown(Talk(), _without(shelf, talk)))
        return (*shown[:4], shown[4] | {"gone": gone})

    def export(self, talk: Talk) -> Any:
        """The open conversation as a zip file to download."""
        # With what an answer that is coming has written, and without a first question that just failed.
        talk = self.live.get(talk.key) or talk
        if not talk.conversation.turns:
            gr.Info("There is nothing to export yet. Ask something first.")
            return gr.skip()
        file = Path(tempfile.mkdtemp(dir=get_upload_folder())) / "conversation.zip"
        file.write_bytes(pack(talk.conversation, typed=as_typed, written=as_written))
        return gr.update(value=str(file))

    def take_in(
        self, file: str | None, tab: Tab, talk: Talk, shelf: Shelf, request: gr.Request | None = None
    ) -> tuple[Any, ...]:
        """Open a conversation from a zip file; the one before it stays in the list."""
        if not file:
            return (gr.skip(),) * 5
        try:
            self._gate.count(visitor(request))
            conversation = unpack(Path(file), self._gate.limits)
        except Exception as error:
            gr.Warning(html.escape(explain(error)), duration=20)
            return (gr.skip(),) * 5
        taken = Talk(conversation, tuple(Notes() for _ in conversation.turns))
        self.live.put(taken)
        return self._shown(taken, _with(_with(shelf, tab.leave(talk)), taken))

    def _shown(self, talk: Talk, shelf: Shelf) -> tuple[Any, ...]:
        """What it takes to show `talk`: talk, window, shelf, list, browser."""
        told: dict[str, Any] = {"current": talk.key}
        if shelf:
            told["kept"] = _stored(shelf[0])
        return talk, messages(talk), shelf, _listing(shelf, talk), told

    def _known(self, key: Any) -> Talk | None:
        return self.live.get(key) if isinstance(key, str) else None

    def _entries(self, talks: Any) -> list[Entry]:
        """What of the browser's conversations can be used."""
        entries = []
        for item in talks[: 2 * MOST_TALKS] if isinstance(talks, list) else []:
            try:
                key, text = item
                entry = _entry(str(key), json.loads(text), self._known(key))
                check_kept(entry.talk.conversation, self._gate.limits)
                entries.append(entry)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, UserError):
                continue  # forged, or of another version
        return entries

    def _newest(self, entries: list[Entry]) -> Shelf:
        """As many of the entries, newest first, as a list may hold."""
        room, shelf = FULL_TALKS * self._gate.limits.characters_kept, []
        for entry in entries[:MOST_TALKS]:
            room -= characters(entry.talk.conversation)
            if room < 0:
                break
            shelf.append(entry)
        return tuple(shelf)


def _with(shelf: Shelf, talk: Talk) -> Shelf:
    """The list with `talk` as it is now: at the top when it has changed; an empty one is not listed."""
    if not talk.conversation.turns:
        return shelf
    before = [entry for entry in shelf if entry.talk.key == talk.key]
    now = _listed(before[0].title if before else _title(talk), talk, time.time())
    if before and before[0].talk == now.talk:
        return shelf
    return (now, *_without(shelf, talk))[:MOST_TALKS]


def _listed(title: str, talk: Talk, changed: float) -> Entry:
    pictures = tuple(len(turn.images) for turn in talk.conversation.turns)
    turns = tuple(replace(turn, images=()) for turn in talk.conversation.turns)
    notes = [*talk.notes, *[Notes()] * (len(turns) - len(talk.notes))]
    told = tuple(
        replace(note, left_out=_gone(gone)) if gone else note for note, gone in zip(notes, pictures, strict=True)
    )
    return Entry(
        title, replace(talk, conversation=replace(talk.conversation, turns=turns), notes=told), changed, pictures
    )


def _own(shelf: Shelf, talk: Talk) -> Entry:
    """The one of `talk`, wherever it stands: one that was only opened stays in its place."""
    return next(entry for entry in shelf if entry.talk.key == talk.key)


def _without(shelf: Shelf, talk: Talk) -> Shelf:
    return tuple(entry for entry in shelf if entry.talk.key != talk.key)


def _title(talk: Talk) -> str:
    words = " ".join(talk.conversation.turns[0].question.split()) or "A picture"
    return words if len(words) <= TITLE_LENGTH else words[: TITLE_LENGTH - 1] + "…"


def _titled(title: str) -> str:
    return well_formed(" ".join(title.split())[:TITLE_LENGTH])


def _listing(shelf: Shelf, talk: Talk) -> Any:
    titles = [(entry.title, entry.talk.key) for entry in shelf]
    fresh = [] if any(key == talk.key for _, key in titles) else [(EMPTY, talk.key)]
    return gr.update(choices=[*fresh, *titles], value=talk.key)


def _stored(entry: Entry) -> dict[str, Any]:
    """A conversation as the browser keeps it: everything but the pictures."""
    turns = [
        {"question": turn.question, "pictures": pictures, "answer": turn.answer, "finish": turn.finish}
        for turn, pictures in zip(entry.talk.conversation.turns, entry.pictures, strict=True)
    ]
    return {"key": entry.talk.key, "title": entry.title, "time": entry.time, "turns": turns}


def _entry(key: str, stored: dict[str, Any], live: Talk | None) -> Entry:
    """A conversation from the browser; as `live` where the server still knows it. Raises what bad data raises."""
    title, changed = _titled(stored["title"]), float(stored["time"])
    if live is not None:
        return _listed(title, live, changed)
    turns, notes, pictures = stored["turns"], [], []
    if not KEY.fullmatch(key) or not 0 < len(turns) <= MOST_TURNS:
        raise DataError("a conversation from the browser has a wrong key or number of turns")
    for turn in turns:
        if turn["pictures"] not in range(MOST_PICTURES + 1):
            raise DataError("a turn from the browser has a wrong number of pictures")
        pictures.append(int(turn["pictures"]))
        notes.append(Notes(left_out=_gone(pictures[-1]) if pictures[-1] else None))
    return Entry(title, Talk(Conversation(tuple(map(_turn, turns))), tuple(notes), key), changed, tuple(pictures))


def _turn(stored: dict[str, Any]) -> Turn:
    question, answer, finish = stored["question"], stored["answer"] or "", stored["finish"]
    if not isinstance(question, str) or not isinstance(answer, str) or len(question) + len(answer) > 2 * MAX_CHARACTERS:
        raise DataError("a turn from the browser is no text, or too long")
    return Turn(question, (), answer, finish if finish in FINISHES and finish != "open" else "stopped")


def _gone(pictures: int) -> str:
    what = "The picture" if pictures == 1 else "The pictures"
    return f"{what} of this question left the server; the model no longer sees {'it' if pictures == 1 else 'them'}."
