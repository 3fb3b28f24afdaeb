"""Calls of events that there are not, and of events that there are with what they do not take."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava_app.ui.calls import LONGEST_SESSION, NO_EVENT, NOT_TAKEN
from tests.security.conftest import Public
from tests.security.visitor import Visitor

DEEP: Any = json.loads("[" * 400 + "]" * 400)
STRANGE = (None, 7, True, "x", [[None]], {}, {"path": 7})
REFUSED_BESIDE = ({"path": "a", "meta": 7}, [{"path": "/etc/passwd"}], DEEP)  # the values, but not among them


@pytest.fixture
def log(public: Public) -> Any:
    """What the page has logged since the test began."""
    before = len(public.log)
    return lambda: public.log[before:]


@pytest.mark.parametrize("number", [9999, -1])
def test_an_event_that_there_is_not_is_not_found(visitor: Visitor, log: Any, number: int) -> None:
    body = {"fn_index": number, "data": [], "session_hash": visitor.session}
    answer = visitor.http.post("gradio_api/queue/join", json=body)
    assert (answer.status_code, answer.json()["detail"]) == (404, NO_EVENT)
    assert "Traceback" not in log()


@pytest.mark.parametrize("route", ["call/nothing", "call/v2/nothing", "call/v2/ask", "run/nothing", "api/nothing"])
def test_a_name_that_no_event_has_is_not_found(visitor: Visitor, log: Any, route: str) -> None:
    assert visitor.http.post(f"gradio_api/{route}", json={"data": [], "unknown": 1}).status_code == 404
    assert "Traceback" not in log()


def test_no_event_is_called_past_the_queue(visitor: Visitor, log: Any) -> None:
    for event in visitor.config["dependencies"]:
        body = {"data": [None] * len(event["inputs"])}
        for way in ("api", "run"):
            assert visitor.http.post(f"gradio_api/{way}/{event['api_name']}", json=body).status_code == 404
    assert "Traceback" not in log()


@pytest.mark.parametrize(
    "wrong",
    [
        {"data": []},
        {"data": [None]},
        {"batched": True},
        {"event_data": "a text"},
        {"event_data": [1]},
        {"event_data": None},
        {"event_data": {"turn": {"path": "/etc/passwd"}}},
        {"event_data": {"turn": DEEP}},
        {"session_hash": "x" * (LONGEST_SESSION + 1)},
    ],
)
def test_a_call_of_the_wrong_form_is_refused(visitor: Visitor, log: Any, wrong: dict[str, Any]) -> None:
    event = visitor.event("edit")
    right = {"fn_index": event["id"], "data": [None] * len(event["inputs"]), "event_data": {}}
    answer = visitor.http.post("gradio_api/queue/join", json=right | {"session_hash": visitor.session} | wrong)
    assert (answer.status_code, answer.json()["detail"]) == (400, NOT_TAKEN)
    assert "Traceback" not in log()


@pytest.mark.parametrize("body", [b"", b"no JSON", b"7", b"[]", b'{"data": 7}', b'{"data": [NaN]}', b"[" * 100_000])
@pytest.mark.parametrize("route", ["queue/join", "call/ask", "component_server", "cancel", "reset"])
def test_a_body_that_is_no_call_is_refused(visitor: Visitor, log: Any, route: str, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = visitor.http.post(f"gradio_api/{route}", content=body, headers=headers)
    assert 400 <= answer.status_code < 500
    assert "Traceback" not in log()


def test_every_event_takes_strange_values_without_a_fault(public: Public, visitor: Visitor, log: Any) -> None:
    for event in visitor.config["dependencies"]:
        for value in (*STRANGE, *REFUSED_BESIDE):
            about = {} if value in REFUSED_BESIDE else dict.fromkeys(("turn", "index", "text", "model"), value)
            outcome = visitor.call(event, [value] * len(event["inputs"]), event_data=about)
            assert outcome.success or outcome.words, (event["api_name"], value)
            assert str(public.folder) not in outcome.words
    assert "Traceback" not in log()


def test_a_file_that_was_never_uploaded_is_refused_without_a_trace(visitor: Visitor, log: Any, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    file = {"path": str(tmp_path / "secret.png"), "meta": {"_type": "gradio.FileData"}}
    assert visitor.ask("What?", [file]).error == NOT_TAKEN
    assert "Traceback" not in log()
    assert "send" in log()
