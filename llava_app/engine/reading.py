"""One answer as a server streams it, taken apart into the pieces of an answer."""

from collections.abc import Callable
from typing import Any

import openai

from llava_app.engine import Piece


class Reading:
    """Puts out pieces as they come, the last one with its finish."""

    def __init__(self, put: Callable[[Piece], None]) -> None:
        self._put = put
        self.phase = "queued"  # as that of a Piece

    async def read(self, stream: openai.AsyncStream[Any]) -> None:
        """Read to the end. Raises openai.APIError when it breaks off before, or another error for what is not of the
        protocol."""
        self.phase = "reading"
        self._put(Piece("", phase=self.phase))
        finish = None
        async with stream:
            async for chunk in stream:
                tokens = chunk.usage.completion_tokens if chunk.usage else 0
                for choice in chunk.choices:
                    text = choice.delta.content or ""
                    if text and self.phase == "reading":
                        # The space after the role is left out, as in the local engine.
                        text, self.phase = text.removeprefix(" "), "writing"
                    finish = choice.finish_reason and ("length" if choice.finish_reason == "length" else "stop")
                    if text or finish:
                        self._put(Piece(text, finish, tokens))
        if not finish:
            raise openai.APIConnectionError(request=stream.response.request)
