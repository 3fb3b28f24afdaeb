"""What the visitors of a page under load do, and what they hold against it."""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import httpx

from llava_app.conversation import Conversation
from llava_app.engine import Engine, Sampling
from llava_app.images import Picture
from llava_app.ui.handlers import MAX_CHARACTERS
from tests.benchmarks.tab import Heard, Page, Tab, greedy
from tests.serving import PATIENCE

PAUSE = 2.0  # s that a visitor thinks at most before the next question
CLOCK = 5.0  # s between two looks at the model list, as the page's timer has it
SHORT, LONG = 24, 160  # tokens
JOKE, DESCRIBE, WHAT = "What is the joke?", "Describe the picture.", "What is it?"

File = tuple[str, bytes]  # its name and what is in it


@dataclass(frozen=True)
class Expected:
    """What the model says to one visitor by itself, with nobody else asking."""

    joke: str
    what: str  # after the joke
    description: str


@dataclass
class Tally:
    """What all visitors have seen together."""

    asked: int = 0  # questions that were to be answered
    right: int = 0
    wrong: list[str] = field(default_factory=list)  # answers that were lost, cut, or another visitor's
    provoked: int = 0  # errors that visitors made on purpose
    named: int = 0  # of those, the ones that the page explained
    faults: list[str] = field(default_factory=list)  # errors without a name, or that nobody provoked
    waits: list[float] = field(default_factory=list)  # s from JOKE to its first word, in a new chat


def expect(engine: Engine, picture: Picture) -> Expected:
    """Ask the visitor's questions of an engine that nobody else uses."""

    def answer(conversation: Conversation, tokens: int) -> str:
        sampling = Sampling(temperature=0, top_p=1, max_new_tokens=tokens)
        return "".join(piece.text for piece in engine.answer(conversation, sampling))

    first = Conversation().ask(JOKE, [picture])
    joke = answer(first, SHORT)
    what = answer(first.answer(joke, "length").ask(WHAT), SHORT)
    return Expected(joke, what, answer(Conversation().ask(DESCRIBE, [picture]), LONG))


def client(address: str, number: int) -> httpx.AsyncClient:
    """A browser behind a proxy that says from which address each visitor comes."""
    limits = httpx.Limits(max_connections=None, keepalive_expiry=2)  # s; the server hangs up after 5
    headers = {"X-Forwarded-For": f"10.0.{number // 256}.{number % 256}"}
    return httpx.AsyncClient(base_url=address, headers=headers, timeout=PATIENCE, limits=limits, verify=False)


