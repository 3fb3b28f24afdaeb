"""A browser without a screen: it sends what it likes to the events of the page, by HTTP."""

import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

from tests.serving import PATIENCE

Event = dict[str, Any]


@dataclass
class Outcome:
    """How an event ended."""

    success: bool = False
    data: list[Any] = field(default_factory=list)  # its outputs at the end
    told: list[str] = field(default_factory=list)  # warnings and hints
    error: str | None = None
    everything: str = ""  # each word that came back

    @property
    def words(self) -> str:
        """What a person is told of it."""
        return " ".join([*self.told, self.error or ""])


class Visitor:
    """One tab, from an address of its own."""

    def __init__(self, address: str, host: str = "203.0.113.1") -> None:
        headers = {"X-Forwarded-For": host, "Connection": "close"}
        self.host = host
        self.http = httpx.Client(base_url=address, headers=headers, timeout=PATIENCE)
        self.session = secrets.token_hex(8)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    @property
    def config(self) -> dict[str, Any]:
        return self.http.get("config").json()

    def event(self, name: str) -> Event:
        """The first event that calls the handler of this name."""
        return next(event for event in self.config["dependencies"] if event["api_name"] == name)

    def component(self, identifier: str) -> dict[str, Any]:
        """The component with this id in the page."""
        found = (part for part in self.config["components"] if part["props"].get("elem_id") == identifier)
        return next(found)

    def upload(self, *files: Path) -> list[dict[str, Any]]:
        """The files as an event takes them."""
        sent = [("files", (file.name, file.read_bytes())) for file in files]
        answer = self.http.post("gradio_api/upload", files=sent).raise_for_status()
        return [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in answer.json()]

    def call(self, event: Event | str, data: list[Any], **body: Any) -> Outcome:
        """Send `data` to the event and wait for its end."""
        event = self.event(event) if isinstance(event, str) else event
        asked = {"fn_index": event["id"], "data": data, "session_hash": self.session} | body
        answer = self.http.post("gradio_api/queue/join", json=asked)
        if answer.status_code != 200:
            return Outcome(error=answer.text, everything=answer.text)
        return self._listen(answer.json()["event_id"])

    def ask(self, question: str, files: list[Any] | None = None, *, model: str | None = None) -> Outcome:
        """Ask as the page does; the outcome is that of the event that streams the answer."""
        event = self.event("send")
        data: list[Any] = [{"text": question, "files": files or []}, None, None, model]
        data += self.settings()
        sent = self.call(event, data)
        answered = self.call(self.after(event), [None, None])
        answered.told = sent.told + answered.told
        answered.error = sent.error or answered.error
        answered.everything = sent.everything + answered.everything
        self.call("settle", [None, None])
        return answered

    def after(self, event: Event) -> Event:
        """The event that follows this one by itself."""
        return next(later for later in self.config["dependencies"] if later["trigger_after"] == event["id"])

    def settings(self) -> list[Any]:
        """The settings as a fresh page has them."""
        parts = {part["id"]: part for part in self.config["components"]}
        return [parts[number]["props"].get("value") for number in self.event("send")["inputs"][4:]]

    def _listen(self, event_id: str) -> Outcome:
        outcome = Outcome()
        with self.http.stream("GET", "gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                if not line.startswith("data:"):
                    continue
                outcome.everything += line
                said = json.loads(line.removeprefix("data:"))
                if said.get("event_id") != event_id:
                    continue
                if said["msg"] == "log":
                    outcome.told.append(said["log"])
                if said["msg"] == "process_completed":
                    outcome.success = said["success"]
                    outcome.data = said["output"].get("data") or []
                    outcome.error = None if said["success"] else str(said["output"].get("error"))
                    return outcome
        return outcome
