"""One answer as a server streams it, taken apart into the pieces of an answer."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import openai

from llava_app.engine import Piece

AFTERWARDS = 1.0  # s that the count of tokens may come later than the end of the answer
MOST_SAID = 1_000_000  # bytes in place of a stream
LONG_TOKEN = 16  # characters; no text has more to a token on average


class Reading:
    """Puts out pieces as they come, the last one with its finish."""

    def __init__(self, put: Callable[[Piece], None], max_new_tokens: int) -> None:
        """Of a server that does not keep to `max_new_tokens` no more is read than so many tokens can hold."""
        self._put = put
        self._room = LONG_TOKEN * max_new_tokens  # characters that may still come
        self.phase = "queued"  # as that of a Piece
        self._finish: str | None = None
        self._parts = 0  # of the text; a token each with most servers
        self._tokens = 0  # as the server counts them; 0 before it says

    async def read(self, stream: openai.AsyncStream[Any]) -> None:
        """Read to the end. Raises openai.APIError when it breaks off before, or another error for what is not of the
        protocol."""
        self.phase = "reading"
        self._put(Piece("", phase=self.phase))
        async with stream:
            await _check_kind(stream)
            try:
                await self._chunks(stream)
            except (TimeoutError, openai.APIError):
                if not self._finish:  # after it nothing is missed but the count
                    raise
        if not self._finish and not (self._parts and _has_ended(stream)):
            raise openai.APIConnectionError(request=stream.response.request)
        self._put(Piece("", self._finish or "stop", self._tokens or self._parts))

    async def _chunks(self, stream: openai.AsyncStream[Any]) -> None:
        """Take what comes until the stream ends, or raise TimeoutError AFTERWARDS after the finish."""
        async with asyncio.timeout(None) as patience:
            async for chunk in stream:
                if chunk.usage:
                    self._tokens = chunk.usage.completion_tokens or 0
                if not self._finish and self._take(chunk.choices):
                    patience.reschedule(asyncio.get_running_loop().time() + AFTERWARDS)
                if not self._room:
                    break

    def _take(self, choices: list[Any]) -> bool:
        """Put out the text of a chunk; returns whether it is the last one."""
        for choice in choices:
            text = choice.delta.content or ""
            if text and self.phase == "reading":
                text, self.phase = text.removeprefix(" "), "writing"  # the space after the role, as in the local engine
            text = text[: self._room]
            if text:
                self._parts, self._room = self._parts + 1, self._room - len(text)
                self._put(Piece(text, tokens=self._tokens or self._parts))
            if choice.finish_reason or not self._room:
                self._finish = "length" if choice.finish_reason == "length" or not self._room else "stop"
        return bool(self._finish)


def _has_ended(stream: openai.AsyncStream[Any]) -> bool:
    """Whether the server itself has ended a stream that is over: where nothing marks the end of a body, a server that
    died would look the same."""
    return not {"transfer-encoding", "content-length"}.isdisjoint(stream.response.headers)


async def _check_kind(stream: openai.AsyncStream[Any]) -> None:
    """Raise what a server says in place of a stream, with code 200: openai.APIError, or ValueError for anything else
    that is no stream."""
    response = stream.response
    if "json" not in response.headers.get("content-type", ""):
        return
    body = b""
    try:
        async for part in response.aiter_bytes():
            body += part
            if len(body) > MOST_SAID:
                break
    except Exception as error:  # of httpx or httpx2, as the version of openai is
        raise openai.APIConnectionError(request=response.request) from error
    said = json.loads(body)["error"]
    told = {"code": 400} | (said if isinstance(said, dict) else {"message": said})
    raise openai.APIError("no stream", response.request, body=told)
