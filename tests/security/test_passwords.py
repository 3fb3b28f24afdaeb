"""Local by default, and a password for more."""

import asyncio
import hmac
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import httpx
import pytest
from gradio.routes import App
from starlette.middleware import Middleware

from llava_app import passwords
from llava_app.errors import BusyError, UserError
from llava_app.limits import PUBLIC
from llava_app.passwords import ADDRESS, LONGEST_WAIT, MOST_WAITING, Passwords, read_passwords
from llava_app.ui.calls import HANDLERS
from llava_app.ui.door import Door
from tests.loops import run
from tests.openai_server import openai_server
from tests.security.visitor import Visitor
from tests.serving import serving

PASSWORD = "correct horse battery staple"


def test_a_wrong_password_is_answered_late_and_later_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(passwords, "sleep", sleep)
    known = Passwords({"me": PASSWORD})

    async def guess() -> list[bool]:
        tried = [await known.check("me", word) for word in ("a", "", PASSWORD + " ", "ß", "e", "f", "g")]
        tried.append(await known.check("nobody", PASSWORD))
        return [*tried, await known.check("me", PASSWORD), await known.check("me", "h")]

    assert run(guess()) == [False] * 8 + [True, False]
    assert waits == [0.5, 1.0, 2.0, 4.0, LONGEST_WAIT, LONGEST_WAIT, LONGEST_WAIT, 0.5, 0.5]


