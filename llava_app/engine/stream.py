"""From token ids, one at a time, to text that can be shown at once."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# Tokens that stay in the window after it has moved: enough that the tokenizer treats the next one as the middle of a
# text (Llama's drops the space before the first token of whatever it decodes).
KEPT = 4
WINDOW = 16


class TextStream:
    """Decodes a growing answer. Joined, the texts of all `push` and of `flush` are the tokenizer's own decoding.

    `before`: tokens in front of the answer, so that it is decoded as their continuation, with the space between them.
    Only a short window is decoded for each token, so that the cost does not grow with the answer. Characters whose
    bytes have not all come yet are held back; everything else, CJK and spaces included, is handed out at once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(before[-KEPT:])
        self._shown = len(self._decode(self._window))  # characters of the window's text that were handed out

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete and for special tokens."""
        self._window.append(token)
        text = self._decode(self._window)
        # A tokenizer with byte fallback decodes a whole run of bytes as broken while its last character is incomplete,
        # so nothing of such a text may be counted on.
        if text.endswith("\ufffd"):
            return ""
        new = text[self._shown :]
        self._shown = len(text)
        self._move(text)
        return new

    def flush(self) -> str:
        """What was held back, when no more tokens come: broken characters as U+FFFD."""
        return self._decode(self._window)[self._shown :]

    def _move(self, text: str) -> None:
        """Shorten the window where that provably changes nothing: the rest must decode as it did within the whole."""
        if len(self._window) < WINDOW:
            return
        rest = self._decode(self._window[-KEPT:])
        if rest and text.endswith(rest):
            self._window = self._window[-KEPT:]
            self._shown = len(rest)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopText:
    """Lets an answer through up to the first of some stop texts, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.reached = False

    def push(self, text: str) -> str:
        """The text that can be shown. After a stop text is `reached`, nothing can."""
        if self.reached:
            return ""
        waiting = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := waiting.find(stop)) >= 0]
        if ends:
            self.reached, self._held = True, ""
            return waiting[: min(ends)[1]]
        held = max((_begun(waiting, stop) for stop in self._stops), default=0)
        self._held = waiting[len(waiting) - held :]
        return waiting[: len(waiting) - held]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
