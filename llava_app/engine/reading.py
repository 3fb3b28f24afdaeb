"""One answer as a server streams it, taken apart into the pieces of an answer."""

import asyncio
from collections.abc import Callable
from typing import Any

import openai

from llava_app.engine import Piece

AFTERWARDS = 1.0  # s that the count of tokens may come later than the end of the answer
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
            try:
                await self._chunks(stream)
            except (TimeoutError, openai.APIError):
                if not self._finish:  # after it nothing is missed but the count
                    raise
        if not self._finish:
            raise openai.APIConnectionError(request=stream.response.request)
        self._put(Piece("", self._finish, self._tokens or self._parts))

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