class Held:
    """A sleep that lasts until it is let go, and counts who sleeps."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.released = asyncio.Event()

    async def __call__(self, seconds: float) -> None:
        self.waits.append(seconds)
        await self.released.wait()


async def guess_at(known: Passwords, name: str, times: int) -> list[asyncio.Task[bool]]:
    guesses = [asyncio.create_task(known.check(name, "x")) for _ in range(times)]
    await asyncio.sleep(0)
    return guesses


def test_guesses_at_a_name_go_one_after_the_other_and_the_right_password_waits_for_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def guess() -> None:
        held = Held()
        monkeypatch.setattr(passwords, "sleep", held)
        known = Passwords({"me": PASSWORD, "you": PASSWORD})
        guesses = await guess_at(known, "me", MOST_WAITING - 1)
        assert await known.check("you", PASSWORD)
        assert await known.check("me", PASSWORD)
        assert len(held.waits) == 1
        held.released.set()
        assert await asyncio.gather(*guesses) == [False] * len(guesses)
        assert len(held.waits) == len(guesses)

    run(guess())


def test_who_has_many_guesses_waiting_is_refused_unseen_and_nobody_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async def guess() -> None:
        held = Held()
        monkeypatch.setattr(passwords, "sleep", held)
        known = Passwords({"me": PASSWORD})
        ADDRESS.set("198.51.100.77")
        guesses = await guess_at(known, "me", MOST_WAITING)
        for word in ("y", PASSWORD):
            with pytest.raises(BusyError, match=f"{MOST_WAITING} wrong passwords for this name wait"):
                await known.check("me", word)
        ADDRESS.set("192.0.2.1")
        assert await known.check("me", PASSWORD)
        held.released.set()
        assert await asyncio.gather(*guesses) == [False] * len(guesses)
        ADDRESS.set("198.51.100.77")
        assert await known.check("me", PASSWORD)

    run(guess())


def test_how_late_the_answer_is_follows_from_the_guesses_of_the_same_address(monkeypatch: pytest.MonkeyPatch) -> None:
    async def guess() -> list[float]:
        held = Held()
        held.released.set()
        monkeypatch.setattr(passwords, "sleep", held)
        known = Passwords({"me": PASSWORD})
        for address in ("198.51.100.77", "198.51.100.77", "192.0.2.1"):
            ADDRESS.set(address)
            assert not await known.check("me", "x")
        return held.waits

    assert run(guess()) == [0.5, 1.0, 0.5]


def test_only_so_many_guessers_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    async def guess() -> int:
        known = Passwords({"me": PASSWORD})
        for number in range(5):
            ADDRESS.set(str(number))
            assert await known.check("me", PASSWORD)
        return len(known._guesses)

    monkeypatch.setattr(passwords, "MOST_GUESSERS", 3)
    assert run(guess()) == 3


def test_passwords_are_compared_in_constant_time_for_names_that_there_are_and_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[tuple[int, int]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return hmac.compare_digest(one, other)

    async def sleep(_: float) -> None:
        """Not in a test."""

    monkeypatch.setattr(passwords, "sleep", sleep)
    monkeypatch.setattr(passwords, "hmac", type("Spy", (), {"compare_digest": compare, "digest": hmac.digest}))
    known = Passwords({"me": PASSWORD})
    for name, word in (("me", "x"), ("me", PASSWORD), ("you", "x" * 1000)):
        run(known.check(name, word))
    assert compared == [(32, 32)] * 3


def test_the_passwords_themselves_are_not_kept() -> None:
    assert PASSWORD not in str(vars(Passwords({"me": PASSWORD})))


def test_a_password_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "word").write_text(PASSWORD + "\n", encoding="utf-8")
    monkeypatch.setenv("LLAVA_PASSWORD", "from outside")
    assert read_passwords([f"me:{tmp_path / 'word'}", "you"]) == {"me": PASSWORD, "you": "from outside"}
    assert read_passwords([]) == {}


@pytest.mark.parametrize("entry", ["me:hunter2", ":hunter2", "hunter2", "me:/dev/null", ""])
def test_a_password_on_the_command_line_is_refused_and_not_repeated(
    entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAVA_PASSWORD", raising=False)
    with pytest.raises(UserError, match="--auth") as told:
        read_passwords([entry])
    assert "hunter2" not in str(told.value)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("locked")
    (folder / "word").write_text(PASSWORD, encoding="utf-8")
    with openai_server(["Fine."]) as server:
        flags = ("--runs", str(folder), "--server", server, "--model", "scripted", "--auth", f"me:{folder / 'word'}")
        with serving(*flags, log=folder / "log") as address:
            yield address
    assert PASSWORD not in (folder / "log").read_text(encoding="utf-8")


POSTS = ("queue/join", "upload", "call/ask")
GETS = ("config", "gradio_api/info", "gradio_api/openapi.json", "gradio_api/file=app.py", "gradio_api/queue/status")


def test_without_the_password_nothing_is_told_and_nothing_done(locked: str) -> None:
    with Visitor(locked) as stranger:
        for path in POSTS:
            body = {"data": [[], "What?", [], {}], "fn_index": 0, "session_hash": "a"}
            assert stranger.http.post(f"gradio_api/{path}", json=body).status_code == 401, path
        for path in GETS:
            assert stranger.http.get(path).status_code == 401, path
        assert stranger.http.get("openapi.json").status_code == 404
        assert stranger.http.post("gradio_api/component_server", json={}).status_code == 404
        page = stranger.http.get("").text
        assert "scripted" not in page
        assert '"auth_required":true' in page.replace(" ", "")


def test_a_page_elsewhere_cannot_use_the_password(locked: str) -> None:
    with Visitor(locked) as me:
        assert me.http.post("login", data={"username": "me", "password": PASSWORD}).status_code == 200
        elsewhere = {"Host": "llava.example.org", "Origin": "https://evil.example"}
        for method, path in (("GET", "config"), ("POST", "gradio_api/queue/join"), ("POST", "gradio_api/upload")):
            assert me.http.request(method, path, headers=elsewhere).status_code == 403, path
        at_home = {"Host": "llava.example.org", "Origin": "https://llava.example.org"}
        assert me.http.get("config", headers=at_home).status_code == 200


def test_with_the_password_the_page_answers(locked: str) -> None:
    with Visitor(locked) as me:
        wrong = me.http.post("login", data={"username": "me", "password": "a guess"})
        assert (wrong.status_code, "a guess" in wrong.text) == (400, False)
        assert me.http.get("config").status_code == 401
        assert me.http.post("login", data={"username": "me", "password": PASSWORD}).status_code == 200
        assert "Fine." in me.ask("What?").everything


def test_guesses_from_one_address_are_refused_in_words_and_keep_nobody_else_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through the page's own door and Gradio's login."""

    async def visit() -> None:
        held = Held()
        monkeypatch.setattr(passwords, "sleep", held)
        with gr.Blocks() as page:
            page.auth = Passwords({"me": PASSWORD}).check
        doors = {"middleware": [Middleware(Door, limits=PUBLIC)], "exception_handlers": HANDLERS}
        app = App.create_app(page, app_kwargs=doors)

        async def log_in(address: str, password: str) -> httpx.Response:
            there = httpx.ASGITransport(app, client=(address, 1))
            async with httpx.AsyncClient(transport=there, base_url="http://page") as client:
                return await client.post("/login", data={"username": "me", "password": password})

        guesses = [asyncio.create_task(log_in("198.51.100.77", "x")) for _ in range(MOST_WAITING + 1)]
        done, waiting = await asyncio.wait(guesses, return_when=asyncio.FIRST_COMPLETED)
        refused = done.pop().result()
        assert (refused.status_code, "Try again when" in refused.json()["detail"]) == (429, True)
        assert (await log_in("192.0.2.1", PASSWORD)).status_code == 200
        held.released.set()
        assert {(await guess).status_code for guess in waiting} == {400}

    run(visit())
