"""A tab of the page as the server sees it: real HTTP, and the stream of events that a browser would read."""

import asyncio
import json
import uuid
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
from gradio_client.utils import apply_diff

from llava_app.ui.settings import DEFAULTS, Setting

API = "gradio_api"


def greedy(tokens: int) -> tuple[Setting, ...]:
    """The settings of the page for the likeliest answer of so many tokens at most."""
    return (0, 1, tokens, *DEFAULTS[3:])


class Page:
    """Which numbers the events of the page have."""

    def __init__(self, config: dict[str, Any]) -> None:
        parts = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
        self._events = config["dependencies"]
        self.inputs = {event["id"]: len(event["inputs"]) for event in self._events}
        self.ask = self._chain(self._on(parts["box"], "submit"))
        self.stop = self._on(parts["box"], "stop")
        self.clear = self._on(parts["clear"], "click")
        self.like = self._on(parts["bridge"], "like")
        self.restore = next(event["id"] for event in self._events if event["inputs"] == [parts["keeper"]])
        self.ticks = [event["id"] for event in self._events if any(name == "tick" for _, name in event["targets"])]

    def _on(self, part: int, name: str) -> int:
        return next(event["id"] for event in self._events if [part, name] in event["targets"])

    def _chain(self, first: int) -> list[int]:
        """The event and those that the browser starts one after the other when it is over."""
        chain = [first]
        while followers := [event["id"] for event in self._events if event["trigger_after"] == chain[-1]]:
            chain.append(followers[0])
        return chain


@dataclass
class Heard:
    """What one or several events said until they were over."""

    outputs: list[Any] = field(default_factory=list)  # of the last event
    told: list[str] = field(default_factory=list)  # what the person at the tab reads: warnings and errors
    faults: list[str] = field(default_factory=list)  # what went wrong without a word that a person may be told


Look = Callable[[list[Any]], None]


class Tab:
    """One session. `close` hangs up in the middle of whatever runs, as a browser does with a tab that is closed."""

    def __init__(self, client: httpx.AsyncClient, page: Page) -> None:
        self.page = page
        self.session = uuid.uuid4().hex
        self._client = client
        self._arrived: defaultdict[str, asyncio.Queue[dict[str, Any]]] = defaultdict(asyncio.Queue)
        self._open = 0  # events that are not over yet
        self._closed = False
        self._reader: asyncio.Task[None] | None = None
        self._alive = asyncio.create_task(self._hold(f"{API}/heartbeat/{self.session}"))

    async def close(self) -> None:
        self._closed = True
        self._deliver({"msg": "closed"})
        for task in filter(None, (self._reader, self._alive)):
            task.cancel()
            with suppress(asyncio.CancelledError, httpx.HTTPError):
                await task

    async def upload(self, content: bytes, name: str) -> dict[str, Any]:
        """A file in the box, as the browser sends it along."""
        sent = await self._client.post(f"{API}/upload", files={"files": (name, content)})
        sent.raise_for_status()
        return {"path": sent.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    async def run(
        self, chain: list[int], data: list[Any], *, about: Any = None, look: Look = lambda outputs: None
    ) -> Heard:
        """Start the first event with `data` and the others after it; `look` sees the outputs of each as they change.

        `about` is what else the first event brings along.
        """
        heard = Heard()
        for event in chain:
            if not self._closed:
                sent = data if event == chain[0] else [None] * self.page.inputs[event]
                await self._one(event, sent, about if event == chain[0] else None, heard, look)
        return heard

    async def _one(self, event: int, data: list[Any], about: Any, heard: Heard, look: Look) -> None:
        self._open += 1
        asked = {"data": data, "event_data": about, "fn_index": event, "session_hash": self.session, "trigger_id": None}
        try:
            joined = await self._client.post(f"{API}/queue/join", json=asked)
            joined.raise_for_status()
            if self._closed:
                return
            if self._reader is None or self._reader.done():
                self._reader = asyncio.create_task(self._read())
            await self._listen(joined.json()["event_id"], heard, look)
        except httpx.HTTPError as error:
            heard.faults.append(f"event {event} cannot be started: {error!r}")
        finally:
            self._open -= 1

    async def _listen(self, event_id: str, heard: Heard, look: Look) -> None:
        """Until the event is over."""
        outputs: list[Any] | None = None
        while True:
            message = await self._arrived[event_id].get()
            match message["msg"]:
                case "log" if message["level"] == "warning":
                    heard.told.append(message["log"])
                case "process_generating" if message["success"]:
                    arrived = message["output"]["data"]
                    outputs = arrived if outputs is None else [*map(apply_diff, outputs, arrived)]
                    look(outputs)
                case "process_completed":
                    heard.outputs = message["output"].get("data") or []
                    if not message["success"]:
                        heard.faults.append(str(message["output"].get("error")))
                    del self._arrived[event_id]
                    return
                case "unexpected_error":
                    heard.faults.append(str(message["message"]))
                    return
                case "closed":
                    return

    async def _read(self) -> None:
        """Hand out the messages of the session's stream, which the server ends whenever nothing is left to wait for."""
        where = {"session_hash": self.session}
        try:
            while self._open:
                async with self._client.stream("GET", f"{API}/queue/data", params=where) as stream:
                    async for line in stream.aiter_lines():
                        if line.startswith("data:"):
                            self._deliver(json.loads(line.removeprefix("data:")))
        except httpx.HTTPError as error:
            self._deliver({"msg": "unexpected_error", "message": f"the stream broke off: {error!r}"})

    def _deliver(self, message: dict[str, Any]) -> None:
        """To the event it is for, or to all that are not over."""
        identifier = message.get("event_id")
        for arrived in [self._arrived[identifier]] if identifier else list(self._arrived.values()):
            arrived.put_nowait(message)

    async def _hold(self, path: str) -> None:
        async with self._client.stream("GET", path, timeout=None) as stream:
            async for _ in stream.aiter_lines():
                pass
