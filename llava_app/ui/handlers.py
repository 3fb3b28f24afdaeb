"""What happens when somebody sends, retries or undoes.

Every handler is a public endpoint: it believes nothing that the browser sends but the question, the files that the
browser uploaded, the name of a model and the settings, and it checks those. A failure says what to do; it leaves the
conversation as it was and puts the question back into the box, or keeps what was written by then, marked.
"""

import html
import logging
import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import replace
from typing import Any

import gradio as gr
from gradio.context import LocalContext

from llava_app.chat import reply
from llava_app.errors import UserError
from llava_app.limits import LOCAL, Gate, check
from llava_app.ui.asked import Asked, Tab, ask
from llava_app.ui.display import Talk, doing, messages
from llava_app.ui.door import visitor
from llava_app.ui.examples import Example, gallery
from llava_app.ui.files import save
from llava_app.ui.live import Live
from llava_app.ui.model_table import getting
from llava_app.ui.models import Models
from llava_app.ui.settings import Setting, read

MAX_CHARACTERS = LOCAL.characters  # in one question; far above any model's context, far below what stalls a tokenizer
REAL = ("hub", "server")  # kinds of models that know more than the drawn world
HEARTBEAT = 0.2  # s between two signs of life, so that Stop and a closed tab are noticed

Update = tuple[Any, Any, Any]  # the talk, the Chatbot's messages, the box
UNCHANGED: Update = (gr.skip(), gr.skip(), gr.skip())
FREE = {"submit_btn": True, "stop_btn": False}  # the box while nothing is answered
BUSY = {"submit_btn": False, "stop_btn": True}

logger = logging.getLogger(__name__)


