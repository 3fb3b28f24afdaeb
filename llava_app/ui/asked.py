"""What one tab of the page is waiting for: a question, and its answer as it grows.

It lies in a gr.State of the tab and is changed in place. The event that streams an answer has the Chatbot as its only
output, because Gradio builds and describes every other output anew with each piece; the rest waits here until the end.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_app.engine import Sampling
from llava_app.limits import Limits, bounded
from llava_app.ui.display import Talk
from llava_app.ui.files import open_files

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0  # s between two pieces for a browser that cannot draw them as they come


@dataclass
class Asked:
    """A question that is to be answered, and how far that has come."""

    talk: Talk  # with its last turn open
    before: Talk  # what to go back to when it fails
    box: dict[str, Any] | None  # what to put back into the box then; None leaves the box alone
    model: str | None
    sampling: Sampling
    image_mode: str  # as in `images.framed`
    so_far: Talk  # what to keep if nothing more came
    is_begun: bool = False
    is_stopped: bool = False
    is_over: bool = False
    has_failed: bool = False  # and left nothing

    def fail(self) -> None:
        """Keep what was written in answer to a new question, marked as broken off; else go back to what was before."""
        so_far, before = self.so_far.conversation.turns, self.before.conversation.turns
        if len(so_far) > len(before) and so_far[-1].answer:
            self.so_far = self.so_far.broken_off()
        else:
            self.so_far, self.has_failed = self.before, True


class Tab:
    """At most one question at a time. Whoever takes it away (another conversation, undo) thereby ends its answer."""

    def __init__(self) -> None:
        self.asked: Asked | None = None
        self._pause = 0.0  # s between two pieces; 0 as long as the browser draws them as they come
        self._next = 0.0  # when the next one may be drawn, on the monotonic clock

    @property
    def is_answering(self) -> bool:
        """Whether an answer is coming that nobody stopped."""
        asked = self.asked
        return asked is not None and asked.is_begun and not asked.is_over and not asked.is_stopped

    def begin(self, talk: Talk) -> Asked | None:
        """The question to answer now, if `talk`, which the tab shows, is where it was asked."""
        asked = self.asked
        if asked is None or asked.is_begun or asked.so_far != talk:
            return None
        asked.is_begun = True
        self._pause = self._pause / 2 if self._pause > FIRST_PAUSE else 0.0  # what held it up may be over
        return asked

    def wants(self, asked: Asked) -> bool:
        """Whether the answer to `asked` is still waited for."""
        return self.asked is asked and not asked.is_stopped

    def slow(self, late: float) -> None:
        """The browser is `late` seconds behind: it gets no piece until it has caught up, and fewer from then on."""
        self._pause = min(2 * self._pause or FIRST_PAUSE, LONGEST_PAUSE)
        self._next = time.monotonic() + min(late, LONGEST_PAUSE)

    def draws(self) -> bool:
        """Whether the browser is to draw what there is now; otherwise the next piece has it too."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._pause
        return True

    def stop(self) -> None:
        """End the answer; what was written stays."""
        if self.asked:
            self.asked.is_stopped = True

    def leave(self, talk: Talk) -> Talk:
        """Wait for nothing any more; `talk`, which the tab shows, with what was written."""
        asked, self.asked = self.asked, None
        return asked.so_far if asked and asked.so_far.key == talk.key else talk


def ask(talk: Talk, question: str, files: Sequence[str], limits: Limits) -> Talk:
    """The talk with this question and these uploaded files. Raises UserError."""
    return talk.ask(bounded(question, limits), open_files(files, limits))
