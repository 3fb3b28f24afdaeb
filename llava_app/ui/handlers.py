"""What happens when somebody sends, retries, undoes or chooses a model.

Every handler is a public endpoint: it believes nothing that the browser sends but the question, the files that the
browser uploaded, the name of a model and the settings, and it checks those. A failure leaves the conversation as it
was, puts the question back into the box and says what to do.
"""

import html
import logging
import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder

from llava_app.chat import reply
from llava_app.checkpoints import Card
from llava_app.errors import ContextError, ImageError, UserError
from llava_app.images import open_image
from llava_app.ui.asked import Asked, Tab
from llava_app.ui.display import Talk, activity, choices, facts, messages, status
from llava_app.ui.examples import Example
from llava_app.ui.live import Live
from llava_app.ui.models import Models
from llava_app.ui.settings import Setting, read

MAX_PICTURES = 8  # in one message
MAX_CHARACTERS = 20_000  # in one question; far above any model's context, far below what stalls a tokenizer
HEARTBEAT = 0.2  # s between two signs of life, so that Stop and a closed tab are noticed

Update = tuple[Any, Any, Any]  # the talk, the Chatbot's messages, the box
UNCHANGED: Update = (gr.skip(), gr.skip(), gr.skip())
FREE = {"submit_btn": True, "stop_btn": False}  # the box while nothing is answered
BUSY = {"submit_btn": False, "stop_btn": True}

logger = logging.getLogger(__name__)


