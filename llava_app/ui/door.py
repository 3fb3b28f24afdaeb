"""What every request passes before Gradio sees it: bounds on its size and number, and no errands for strangers."""

from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

import gradio as gr
from gradio_client.utils import is_file_obj_with_meta, is_http_url_like, traverse

from llava_app.limits import Limits, Rate

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

ERRANDS = (
    "/file=http:",
    "/file=https:",
    "/file/http:",
    "/file/https:",
    "/proxy=",
)  # Gradio would fetch these addresses for whoever asks
NO_ERRANDS = "This page fetches nothing from other addresses. Upload the file itself."


class Door:
    """ASGI middleware that answers what goes too far itself: 403, 413 or 429 and one sentence."""

    def __init__(self, app: Application, limits: Limits) -> None:
        self._app = app
        self._limits = limits
        self._rate = Rate(limits.requests)
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._refuse(scope) if scope["type"] == "http" else None
        if refused:
            await _answer(send, *refused)
            return
        address = _address(scope)
        self._open[address] += 1
        try:
            await self._let_in(scope, receive, send)
        finally:
            self._open[address] -= 1
            if not self._open[address]:
                del self._open[address]

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(receive, send, most=self._limits.body)
        with suppress(_TooLargeError):
            await self._app(scope, body.receive, body.send)
        if body.is_too_large and not body.is_answered:
            await _answer(send, 413, self._too_large())

    def _refuse(self, scope: Scope) -> tuple[int, str] | None:
        """The code and the sentence for a request that can be refused by what stands above its body."""
        if any(errand in scope["path"].lower() for errand in ERRANDS):
            return 403, NO_ERRANDS
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._limits.body:
            return 413, self._too_large()
        if self._open[_address(scope)] >= self._limits.open:
            return 429, f"{self._limits.open:,} requests of yours are open, which is the limit. Close some tabs."
        seconds = self._rate.wait(_address(scope)) if scope["method"] == "POST" else 0
        if seconds:
            return 429, f"More than {self._limits.requests:,} requests in a minute. Go on in {seconds:.0f} seconds."
        return None

    def _too_large(self) -> str:
        return f"This is larger than {self._limits.body / 1e6:,.0f} MB, which is the limit. Send less at once."


class _TooLargeError(Exception):
    """A body went on beyond the limit, whatever its length was said to be."""


class _Body:
    """Counts what arrives; what the application says of a body that it never had whole is not sent."""

    def __init__(self, receive: Receive, send: Send, *, most: int) -> None:
        self._receive = receive
        self._send = send
        self._left = most
        self.is_too_large = False
        self.is_answered = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        self.is_too_large = self._left < 0
        if self.is_too_large:
            raise _TooLargeError
        return message

    async def send(self, message: Message) -> None:
        if self.is_answered or not self.is_too_large:
            self.is_answered = True
            await self._send(message)


class Page(gr.Blocks):
    """Blocks that fetch nothing: where a file is wanted and an address is sent, Gradio would download from there."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **named: Any) -> list[Any]:
        """The inputs of an event, as its handler takes them."""
        traverse(inputs, _no_address, is_file_obj_with_meta)
        return await super().preprocess_data(block_fn, inputs, *rest, **named)


def visitor(request: gr.Request | None) -> str:
    """Who asks: the name of a person who logged in, else the address; "" for a program in this process."""
    if request is None or request.request is None:
        return ""
    return request.username or (request.client.host if request.client else "")


def _no_address(file: dict[str, Any]) -> dict[str, Any]:
    if is_http_url_like(str(file["path"]).lower()):
        raise gr.Error(NO_ERRANDS, print_exception=False)
    return file


def _address(scope: Scope) -> str:
    return scope["client"][0] if scope.get("client") else ""


async def _answer(send: Send, code: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
