"""Servers elsewhere that speak the OpenAI protocol: which of them answer, what they offer, which has least to do."""

import asyncio
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import openai

from llava_app.checkpoints import Card
from llava_app.errors import UserError

LOOK = 10.0  # s between two looks at whether a server answers and what it offers
CONNECT = 3.0  # s that a connection may take, and that the page waits for the first lists of models
LISTING = 10.0  # s that a list of models may take
SILENCE = 120.0  # s that a server may say nothing; the first word waits for the whole prompt
RECENT = 60.0  # s for which a failure puts a server behind the others

logger = logging.getLogger(__name__)


class Server:
    """One address. `running` counts what this process asked of it."""

    def __init__(self, address: str, *, silence: float) -> None:
        """`address` ends in /v1; #NAME after it adds a model that the server hosts but does not list."""
        url, _, named = address.partition("#")
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            shown = address.rpartition("@")[2]  # without a password
            raise UserError(f"“{shown}” is no address of a server. Write it like http://host:8000/v1.")
        self.name = urlsplit(url).netloc.rpartition("@")[2]
        self.known: tuple[str, ...] = ()  # models that it offers, or did when it answered last
        self.answers = False
        self._counts: bool | None = None  # whether it takes stream_options; None before it was asked
        self.running = 0
        self._failed_at: deque[float] = deque(maxlen=100)  # on the monotonic clock
        self._named = (named,) if named else ()
        # A server of one's own needs no key, and a key for another service is not to be sent to it.
        timeout = openai.Timeout(silence, connect=CONNECT)
        here = openai.DefaultAsyncHttpxClient(follow_redirects=False)  # what is asked goes to this address alone
        self.client = openai.AsyncOpenAI(base_url=url, api_key="none", timeout=timeout, max_retries=0, http_client=here)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While something is being asked of it."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def fail(self) -> None:
        """Note that it left a question without an answer."""
        self._failed_at.append(time.monotonic())

    @property
    def failures(self) -> int:
        """How many questions it left without an answer in the last RECENT seconds."""
        since = time.monotonic() - RECENT
        return sum(at > since for at in self._failed_at)

    async def ask(self, request: dict[str, Any]) -> openai.AsyncStream[Any]:
        """Its answer as it comes, with the number of tokens where it gives that. Raises openai.APIError."""
        if self._counts is False:
            return await self._post(request)
        try:
            stream = await self._post(request | {"stream_options": {"include_usage": True}})
            self._counts = True
        except openai.APIStatusError as error:
            if self._counts or error.status_code not in (400, 422):
                raise
            stream = await self._post(request)
            self._counts = False
        return stream

    async def _post(self, request: dict[str, Any]) -> openai.AsyncStream[Any]:
        """Where the connection breaks it is asked once more: one that was kept may have ended meanwhile."""
        try:
            return await self.client.chat.completions.create(**request)
        except openai.APITimeoutError:
            raise
        except openai.APIConnectionError:
            return await self.client.chat.completions.create(**request)

    async def look(self) -> None:
        """Find out whether the server answers and which models it offers."""
        before = self.models
        try:
            async with asyncio.timeout(LISTING):
                listed = await self.client.models.list()
            offered = (model.id for model in listed.data if model.id.isprintable())  # names go into lists and the log
            self.known, self.answers = tuple(dict.fromkeys((*self._named, *offered))), True
        except openai.APIStatusError as error:
            if error.status_code >= 500:  # it is about to start
                self.answers = False
            elif error.status_code != 429:  # it answers, but has no list
                self.known, self.answers = self._named, True
        except (TimeoutError, openai.OpenAIError, ValueError, TypeError, AttributeError):  # no list of the protocol
            self.answers, self._counts = False, None  # it may come back as another program
        if bool(before) != bool(self.models):
            logger.warning("%s %s", self.name, f"offers {', '.join(self.models)}" if self.models else "is out of reach")

    @property
    def models(self) -> tuple[str, ...]:
        """What it offers now; nothing while it does not answer."""
        return self.known if self.answers else ()


class Servers:
    """All servers of this process, and the thread that talks to them. Methods may be called from any thread."""

    def __init__(self, addresses: Sequence[str], *, silence: float = SILENCE) -> None:
        """Waits for the first look at each, CONNECT seconds at most. Raises UserError for a bad address."""
        self._servers = [Server(address, silence=silence) for address in addresses]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="servers", daemon=True)
        self._thread.start()
        wait([self.start(server.look()) for server in self._servers], CONNECT)
        for server in self._servers:
            if not server.models:
                logger.warning("%s offers no models yet. They are listed as soon as it does.", server.name)
        self.start(self._look_again())

    def start(self, work: Coroutine[Any, Any, None]) -> "Future[None]":
        """Run `work` on the servers' thread; cancelling what comes back ends it there."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def look(self) -> None:
        """Look at every server, at the same time."""
        await asyncio.gather(*(server.look() for server in self._servers))

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK)
            await self.look()

    def cards(self, *, public: bool = False) -> list[Card]:
        """The models of all servers, each once, however many offer it; also of those that do not answer any more.

        On a `public` page they do not say where they run.
        """
        hosts: dict[str, list[str]] = {}
        for server in self._servers:
            for model in server.known:
                hosts.setdefault(model, []).append(server.name)
        return [
            Card(
                name=re.split(r"[/\\]", model.rstrip("/\\"))[-1],
                source=model,
                kind="server",
                stage="instruct",
                template="",
                image_mode="",
                about="Runs on a server." if public else f"Runs on {' and '.join(names)}.",
            )
            for model, names in hosts.items()
        ]

    def offering(self, model: str) -> list[Server]:
        """The servers that offer `model` now: those that failed least of late first, of these the least busy."""
        offering = (server for server in self._servers if model in server.models)
        return sorted(offering, key=lambda one: (one.failures, one.running))

    def close(self) -> None:
        """End the thread and every request that runs."""
        self.start(self._end())
        self._thread.join()

    def _run(self) -> None:
        with closing(self._loop):
            self._loop.run_forever()

    async def _end(self) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        for server in self._servers:
            await server.client.close()
        self._loop.stop()