class Handlers:
    """The events of the page, on the models of this process."""

    def __init__(self, models: Models, examples: Sequence[Example]) -> None:
        self.models = models
        self.examples = examples
        self.live = Live()

    def send(
        self, message: dict[str, Any] | None, tab: Tab, talk: Talk, model: str | None, *settings: Setting
    ) -> Update:
        """Ask what is in the box."""
        message = message or {}
        question, files = message.get("text") or "", message.get("files") or []
        if not question.strip() and not files:
            gr.Info("Type a question or add a picture, then send.")
            return UNCHANGED
        box = {"text": question, "files": files}
        return _open(lambda before: _ask(before, question, files), tab, talk, box, model, settings)

    def example(self, chosen: gr.SelectData, tab: Tab, talk: Talk, model: str | None, *settings: Setting) -> Update:
        """Ask the example that was clicked."""
        if not isinstance(chosen.index, int) or not 0 <= chosen.index < len(self.examples):
            return UNCHANGED
        question, files = self.examples[chosen.index].question, [str(self.examples[chosen.index].image)]
        box = {"text": question, "files": files}
        return _open(lambda before: _ask(before, question, files), tab, talk, box, model, settings)

    def quick(
        self, question: str, message: dict[str, Any] | None, tab: Tab, talk: Talk, model: str | None, *settings: Setting
    ) -> Update:
        """Ask `question` about the pictures in the box, or about those of the conversation. The box keeps its text."""
        message = message or {}
        typed, files = message.get("text") or "", message.get("files") or []
        if not files and not talk.conversation.pictures:
            gr.Info("Add a picture first: drop it anywhere, or paste it.")
            return UNCHANGED
        box = {"text": typed, "files": files}
        return _open(lambda before: _ask(before, question, files), tab, talk, box, model, settings, left=typed)

    def edit(self, edited: gr.EventData, tab: Tab, talk: Talk, model: str | None, *settings: Setting) -> Update:
        """Ask an earlier question anew, in other words and with its pictures; the conversation goes on from there."""
        turn, question = edited._data.get("turn"), edited._data.get("text")
        turns = talk.conversation.turns
        if not _is_index(turn, turns) or not isinstance(question, str):
            return UNCHANGED
        if not question.strip() and not turns[turn].images:
            gr.Info("Type a question.")
            return UNCHANGED
        return _open(lambda before: before.edit(turn, _bounded(question)), tab, talk, None, model, settings)

    def resume(self, tab: Tab, talk: Talk, model: str | None, *settings: Setting) -> Update:
        """Go on with the last answer, where it was cut."""
        if not talk.conversation.turns or not talk.conversation.turns[-1].answer:
            return UNCHANGED
        return _open(Talk.resume, tab, talk, None, model, settings)

    def retry(self, tab: Tab, talk: Talk, model: str | None, *settings: Setting) -> Update:
        """Answer the last question anew."""
        if not talk.conversation.turns:
            return UNCHANGED
        return _open(Talk.retry, tab, talk, None, model, settings)

    def stream(self, tab: Tab, talk: Talk) -> Iterator[Any]:
        """The Chatbot's messages while what was asked in this tab is answered. When that fails, the conversation is as
        it was before the question."""
        asked = tab.begin(talk)
        if asked is None:
            yield gr.skip()  # a generator without a value would empty the window
            return
        earlier = messages(asked.so_far)[:-2]
        try:
            with closing(self._pieces(asked)) as pieces:
                for so_far, phase in pieces:
                    if not tab.wants(asked):
                        break
                    asked.so_far = so_far
                    self.live.put(so_far)
                    yield messages(so_far, phase, earlier)
        except Exception as error:
            asked.fail()
            self.live.put(asked.before)
            gr.Warning(html.escape(explain(error)), duration=20)
        finally:
            asked.is_over = True

    def stop(self, tab: Tab) -> None:
        """End the answer of this tab within one piece."""
        tab.stop()

    def settle(self, tab: Tab, talk: Talk) -> Update:
        """The page once an answer ended, failed or was stopped; nothing changes while another one is to come."""
        asked = tab.asked
        if asked is None:
            return gr.skip(), messages(talk), gr.update(**FREE)
        if not asked.is_over:
            return UNCHANGED
        restored = {"value": asked.box} if asked.has_failed and asked.box is not None else {}
        now = tab.leave(talk)
        return now, messages(now), gr.update(**restored, **FREE)

    def undo(self, tab: Tab, talk: Talk) -> Update:
        """Take the last question back into the box, with its pictures; an answer that is coming ends."""
        talk = tab.leave(talk)
        if not talk.conversation.turns:
            return UNCHANGED
        turn = talk.conversation.turns[-1]
        files = [save_pil_to_cache(picture.image, get_upload_folder(), "picture", "png") for picture in turn.images]
        shorter = talk.undo()
        return shorter, messages(shorter), gr.update(value={"text": turn.question, "files": files})

    def greet(self, request: gr.Request) -> Iterator[tuple[Any, Any]]:
        """Model list and status for a new tab, as soon as it is known which model to start with: the one that the
        address names with ?model=, or that of the app."""
        while not self.models.first.done():
            yield gr.skip(), status("Starting …", state="loading")
            wait([self.models.first], timeout=HEARTBEAT)
        try:
            key = self.models.first.result()
        except Exception as error:
            yield gr.update(choices=choices(self.models.cards())), status(explain(error), state="failed")
            return
        cards = self.models.cards()
        key = _named(request.query_params.get("model"), cards) or key
        yield gr.update(choices=choices(cards), value=key), gr.skip()

    def begun(self, request: gr.Request) -> Any:
        """The question that the address brings along with ?q=; it is sent by hand."""
        question = (request.query_params.get("q") or "")[:MAX_CHARACTERS]
        return gr.update(value={"text": question, "files": []}) if question else gr.skip()

    def choose(self, model: str | None) -> Iterator[str]:
        """Load the chosen model and say how that goes. The conversation stays."""
        if not model:
            return
        try:
            card = self.models.card(model)
            with self.models.lend(card) as ready:
                while not ready.done():
                    yield status(f"Loading {card.name} …", state="loading")
                    wait([ready], timeout=HEARTBEAT)
                why = self.models.why(model, ready.result())
                yield status(card.about, state="ready", facts=[("Here", why), *facts(card)])
        except Exception as error:
            yield status(explain(error), state="failed")

    def refresh(self, listed: list[tuple[str, str]], model: str | None) -> tuple[Any, Any]:
        """The model list, when it is no longer the one that this tab shows. The selection stays while it can."""
        cards = self.models.cards()
        now = choices(cards)
        if now == listed:
            return gr.skip(), gr.skip()
        if model is None or model in cards:
            return now, gr.update(choices=now)
        gr.Warning(html.escape(f"The model “{Path(model).name}” is gone; {now[0][0]} takes its place."))
        return now, gr.update(choices=now, value=now[0][1])

    def watch(self, model: str | None) -> Any:
        """What the engine of the chosen model is doing."""
        card = self.models.cards().get(model or "")
        engine = self.models.loaded(card) if card else None
        snapshot = engine.snapshot() if engine else None
        return activity(snapshot) if snapshot else ""

    def _pieces(self, asked: Asked) -> Generator[tuple[Talk, str | None], None, None]:
        """The talk so far and what its answer is doing; None at the end."""
        talk, model = asked.talk, asked.model
        if not model:
            yield from _until(self.models.first, talk, "Starting …")
            model = self.models.first.result()
        card = self.models.card(model)
        with self.models.lend(card) as ready:
            yield from _until(ready, talk, f"Loading {card.name} …")
            with closing(reply(ready.result().engine, talk.conversation, asked.sampling)) as answer:
                for progress in answer:
                    yield talk.advance(progress), None if progress.phase == "done" else progress.phase


