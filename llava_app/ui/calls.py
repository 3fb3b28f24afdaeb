"""The page's own Blocks: what a call of an event passes before it is queued, and what is kept of a tab."""

import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import gradio as gr
from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from gradio.blocks import BlockFunction
from gradio.data_classes import PredictBodyInternal
from gradio.route_utils import FnIndexInferError
from gradio.state_holder import SessionState
from gradio_client.utils import is_file_obj, is_file_obj_with_meta, is_http_url_like, traverse
from starlette.responses import JSONResponse, Response

from llava_app.errors import BusyError
from llava_app.limits import LOCAL
from llava_app.ui.door import NO_ERRANDS, visitor
from llava_app.ui.tabs import Tabs

NO_EVENT = "There is no such event. Load the page anew."
NOT_TAKEN = "This is not what the page sends here. Load it anew and try again."
LOST = "This tab slept for too long, and the page forgot it. Load it anew: your conversations come back."
MOST_LEFT = 50  # closed tabs whose contents are kept
STILL_ENDING = timedelta(seconds=10)  # in which a closed tab's answer comes to its end
LONGEST_SESSION = 64  # characters of its name, which is kept; the page's own have 11
# After each event Gradio would make a pandas table of the last 10,000 for a page of statistics that nobody sees: 7 ms
# each time, and pyarrow, which pandas stores text with, held on to 350 MB for it after two minutes of fifty visitors.
NO_STATISTICS = {"GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000000000", "GRADIO_ANALYTICS_MAX_EVENTS": "1"}
DEEPEST = 20  # lists and objects within each other, of what comes along with an event

logger = logging.getLogger(__name__)


class _Nothing(dict[int, Any]):
    """What Gradio would keep of a tab: 0.4 MB about each component and the pictures that it shows, for links to a
    state of the page (gr.DeepLinkButton), which this page has not. It keeps the last 500 tabs, open or not."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: int) -> dict[str, Any]:
        return {}

    def __setitem__(self, key: int, value: Any) -> None:
        pass


NOTHING = _Nothing()


class Page(gr.Blocks):
    """Blocks that refuse a call that no event takes, where Gradio would fail with a trace.

    And that fetch nothing: where a file is wanted and an address is sent, Gradio would download from there.
    """

    def __init__(self, *, tabs: int = LOCAL.tabs, **how: Any) -> None:
        """`tabs`: how many a visitor may have open."""
        self._left: OrderedDict[str, datetime] = OrderedDict()
        self._tabs = Tabs(tabs)
        super().__init__(**how)

    def queue(self, **how: Any) -> "Page":
        """As Blocks do it; from now on calls are checked, after the login and before anything of them is kept."""
        os.environ.update(NO_STATISTICS)
        super().queue(**how)
        push = self._queue.push

        async def checked(body: PredictBodyInternal, request: Request, username: str | None) -> Any:
            event = self.fns.get(-1 if body.fn_index is None else body.fn_index)
            if event is None or event.fn is None:  # the latter are the browser's own
                raise HTTPException(404, NO_EVENT)
            if isinstance(body.event_data, dict):
                body.event_data.pop("value", None)  # of an example with its files; handlers ask for its index
            if not _takes(event, body):
                raise HTTPException(400, NOT_TAKEN)
            if body.session_hash is not None:
                self._admit(event, body.session_hash, visitor(gr.Request(request, username)))
            return await push(body, request, username)

        self._queue.push = checked
        return self

    def left(self, request: gr.Request) -> None:
        """Note that the tab of this request was closed, and forget the one that was closed longest ago.

        Gradio keeps what is in closed tabs, pictures too, for an hour or until 500 others were opened. A few are kept:
        one whose connection broke may come back.
        """
        self._left[request.session_hash or ""] = datetime.now()
        self._tabs.leave(request.session_hash or "")
        while len(self._left) > MOST_LEFT:
            tab, when = self._left.popitem(last=False)
            if self.state_holder.time_last_used.get(tab, when) - when < STILL_ENDING:  # else it came back
                self._tabs.lose(tab, self.state_holder)

    async def preprocess_data(
        self, block_fn: BlockFunction, inputs: list[Any], state: SessionState | None, *rest: Any
    ) -> list[Any]:
        """The inputs of an event, as its handler takes them. Raises gr.Error for what cannot be one."""
        if state is not None:
            state.config_values = NOTHING
        try:
            traverse(inputs, _no_address, is_file_obj_with_meta)
            return await super().preprocess_data(block_fn, inputs, state, *rest)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception as error:  # the components raise anything from TypeError to pydantic's own
            logger.warning("A call of %s brought what it does not take (%s).", block_fn.api_name, type(error).__name__)
            raise gr.Error(NOT_TAKEN, print_exception=False) from error

    async def process_api(
        self, *given: Any, session_hash: str | None = None, event_id: str | None = None, **how: Any
    ) -> Any:
        """As Blocks do it. What is kept of a call without a session is the first to go when room is needed."""
        try:
            return await super().process_api(*given, session_hash=session_hash, event_id=event_id, **how)
        finally:
            if session_hash == event_id and session_hash in self.state_holder.session_data:
                self.state_holder.session_data.move_to_end(session_hash, last=False)

    def _admit(self, event: BlockFunction, tab: str, visitor: str) -> None:
        """Raises HTTPException for a tab too many, and for one that is lost, unless it is its clock that calls."""
        try:
            self._tabs.enter(tab, visitor, self.state_holder)
        except BusyError as error:
            raise HTTPException(429, str(error)) from error
        if self._tabs.is_lost(tab) and not any(kind == "tick" for _, kind in event.targets):
            raise HTTPException(409, LOST)


def _takes(event: BlockFunction, call: PredictBodyInternal) -> bool:
    return (
        len(call.data) >= len(event.inputs)
        and (isinstance(call.event_data, dict) or not event.collects_event_data)
        and _is_plain(call.event_data)
        and len(call.session_hash or "") <= LONGEST_SESSION
        and not call.batched
    )


def _is_plain(data: Any, within: int = 0) -> bool:
    """Whether there are no files in it, and only a few lists and objects within each other."""
    parts = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return within < DEEPEST and not is_file_obj(data) and all(_is_plain(part, within + 1) for part in parts)


def _no_address(file: dict[str, Any]) -> dict[str, Any]:
    if is_http_url_like(str(file["path"]).lower()):
        raise gr.Error(NO_ERRANDS, print_exception=False)
    return file


def _refusal(code: int, text: str) -> Callable[..., Response]:
    return lambda *_: JSONResponse({"detail": text}, code)


def _busy(_: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 429)


# What Gradio and FastAPI raise, the latter's own answer being a fault where the body holds NaN, and our passwords.
HANDLERS: dict[Any, Callable[..., Response]] = {
    FnIndexInferError: _refusal(404, NO_EVENT),
    RequestValidationError: _refusal(400, NOT_TAKEN),
    BusyError: _busy,
}
