"""What every request passes before Gradio sees it: whence it may come, bounds on its size and number, and no errands
for strangers. And what every answer tells the browser."""

from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

import gradio as gr
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response

from llava_app.limits import Limits, Rate, network
from llava_app.passwords import ADDRESS
from llava_app.ui import origins

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

# Further ways to call an event, without the queue or by the names of its arguments, that fail with a trace.
BYWAYS = ("/gradio_api/run/", "/gradio_api/api/", "/gradio_api/call/v2/", "/gradio_api/component_server")
# Gradio would fetch these addresses for whoever asks.
ERRANDS = ("/file=http:", "/file=https:", "/file/http:", "/file/https:", "/proxy=")
NO_ERRANDS = "This page fetches nothing from other addresses. Upload the file itself."
# No picture is ever fetched from elsewhere, and nothing is framed, whatever an answer or a question contains.
POLICY = (
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; "
    "frame-src 'none'; base-uri 'self'; form-action 'self'"
)


class Door:
    """ASGI middleware that answers what goes too far itself: 403, 413 or 429 and one sentence."""

    def __init__(self, app: Application, limits: Limits) -> None:
        self._app = app
        self._limits = limits
        self._rate = Rate(limits.requests)
        self._sent = Rate(limits.sent)
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        send = _with_policy(send)
        refused = self._refuse(scope) if scope["type"] == "http" else None
        if refused:
            await _answer(scope, *refused)(scope, receive, send)
            return
        address = _address(scope)
        ADDRESS.set(address)
        self._open[address] += 1
        try:
            await self._let_in(scope, receive, send)
        finally:
            self._open[address] -= 1
            if not self._open[address]:
                del self._open[address]

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(receive, send, refuse=self._counted(_address(scope)))
        with suppress(_RefusedError, ClientDisconnect):  # who hangs up in the middle is no fault
            await self._app(scope, body.receive, body.send)
        if body.refused and not body.is_answered:
            await _answer(scope, *body.refused)(scope, receive, send)

    def _refuse(self, scope: Scope) -> tuple[int, str] | None:
        """The code and the sentence for a request that can be refused by what stands above its body."""
        foreign = origins.refusal(scope)
        if foreign:
            return 403, foreign
        if any(errand in scope["path"].lower() for errand in ERRANDS):
            return 403, NO_ERRANDS
        if any(way in scope["path"] for way in BYWAYS):
            return 404, "Programs call /gradio_api/call/ask here."
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._limits.body:
            return 413, self._too_large()
        if self._open[_address(scope)] >= self._limits.open:
            return 429, f"{self._limits.open:,} requests of yours are open, which is the limit. Close some tabs."
        seconds = self._rate.wait(_address(scope)) if scope["method"] == "POST" else 0
        if seconds:
            return 429, f"More than {self._limits.requests:,} requests in a minute. Go on in {seconds:.0f} seconds."
        return None

    def _counted(self, address: str) -> Callable[[int], tuple[int, str] | None]:
        """What counts the bytes of one request: the code and the sentence once there are too many."""
        left = self._limits.body

        def refuse(size: int) -> tuple[int, str] | None:
            nonlocal left
            left -= size
            if left < 0:
                return 413, self._too_large()
            seconds = self._sent.wait(address, size) if size else 0
            if seconds:
                most = f"{self._limits.sent / 1e6:,.0f} MB"
                return 429, f"You sent more than {most} within a minute. Go on in {seconds:.0f} seconds."
            return None

        return refuse

    def _too_large(self) -> str:
        return f"This is larger than {self._limits.body / 1e6:,.0f} MB, which is the limit. Send less at once."


class _RefusedError(Exception):
    """A body went on beyond a limit, whatever its length was said to be."""


class _Body:
    """Counts what arrives; what the application says of a body that it never had whole is not sent."""

    def __init__(self, receive: Receive, send: Send, *, refuse: Callable[[int], tuple[int, str] | None]) -> None:
        self._receive = receive
        self._send = send
        self._refuse = refuse
        self.refused: tuple[int, str] | None = None
        self.is_answered = False

    async def receive(self) -> Message:
        message = await self._receive()
        self.refused = self.refused or self._refuse(len(message.get("body", b"")))
        if self.refused:
            raise _RefusedError
        return message

    async def send(self, message: Message) -> None:
        if self.is_answered or not self.refused:
            self.is_answered = True
            await self._send(message)


def visitor(request: gr.Request | None) -> str:
    """Who asks: the name of a person who logged in, else the address; "" for a program in this process."""
    if request is None or request.request is None:
        return ""
    return request.username or (network(request.client.host) if request.client else "")


def _with_policy(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            told = (b"content-security-policy", POLICY.encode())
            message = {**message, "headers": [*message.get("headers", ()), told]}
        await send(message)

    return sending


def _address(scope: Scope) -> str:
    return network(scope["client"][0]) if scope.get("client") else ""


def _answer(scope: Scope, code: int, text: str) -> Response:
    """The page shows what came with an event as JSON, and what came with an upload as it stands."""
    is_event = scope["path"].endswith("/queue/join")
    kind, content = (JSONResponse, {"detail": text}) if is_event else (PlainTextResponse, text)
    return kind(content, code, {"connection": "close"})