class Handlers:
    """The events of the page, on the models of this process."""

    def __init__(
        self,
        models: Models,
        examples: Sequence[Example],
        gate: Gate | None = None,
        *,
        world: Sequence[Example] = (),
    ) -> None:
        """`gate`: where every question passes; by default that of a page of one's own. `world`: examples for models
        that know more than the drawn world."""
        self.models = models
        self.examples = examples
        self.world = world
        self.gate = gate or Gate(LOCAL)
        self.limits = self.gate.limits
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
        return self._open(self._asking(question, files), tab, talk, box, model, settings)

    def example(self, chosen: gr.EventData, tab: Tab, talk: Talk, model: str | None, *settings: Setting) -> Update:
        """Ask the example that was clicked."""
        index, offered = chosen._data.get("index"), self._offered(model)
        if not _is_index(index, offered):
            return UNCHANGED
        question, files = offered[index].question, [str(offered[index].image)]
        box = {"text": question, "files": files}
        return self._open(self._asking(question, files), tab, talk, box, model, settings)

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
        return self._open(self._asking(question, files), tab, talk, box, model, settings, left=typed)

    def edit(self, edited: gr.EventData, tab: Tab, talk: Talk, model: str | None, *settings: Setting) -> Update:
        """Ask an earlier question anew, in other words and with its pictures; the conversation goes on from there."""
        turn, question = edited._data.get("turn"), edited._data.get("text")
        turns = talk.conversation.turns
        if not _is_index(turn, turns) or not isinstance(question, str):
            return UNCHANGED
        if not question.strip() and not turns[turn].images:
            gr.Info("Type a question.")
            return UNCHANGED
        return self._open(lambda on: on.edit(turn, question), tab, talk, None, model, settings)

    def resume(self, tab: Tab, talk: Talk, model: str | None, *settings: Setting) -> Update:
        """Go on with the last answer, where it was cut."""
        if not talk.conversation.turns or not talk.conversation.turns[-1].answer:
            return UNCHANGED
        return self._open(Talk.resume, tab, talk, None, model, settings)

    def retry(self, tab: Tab, talk: Talk, model: str | None, *settings: Setting) -> Update:
        """Answer the last question anew."""
        if not talk.conversation.turns:
            return UNCHANGED
        return self._open(Talk.retry, tab, talk, None, model, settings)

    def stream(self, tab: Tab, talk: Talk, request: gr.Request | None = None) -> Iterator[Any]:
        """The Chatbot's messages while what was asked in this tab is answered, which may fail: see `Asked.fail`."""
        asked = tab.begin(talk)
        if asked is None:
            yield gr.skip()  # a generator without a value would empty the window
            return
        earlier = messages(asked.so_far)[:-2]
        try:
            with self.gate.answer(visitor(request)), closing(self._drawn(tab, asked)) as drawn:
                for so_far, phase in drawn:
                    yield messages(so_far, phase, earlier)
        except Exception as error:
            asked.fail()
            self.live.put(asked.so_far)
            gr.Warning(html.escape(explain(error)), duration=20)
        finally:
            asked.is_over = True

    def stop(self, tab: Tab) -> None:
        """End the answer of this tab within one piece."""
        tab.stop()

    def slow(self, told: gr.EventData, tab: Tab) -> None:
        """Note that the browser is behind with what it draws, and by how many seconds."""
        late = told._data.get("late")
        if type(late) in (int, float) and late > 0:
            tab.slow(late)

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
        files = [save(picture) for picture in turn.images]
        shorter = talk.undo()
        return shorter, messages(shorter), gr.update(value={"text": turn.question, "files": files})

    def offer(self, model: str | None) -> Any:
        """The examples that suit the chosen model."""
        return gr.update(examples=gallery(self._offered(model)))

    def begun(self, request: gr.Request) -> Any:
        """The question that the address brings along with ?q=; it is sent by hand."""
        question = (request.query_params.get("q") or "")[:MAX_CHARACTERS]
        return gr.update(value={"text": question, "files": []}) if question else gr.skip()

    def _asking(self, question: str, files: Sequence[str]) -> Callable[[Talk], Talk]:
        return lambda before: ask(before, question, files, self.limits)

    def _open(
        self,
        reopen: Callable[[Talk], Talk],
        tab: Tab,
        talk: Talk,
        box: dict[str, Any] | None,
        model: str | None,
        settings: Sequence[Setting],
        *,
        left: str = "",
    ) -> Update:
        """Leave the talk that `reopen` makes of this one for `stream`, and show that, with the text `left` in the box.
        When that fails: everything as it was, and `box` in the box."""
        if tab.is_answering:
            gr.Info("Wait for the answer, or stop it.")
            return UNCHANGED
        before = tab.leave(talk)
        try:
            self.gate.count(visitor(LocalContext.request.get(None)))  # before anything is decoded
            how = read(*settings, longest=self.limits.new_tokens)
            opened = reopen(before).under(how.system)
            check(opened.conversation, self.limits)
        except Exception as error:
            gr.Warning(html.escape(explain(error)), duration=20)
            return before, messages(before), gr.skip() if box is None else gr.update(value=box)
        key = self.live.key_for(before)
        before, opened = replace(before, key=key), replace(opened, key=key)
        shown = opened.cut()
        tab.asked = Asked(opened, before, box, model, how.sampling, how.image_mode, so_far=shown)
        return shown, messages(shown, "reading"), _busy(None if box is None else left)

    def _offered(self, model: str | None) -> Sequence[Example]:
        card = self.models.cards().get(model or "")
        return self.world if card and card.kind in REAL and self.world else self.examples

    def _drawn(self, tab: Tab, asked: Asked) -> Generator[tuple[Talk, str | None], None, None]:
        """Of all that comes, which is kept, what the browser is to draw; until nobody waits for it any more."""
        with closing(self._pieces(asked)) as pieces:
            for so_far, phase in pieces:
                if not tab.wants(asked):
                    return
                asked.so_far = so_far
                self.live.put(so_far)
                if tab.draws():
                    yield so_far, phase

    def _pieces(self, asked: Asked) -> Generator[tuple[Talk, str | None], None, None]:
        """The talk so far and what its answer is doing; None at the end."""
        talk, model = asked.talk, asked.model
        if not model:
            yield from _until(self.models.first, talk, lambda: "Starting …")
            model = self.models.first.result()
        card = self.models.card(model)
        with self.models.lend(card) as ready:
            yield from _until(ready, talk, lambda: getting(card))
            shown = talk.conversation.framed(asked.image_mode)
            with closing(reply(ready.result().engine, shown, asked.sampling)) as answer:
                for progress in answer:
                    yield talk.advance(progress), doing(progress)


def _until(future: Future[Any], talk: Talk, phase: Callable[[], str]) -> Iterator[tuple[Talk, str]]:
    while not future.done():
        yield talk.cut(), phase()
        wait([future], timeout=HEARTBEAT)


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