class Visitor:
    """Somebody who asks about a picture that nobody else has, and knows what is to come."""

    def __init__(self, number: int, picture: Picture, expected: Expected, *, model: str, tally: Tally) -> None:
        self._number = number
        self._own = (f"visitor-{number}.png", _png(picture))
        self._expected = expected
        self._model = model
        self._tally = tally
        self._random = random.Random(number)
        self._kept: dict[str, dict[str, Any]] = {}  # the conversations in this browser
        self._current: str | None = None
        self._acts: dict[Callable[[], Awaitable[None]], int] = {
            self._talk: 5, self._read: 3, self._stop: 2, self._reload: 2, self._broken: 2, self._too_long: 1,
        }  # fmt: skip

    async def visit(self, address: str, page: Page, until: float) -> None:
        """Do one thing after the other until that time on the monotonic clock."""
        async with client(address, self._number) as self._client:
            self._page = page
            await self._open()
            await self._act(until)
            await self._tab.close()

    async def _act(self, until: float) -> None:
        clock = asyncio.create_task(self._tick())
        while time.monotonic() < until:
            await asyncio.sleep(self._random.uniform(0, PAUSE))
            (act,) = self._random.choices(list(self._acts), list(self._acts.values()))
            await act()
        clock.cancel()
        with suppress(asyncio.CancelledError):
            await clock

    # What a visitor does

    async def _talk(self) -> None:
        """Two questions; the first is everybody's measure of waiting."""
        begun, first = time.monotonic(), _First()
        heard = await self._ask_anew(JOKE, SHORT, look=first)
        if first.at:
            self._tally.waits.append(first.at - begun)
        self._judge(heard, self._expected.joke)
        self._judge(await self._ask(WHAT, SHORT), self._expected.what)

    async def _read(self) -> None:
        """One long answer."""
        self._judge(await self._ask_anew(DESCRIBE, LONG), self._expected.description)

    async def _stop(self) -> None:
        """Press Stop at the first words: what was written stays."""
        first = _First(lambda: asyncio.create_task(self._tab.run([self._page.stop], [None])))
        heard = await self._ask_anew(DESCRIBE, LONG, look=first)
        if first.started:
            heard.faults += (await first.started).faults
        self._judge(heard, self._expected.description, whole=False)

    async def _reload(self) -> None:
        """Load the page anew at the first words: the question and what was written are there again."""
        closed = asyncio.Event()
        asking = asyncio.create_task(self._ask_anew(DESCRIBE, LONG, look=_First(closed.set)))
        waiting = asyncio.create_task(closed.wait())
        await asyncio.wait([asking, waiting], return_when=asyncio.FIRST_COMPLETED)
        await self._tab.close()
        for task in (asking, waiting):
            task.cancel()
        heard = await self._open()
        self._tally.faults += heard.faults
        self._count(_written(heard.outputs[1:2]), self._expected.description, whole=False)

    async def _broken(self) -> None:
        """Send a file that is no picture, or no longer one."""
        own = self._own[1]
        content = self._random.choice((b"", b"not a picture", own[: len(own) // 2], b"GIF89a" + own))
        await self._provoke(JOKE, [("broken.png", content)], named="broken.png")

    async def _too_long(self) -> None:
        await self._provoke("why " * (MAX_CHARACTERS // 4 + 1), [], named="the limit is")

    # How

    async def _open(self) -> Heard:
        """Load the page into a new tab, which opens the conversation that was open before."""
        (await self._client.get("/")).raise_for_status()
        self._tab = Tab(self._client, self._page)
        talks = [[key, json.dumps(talk)] for key, talk in self._kept.items()]
        return await self._run([self._page.restore], {"current": self._current, "talks": talks})

    async def _ask_anew(self, question: str, tokens: int, *, look: Any = None) -> Heard:
        """In a new chat, about the visitor's own picture."""
        cleared = await self._run([self._page.clear], *[None] * 3)
        self._tally.faults += cleared.faults
        return await self._ask(question, tokens, [self._own], look=look)

    async def _ask(self, question: str, tokens: int, files: list[File] = [], *, look: Any = None) -> Heard:  # noqa: B006
        uploaded = [await self._tab.upload(content, name) for name, content in files]
        box = {"text": question, "files": uploaded}
        return await self._run(self._page.ask, box, None, None, self._model, *greedy(tokens), look=look)

    async def _run(self, chain: list[int], *data: Any, look: Any = None) -> Heard:
        """Run events, and store what the browser is told to."""
        heard = await self._tab.run(chain, list(data), look=look or (lambda outputs: None))
        told = heard.outputs[-1] if heard.outputs and isinstance(heard.outputs[-1], dict) else {}
        self._current = told.get("current", self._current)
        if "kept" in told:
            self._kept = {told["kept"]["key"]: told["kept"]}  # the last one is enough
        return heard

    async def _provoke(self, question: str, files: list[File], *, named: str) -> None:
        heard = await self._ask(question, SHORT, files)
        self._tally.provoked += 1
        self._tally.faults += heard.faults
        self._tally.named += any(named in text for text in heard.told)

    def _judge(self, heard: Heard, expected: str, *, whole: bool = True) -> None:
        """Whether the browser now keeps the right answer, and nothing went wrong on the way."""
        self._tally.faults += heard.faults + heard.told
        kept = self._kept.get(self._current or "")
        self._count(kept["turns"][-1]["answer"] if kept else "", expected, whole=whole)

    def _count(self, answer: str, expected: str, *, whole: bool) -> None:
        """Of an answer that was cut, its beginning is right."""
        self._tally.asked += 1
        if answer == expected or (not whole and answer and expected.startswith(answer)):
            self._tally.right += 1
        else:
            self._tally.wrong.append(f"{answer!r} in place of {expected!r}")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(CLOCK)
            for event in self._page.ticks:
                heard = await self._tab.run([event], [None] * self._page.inputs[event])
                self._tally.faults += heard.faults


class _First:
    """Looks at what a window shows and does something at the first words of the answer."""

    def __init__(self, act: Callable[[], Any] = lambda: None) -> None:
        self._act = act
        self.at: float | None = None  # on the monotonic clock
        self.started: Any = None  # what `act` returned

    def __call__(self, outputs: list[Any]) -> None:
        if self.at is None and _written(outputs):
            self.at, self.started = time.monotonic(), self._act()


def _written(outputs: list[Any]) -> str:
    """What of an answer stands last in the window."""
    window = next((output for output in outputs if isinstance(output, list)), [])
    last = window[-1] if window else {"role": "user"}
    texts = [part["text"] for part in last["content"] if part.get("text")] if last["role"] == "assistant" else []
    return "".join(texts)


def _png(picture: Picture) -> bytes:
    file = BytesIO()
    picture.image.save(file, "PNG")
    return file.getvalue()