def _named(name: str | None, cards: dict[str, Card]) -> str | None:
    """The key of the model with this key or name; None when there is none."""
    return next((key for key, card in cards.items() if name in (key, card.name)), None)


def _until(future: Future[Any], talk: Talk, phase: str) -> Iterator[tuple[Talk, str]]:
    while not future.done():
        yield talk.cut(), phase
        wait([future], timeout=HEARTBEAT)


def _open(
    reopen: Callable[[Talk], Talk],
    tab: Tab,
    talk: Talk,
    box: dict[str, Any] | None,
    model: str | None,
    settings: Sequence[Setting],
    *,
    left: str = "",
) -> Update:
    """Leave the talk that `reopen` makes of this one for `stream`, and show that, with the text `left` in the box. When
    that fails: everything as it was, and `box` in the box."""
    if tab.is_answering:
        gr.Info("Wait for the answer, or stop it.")
        return UNCHANGED
    before = tab.leave(talk)
    try:
        how = read(*settings)
        opened = reopen(before).under(how.system)
    except Exception as error:
        gr.Warning(html.escape(explain(error)), duration=20)
        return before, messages(before), gr.skip() if box is None else gr.update(value=box)
    shown = opened.cut()
    tab.asked = Asked(opened, before, box, model, how.sampling, so_far=shown)
    return shown, messages(shown, "reading"), _busy(None if box is None else left)


def _ask(talk: Talk, question: str, files: Sequence[str]) -> Talk:
    """The talk with this question and these uploaded files. Raises UserError."""
    _bounded(question)
    if len(files) > MAX_PICTURES:
        raise ImageError(
            f"There are {len(files)} pictures in this message; the limit is {MAX_PICTURES}. Remove some, then send."
        )
    return talk.ask(question, tuple(open_image(file) for file in files))


def _bounded(question: str) -> str:
    """The question. Raises ContextError when it is far too long."""
    if len(question) > MAX_CHARACTERS:
        raise ContextError(
            f"The question has {len(question):,} characters; the limit is {MAX_CHARACTERS:,}. Shorten it, then send."
        )
    return question


def _is_index(number: Any, of: Sequence[Any]) -> bool:
    return type(number) is int and 0 <= number < len(of)


def _busy(left: str | None) -> Any:
    """The box while an answer comes: a Stop button in place of Send, and free for the next question, which begins with
    the text that is left in it; None leaves it as it is."""
    if left is None:
        return gr.update(**BUSY)
    return gr.update(value={"text": left, "files": []} if left else None, **BUSY)


def explain(error: Exception) -> str:
    """What a person is told. A fault of the program goes to the log under a number; the person gets the number."""
    if isinstance(error, UserError):
        return str(error)
    number = secrets.token_hex(3)
    logger.error("Error %s", number, exc_info=error)
    return f"Something went wrong here (error {number}; the log has the details). Try again."
