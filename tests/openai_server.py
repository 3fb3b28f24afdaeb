"""A server in this process that speaks the OpenAI chat protocol and fails when told to.

    asked = []
    with openai_server(["first answer", Status(429, retry_after=0.1), "from now on"], asked) as url:
        client = OpenAI(base_url=url, api_key="none")

`replies` are given in order and the last one is repeated; a function of the request's JSON decides by itself.
Every request's JSON is appended to `asked`. A token is a word.
"""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Status:
    """An error of the protocol: 429, 500, 401 …; `retry_after` in seconds and `location` go into the headers of these
    names; `body` stands in place of the protocol's."""

    code: int
    retry_after: float | None = None
    message: str = "scripted fault"
    body: str | None = None
    location: str | None = None


@dataclass(frozen=True)
class Slow:
    """An answer that comes after `seconds`: past the client's timeout it is a timeout."""

    seconds: float
    text: str = "too late"


@dataclass(frozen=True)
class Cut:
    """The connection ends in the middle of the answer, streamed or not."""

    text: str = "this answer is never finished"


@dataclass(frozen=True)
class Broken:
    """A reply with status 200 whose body is this: not JSON, or not the protocol's."""

    body: str = '{"choices": [{"message": {"con'


@dataclass(frozen=True)
class Long:
    """An answer that the token limit ended: its finish reason is "length"."""

    text: str


Reply = str | Status | Slow | Cut | Broken | Long
Replies = Sequence[Reply] | Callable[[dict[str, Any]], Reply]


@contextmanager
def openai_server(
    replies: Replies,
    asked: list[dict[str, Any]] | None = None,
    *,
    models: Sequence[str] = ("scripted",),
    listing: threading.Event | None = None,
) -> Iterator[str]:
    """Serve on a free port and list `models`, not before `listing`; gives the base URL, which ends in /v1."""
    server = _Server(replies, [] if asked is None else asked, models, listing)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    def __init__(
        self, replies: Replies, asked: list[dict[str, Any]], models: Sequence[str], listing: threading.Event | None
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies = replies
        self.asked = asked
        self.models = models
        self.listing = listing
        self.closing = threading.Event()
        self.lock = threading.Lock()

    def reply_to(self, request: dict[str, Any]) -> Reply:
        with self.lock:
            self.asked.append(request)
            number = len(self.asked) - 1
        return self.replies(request) if callable(self.replies) else self.replies[min(number, len(self.replies) - 1)]

    def handle_error(self, *_: object) -> None:
        """Clients that went away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        if self.server.listing:
            self.server.listing.wait()
        self._send(200, {"object": "list", "data": [{"id": model, "object": "model"} for model in self.server.models]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = self.server.reply_to(request)
        if isinstance(reply, Status):
            retry = {} if reply.retry_after is None else {"Retry-After": str(reply.retry_after)}
            elsewhere = {} if reply.location is None else {"Location": reply.location}
            said = reply.body or {"error": {"message": reply.message, "type": "scripted"}}
            self._send(reply.code, said, retry | elsewhere)
        elif isinstance(reply, Broken):
            kind = "text/event-stream" if reply.body.startswith("data:") else "application/json"
            self._send(200, reply.body, {"Content-Type": kind})
        else:
            self._answer(request, reply)

    def _answer(self, request: dict[str, Any], reply: str | Slow | Cut | Long) -> None:
        if isinstance(reply, Slow):
            self.server.closing.wait(reply.seconds)
        text = reply if isinstance(reply, str) else reply.text
        cut, finish = isinstance(reply, Cut), "length" if isinstance(reply, Long) else "stop"
        if request.get("stream"):
            self._stream(request, text, finish, cut=cut)
        else:
            message = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
            self._send(200, _envelope("chat.completion", message) | {"usage": _usage(request, text)}, cut=cut)

    def _stream(self, request: dict[str, Any], text: str, finish: str, *, cut: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        words = text.split(" ")
        pieces = [word if place == 0 else f" {word}" for place, word in enumerate(words)]
        for piece in pieces[: len(pieces) // 2] if cut else pieces:
            self._event(_envelope("chat.completion.chunk", {"index": 0, "delta": {"content": piece}}))
        if cut:
            self.close_connection = True
            return
        self._event(_envelope("chat.completion.chunk", {"index": 0, "delta": {}, "finish_reason": finish}))
        if (request.get("stream_options") or {}).get("include_usage"):
            self._event(_envelope("chat.completion.chunk", None) | {"usage": _usage(request, text)})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, body: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps(body)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _send(
        self, code: int, body: dict[str, Any] | str, headers: dict[str, str] | None = None, *, cut: bool = False
    ) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(code)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut

    def log_message(self, *_: object) -> None:
        """Nothing: the requests are in `asked`."""


def _envelope(kind: str, choice: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "id": "scripted",
        "object": kind,
        "created": 0,
        "model": "scripted",
        "choices": [] if choice is None else [choice],
    }


def _usage(request: dict[str, Any], text: str) -> dict[str, int]:
    prompt = sum(_words(message["content"]) for message in request["messages"])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": len(text.split()),
        "total_tokens": prompt + len(text.split()),
    }


def _words(content: str | list[dict[str, Any]]) -> int:
    if isinstance(content, str):
        return len(content.split())
    return sum(_words(part.get("text", "")) for part in content)
