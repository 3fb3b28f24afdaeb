"""Oversized and very many requests."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path

import pytest
from PIL import Image
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from llava_app import limits
from llava_app.errors import BusyError
from llava_app.limits import LOCAL, PUBLIC, Gate, Rate, network
from llava_app.ui.door import Door, Message, Receive, Scope, Send
from tests.loops import run
from tests.security.conftest import Public
from tests.security.visitor import Visitor
from tests.serving import PATIENCE


def test_a_visitor_has_so_many_questions_a_minute_and_another_has_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    gate = Gate(replace(LOCAL, questions=2))

    def ask(visitor: str) -> None:
        with gate.enter(visitor):
            pass

    ask("a"), ask("a"), ask("b")
    now[0] = 20.0
    with pytest.raises(BusyError, match=r"You asked 2 questions within a minute.*Send again in 40 seconds"):
        ask("a")
    ask("b")
    now[0] = 60.0
    ask("a")


def test_a_visitor_has_so_many_answers_at_once_and_all_together_so_many() -> None:
    gate = Gate(replace(LOCAL, running=1, waiting=2))
    with gate.enter("a"):
        with pytest.raises(BusyError, match="1 of your answers are being written"), gate.enter("a"):
            pass
        with (
            gate.enter("b"),
            pytest.raises(BusyError, match=r"2 answers are being written or wait.*Send again in a minute"),
            gate.enter("c"),
        ):
            pass
    with gate.enter("a"), gate.enter("c"):
        pass


def test_an_answer_that_breaks_off_makes_room() -> None:
    gate = Gate(replace(LOCAL, running=1))
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), gate.enter("a"):
            raise ZeroDivisionError


def test_visitors_are_forgotten_before_they_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_VISITORS", 10)
    rate = Rate(5)
    for number in range(1000):
        rate.wait(str(number))
    assert len(rate._counts) == 10


def test_who_knocks_is_not_forgotten_for_those_whose_minute_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(limits, "MOST_VISITORS", 3)
    rate = Rate(1)
    for visitor in ("first", "2", "3"):
        assert not rate.wait(visitor)
    now[0] = 70.0
    assert not rate.wait("first")
    assert not rate.wait("4")
    assert rate.wait("first")
    assert list(rate._counts) == ["3", "4", "first"]


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:a:b:c:d", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::1", "2001:db8:1:2::/64"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
        ("", ""),
    ],
)
def test_an_address_counts_as_what_one_line_has(address: str, counted: str) -> None:
    assert network(address) == counted


def test_all_addresses_of_a_line_are_one_visitor(public: Public) -> None:
    visitors = [Visitor(public.address, f"2001:db8:77:1::{number:x}") for number in range(1, PUBLIC.questions + 2)]
    event = visitors[0].event("ask")
    *asked, last = [visitor.call(event, [[], "What?", [], {}]) for visitor in visitors]
    assert all(outcome.success for outcome in asked)
    assert "You asked 20 questions within a minute" in last.words
    for visitor in visitors:
        visitor.http.close()


def test_everything_is_stricter_for_strangers() -> None:
    assert all(getattr(PUBLIC, name) < getattr(LOCAL, name) for name in vars(PUBLIC))


def test_a_question_that_is_too_long_and_too_many_pictures_are_refused(
    public: Public, visitor: Visitor, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = len(public.asked)
    assert "4,001 characters; the limit is 4,000" in visitor.ask("x" * 4_001).words
    assert (
        "5 pictures in this message; the limit is 4" in visitor.ask("?", visitor.upload(tmp_path / "a.png") * 5).words
    )
    assert "The question has 4,001 characters" in visitor.call("ask", [[], "x" * 4_001, [], {}]).words
    history = [{"question": "?", "answer": "!", "images": visitor.upload(tmp_path / "a.png") * 9}] * 2
    assert "There are 18 pictures; the limit is 16" in visitor.call("ask", [[], "?", history, {}]).words
    assert len(public.asked) == asked


def test_a_conversation_holds_so_many_pictures(visitor: Visitor, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    files = visitor.upload(tmp_path / "a.png") * 4
    for _ in range(4):
        assert not visitor.ask("?", files).words
    assert (
        "the conversation would hold 20 pictures, of a clip 4 frames counted as one; the limit is 16. Send less, or "
        "start a new chat." in visitor.ask("?", files).words
    )


def test_the_longest_answer_is_what_the_page_allows(public: Public, visitor: Visitor) -> None:
    visitor.call("ask", [[], "What?", [], {"max_new_tokens": 2048}])
    assert public.asked[-1]["max_tokens"] == PUBLIC.new_tokens


def test_who_asks_too_often_is_told_and_the_next_visitor_is_answered(
    visit: Callable[[], Visitor], visitor: Visitor
) -> None:
    event = visitor.event("ask")
    outcomes = [visitor.call(event, [[], "What?", [], {}]) for _ in range(PUBLIC.questions + 1)]
    assert [outcome.success for outcome in outcomes] == [True] * PUBLIC.questions + [False]
    assert "You asked 20 questions within a minute, which is the limit. Send again in" in outcomes[-1].words
    assert "You asked 20 questions" in visitor.ask("And by the page?").words
    assert visit().ask("What?").success


TOO_LARGE = "This is larger than 64 MB, which is the limit. Send less at once."


def refusal(path: str) -> str:
    """Of a body that is too large, in the form that the page shows."""
    return json.dumps({"detail": TOO_LARGE}, separators=(",", ":")) if path.endswith("/join") else TOO_LARGE


@pytest.mark.parametrize("path", ["gradio_api/queue/join", "gradio_api/upload", "gradio_api/call/ask", "login"])
def test_a_body_that_is_said_to_be_too_large_is_refused(public: Public, path: str) -> None:
    connection = HTTPConnection(public.address.split("/")[2], timeout=PATIENCE)
    with closing(connection):
        connection.putrequest("POST", f"/{path}")
        connection.putheader("Content-Length", "65000000")
        connection.endheaders()
        answer = connection.getresponse()
        assert (answer.status, answer.read().decode()) == (413, refusal(path))


@pytest.mark.parametrize("path", ["gradio_api/queue/join", "gradio_api/upload", "gradio_api/call/ask"])
def test_a_body_that_goes_on_beyond_the_limit_is_refused(visitor: Visitor, path: str) -> None:
    is_upload = "upload" in path
    kind = "multipart/form-data; boundary=x" if is_upload else "application/json"
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="%d"\r\n\r\n'

    def body() -> Iterator[bytes]:
        for number in range(70):
            yield (part % number if is_upload else b"[") + b"x" * 1_000_000 + b"\r\n"

    answer = visitor.http.post(path, headers={"content-type": kind}, content=body())
    assert (answer.status_code, answer.text) == (413, refusal(path))


def test_a_flood_of_requests_is_stopped() -> None:
    passed, answers = [], []

    async def application(scope: Scope, *_: object) -> None:
        passed.append(scope["client"][0])

    async def send(message: dict) -> None:
        answers.append(message.get("status") or message["body"].decode())

    door = Door(application, replace(PUBLIC, requests=3))
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "client": ("a", 1)}

    async def knock() -> None:
        for host in ["2001:db8::1", "2001:db8::2", *["2001:db8::3"] * 3, "b"]:
            await door(scope | {"client": (host, 1)}, None, send)
        scope["client"] = ("2001:db8::4", 1)
        await door(scope | {"method": "GET"}, None, send)
        await door(scope | {"path": "/gradio_api/queue/join"}, None, send)

    run(knock())
    assert passed == ["2001:db8::1", "2001:db8::2", "2001:db8::3", "b", "2001:db8::4"]
    assert answers[0] == 429
    assert answers[1].startswith("More than 3 requests in a minute. Go on in ")
    assert json.loads(answers[-1])["detail"].startswith("More than 3 requests")  # which the page shows


def test_the_bytes_of_a_visitor_in_a_minute_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    answers: list[tuple[int, str]] = []

    async def upload(host: str, *chunks: bytes) -> None:
        waiting = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
        waiting.append({"type": "http.request", "body": b"", "more_body": False})
        told: list[Message] = []

        async def receive() -> Message:
            return waiting.pop(0)

        async def send(message: Message) -> None:
            told.append(message)

        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            while (await receive())["more_body"]:
                pass
            await PlainTextResponse("taken")(scope, receive, send)

        door._app = application
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "client": (host, 1)}
        await door(scope, receive, send)
        answers.append((told[0]["status"], told[1]["body"].decode()))

    async def send_much() -> None:
        await upload("a", b"x" * 600_000, b"x" * 300_000)
        now[0] = 20.0
        await upload("a", b"x" * 60_000, b"x" * 60_000)
        await upload("b", b"x" * 900_000)
        now[0] = 61.0
        await upload("a", b"x" * 900_000)

    door = Door(None, replace(PUBLIC, sent=1_000_000))
    run(send_much())
    told = "You sent more than 1 MB within a minute. Go on in 40 seconds."
    assert answers == [(200, "taken"), (429, told), (200, "taken"), (200, "taken")]


def test_who_hangs_up_in_the_middle_of_an_upload_is_no_fault() -> None:
    arriving = [{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}]
    told: list[Message] = []

    async def receive() -> Message:
        return arriving.pop(0)

    async def send(message: Message) -> None:
        told.append(message)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await Request(scope, receive).body()

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "client": ("a", 1)}
    run(Door(application, PUBLIC)(scope, receive, send))
    assert (arriving, told) == ([], [])


def test_open_requests_are_bounded_for_each_visitor() -> None:
    statuses: list[int] = []

    async def send(message: dict) -> None:
        statuses.append(message.get("status", 0))

    async def knock() -> tuple[int, int]:
        ends, waiting = asyncio.Event(), []

        async def application(*_: object) -> None:
            waiting.append(1)
            await ends.wait()

        door = Door(application, replace(PUBLIC, open=2))
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "client": ("a", 1)}
        visits = [asyncio.create_task(door(scope, None, send)) for _ in range(3)]
        visits.append(asyncio.create_task(door(scope | {"client": ("b", 1)}, None, send)))
        await asyncio.sleep(0)
        inside = len(waiting)
        ends.set()
        await asyncio.gather(*visits)
        await door(scope, None, send)
        return inside, len(waiting)

    assert run(knock()) == (3, 4)
    assert statuses == [429, 0]


def test_nobody_opens_tabs_without_end_and_takes_the_room_of_the_others(visitor: Visitor) -> None:
    stop = visitor.event("stop")
    for number in range(PUBLIC.tabs):
        visitor.session = f"flood{number}"
        assert visitor.call(stop, [None]).success
    visitor.session = "one too many"
    told = f"You have {PUBLIC.tabs} tabs of this page open, which is the limit. Close some of them."
    assert told in visitor.call(stop, [None]).words
    visitor.session = "flood0"
    assert visitor.call(stop, [None]).success
    beside = {"session_hash": "flood0", "component_id": 1, "fn_name": "x", "data": None}
    assert "Programs call" in visitor.http.post("gradio_api/component_server", json=beside).text


def test_a_visitor_waits_for_the_answers_that_run(public: Public, visit: Callable[[], Visitor]) -> None:
    host, before, words = visit().host, len(public.asked), []
    tabs = [Visitor(public.address, host) for _ in range(PUBLIC.running)]
    threads = [threading.Thread(target=lambda tab=tab: words.append(tab.ask("What?").words)) for tab in tabs]
    public.free.clear()
    try:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + PATIENCE
        while len(public.asked) < before + PUBLIC.running and time.monotonic() < deadline:
            time.sleep(0.05)
        with Visitor(public.address, host) as another:
            told = another.ask("What?").words
    finally:
        public.free.set()
    for thread, tab in zip(threads, tabs, strict=True):
        thread.join()
        tab.http.close()
    assert told.strip() == "3 of your answers are being written already, which is the limit. Wait for one, or stop it."
    assert [word.strip() for word in words] == [""] * PUBLIC.running
