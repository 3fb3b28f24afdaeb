"""A Space for people who sign in: nobody else gets a page, a file or an event of it."""

import html
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import gradio.routes
import httpx
import pytest
from joserfc.jwk import RSAKey

from llava_app.errors import UserError
from llava_app.limits import PUBLIC
from llava_app.ui.door import BYWAYS
from llava_app.ui.login import FAILED, FIRST, STARTED, check_login, is_required
from llava_app.ui.origins import FOREIGN
from tests.openai_server import openai_server
from tests.openid_provider import SECRET, Provider, openid_provider
from tests.security.conftest import Public
from tests.security.visitor import Visitor
from tests.serving import PATIENCE, ROOT, serving

HOST = "somebody-llava.hf.space"
BUTTON = "Sign in with Hugging Face"
# Every address that Gradio answers, as its source has it.
ROUTES = re.findall(r'@(app|router)\.(get|head|post)\(\s*f?"([^"]+)"', Path(gradio.routes.__file__).read_text("utf-8"))


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    with openid_provider() as provider:
        yield provider


@pytest.fixture(autouse=True)
def _as_ever(provider: Provider) -> None:
    provider.name, provider.lasts, provider.signs_with = "ada", 28_800, None


@pytest.fixture(scope="module")
def members(provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Public]:
    """The page of a Space with `hf_oauth: true`."""
    folder = tmp_path_factory.mktemp("members")
    page = Public("", folder)
    page.free.set()
    space = {"SPACE_ID": "somebody/llava", "SYSTEM": "spaces", "SPACE_HOST": HOST}
    environment = space | provider.environment | {"GRADIO_TEMP_DIR": str(folder / "uploads")}
    with openai_server(lambda _: page.answer(), page.asked) as server:
        flags = ("--host", "127.0.0.1", "--server", server, "--model", "scripted", "--runs", str(folder / "runs"))
        with serving(*flags, log=folder / "app.log", environment=environment) as page.address:
            yield page


@pytest.fixture
def come(members: Public, provider: Provider) -> Iterator[Callable[..., Visitor]]:
    """Makes visitors: strangers, or `name` who has signed in."""
    visitors: list[Visitor] = []

    def make(name: str = "") -> Visitor:
        visitor = Visitor(members.address, f"198.51.100.{len(visitors) + 1}")
        visitor.http.event_hooks["response"].append(partial(keep_cookie, visitor))
        visitors.append(visitor)
        if name:
            provider.name = name
            assert sign_in(visitor).headers["location"] == "/"
        return visitor

    yield make
    for visitor in visitors:
        visitor.http.close()


def keep_cookie(visitor: Visitor, answer: httpx.Response) -> None:
    """As a browser does it with HTTPS; httpx sends no secure cookies without."""
    if "set-cookie" in answer.headers:
        visitor.http.headers["Cookie"] = answer.headers["set-cookie"].split(";")[0]


def callback(visitor: Visitor, say: str = "Authorize") -> str:
    """Press the button, say it to the provider, and where that sends the browser."""
    asked = visitor.http.get("login/huggingface?_target_url=/")
    consent = httpx.get(asked.headers["location"], timeout=PATIENCE).text
    target = urlsplit(html.unescape(re.findall(f'href="([^"]+)">{say}<', consent)[0]))
    assert target.netloc == HOST
    return f"{target.path}?{target.query}"


def sign_in(visitor: Visitor, say: str = "Authorize") -> httpx.Response:
    return visitor.http.get(callback(visitor, say))


def is_in(visitor: Visitor) -> bool:
    """Whether the page answers; where not, it must say why."""
    answer = visitor.http.get("config")
    assert answer.status_code == 200 or (answer.status_code, answer.json()) == (401, {"error": FIRST})
    return answer.status_code == 200


def test_who_signs_in_is_let_in_until_signing_out(members: Public, come: Callable[..., Visitor]) -> None:
    ada = come()
    page = ada.http.get("").text
    assert BUTTON in page
    assert "gradio" not in page.lower()
    assert not is_in(ada)
    assert sign_in(ada).headers["location"] == "/"
    assert "gradio" in ada.http.get("").text.lower()
    assert "Fine." in ada.ask("What?").everything
    assert ada.call("_check_login_status", []).data[0]["value"] == "Sign out ada"
    assert ada.http.get("logout?_target_url=/").headers["location"] == "/"
    assert not is_in(ada)
    assert BUTTON in ada.http.get("").text


def test_no_event_answers_whoever_has_not_signed_in(members: Public, come: Callable[..., Visitor]) -> None:
    ada, stranger = come("ada"), come()
    ada.ask("What?")
    stranger.session = ada.session
    asked, events = len(members.asked), ada.config["dependencies"]
    assert {"send", "stream", "ask", "greet", "restore", "vote", "choose"} <= {event["api_name"] for event in events}
    for event in events:
        data = [None] * len(event["inputs"])
        assert FIRST in (stranger.call(event, data).error or ""), event["api_name"]
        answer = stranger.http.post(f"gradio_api/call/{event['api_name']}", json={"data": data})
        assert (answer.status_code, answer.json()) == (401, {"error": FIRST}), event["api_name"]
        for byway in BYWAYS:
            assert stranger.http.post(f"{byway}{event['api_name']}", json={"data": data}).status_code == 404
    assert len(members.asked) == asked


def test_no_address_of_gradios_answers_whoever_has_not_signed_in(come: Callable[..., Visitor]) -> None:
    stranger = come()
    assert len(ROUTES) > 70
    for whose, method, path in ROUTES:
        at = "/gradio_api" * (whose == "router") + re.sub(r"\{[^}]*\}", "x", path)
        answer = stranger.http.request(method, at, params={"session_hash": "x", "upload_id": "x"})
        known = {"/": 200, "/login/huggingface": 302, "/login/callback": 307, "/logout": 307, STARTED: 200}
        refused = 403 if "/proxy=" in at else 404 if at.startswith(BYWAYS) else 401  # for everybody, and strangers
        assert answer.status_code == known.get(at, refused), at


@pytest.mark.parametrize(
    ("path", "host"),
    [
        ("config", "x/login/callback?"),
        ("config", "x/logout#"),
        ("//config", ""),
        ("login/callback/../../config", ""),
        ("login/callback%2f..%2f..%2fconfig", ""),
        ("logout/config", ""),
        ("gradio_api/startup-events/", ""),
    ],
)
def test_no_address_is_taken_for_a_way_in(come: Callable[..., Visitor], path: str, host: str) -> None:
    """A forged Host once moved what Starlette took for the path (CVE-2026-48710)."""
    stranger = come()
    answer = stranger.http.get(f"{stranger.http.base_url}{path}", headers={"Host": host} if host else {})
    assert answer.status_code in (400, 401)


def test_files_of_a_member_are_not_for_strangers(come: Callable[..., Visitor]) -> None:
    ada, stranger = come("ada"), come()
    (file,) = ada.upload(ROOT / "examples" / "memes" / "big-dog.png")
    assert ada.http.get(f"gradio_api/file={file['path']}").status_code == 200
    assert stranger.http.get(f"gradio_api/file={file['path']}").status_code == 401
    assert stranger.http.post("gradio_api/upload", files={"files": b"x"}).status_code == 401


@pytest.mark.parametrize(
    "forge", [lambda cookie: cookie[:-1], lambda cookie: "session=e30=." + cookie.split(".", 1)[1]]
)
def test_a_forged_cookie_is_worth_nothing(come: Callable[..., Visitor], forge: Callable[[str], str]) -> None:
    ada, stranger = come("ada"), come()
    stranger.http.headers["Cookie"] = ada.http.headers["Cookie"]
    assert is_in(stranger)
    stranger.http.headers["Cookie"] = forge(ada.http.headers["Cookie"])
    assert not is_in(stranger)


def test_a_login_ends_when_the_provider_says(provider: Provider, come: Callable[..., Visitor]) -> None:
    provider.lasts = -1
    assert not is_in(come("ada"))


def test_what_goes_wrong_is_told_and_lets_nobody_in(
    members: Public, provider: Provider, come: Callable[..., Visitor]
) -> None:
    def failed(stranger: Visitor, answer: httpx.Response) -> bool:
        assert answer.headers["cache-control"] == "no-store"
        return answer.status_code == 400 and FAILED in answer.text and BUTTON in answer.text and not is_in(stranger)

    stranger = come()
    assert failed(stranger, sign_in(stranger, "Cancel"))
    assert failed(stranger, stranger.http.get(re.sub("code=[^&]+", "code=forged-canary", callback(stranger))))
    assert failed(stranger, stranger.http.get("login/callback?_nb_redirects=many"))
    provider.signs_with = RSAKey.generate_key(2048, {"kid": "1"})
    assert failed(stranger, sign_in(stranger))
    forged = re.sub("state=[^&]+", "state=forged", callback(stranger))
    assert stranger.http.get(forged).headers["location"].startswith("/login/huggingface?")  # begins anew
    assert not is_in(stranger)
    log = members.log
    assert "Signing in failed: OAuthError" in log
    assert "Traceback" not in log.partition("Signing in failed")[2]
    assert "said no" not in log
    assert "forged-canary" not in log


def test_one_person_cannot_finish_the_login_of_another(come: Callable[..., Visitor]) -> None:
    ada, mallory = come(), come()
    sent = callback(mallory)
    assert ada.http.get(sent).headers["location"].startswith("/login/huggingface?")
    assert not is_in(ada)


def test_after_the_login_nobody_is_sent_to_another_site(come: Callable[..., Visitor]) -> None:
    for target in ("https://evil.example/x", "//evil.example/x", "////evil.example/x", r"\\evil.example"):
        visitor = come()
        asked = visitor.http.get("login/huggingface", params={"_target_url": target})
        consent = httpx.get(asked.headers["location"], timeout=PATIENCE).text
        back = urlsplit(html.unescape(re.findall('href="([^"]+)">Authorize<', consent)[0]))
        sent = visitor.http.get(f"{back.path}?{back.query}").headers["location"]
        assert re.match(r"/(?![/\\])", sent), sent


def test_a_page_elsewhere_cannot_use_the_login(come: Callable[..., Visitor]) -> None:
    ada = come("ada")
    elsewhere = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors", "Origin": "https://evil.example"}
    for answer in (
        ada.http.get("", headers=elsewhere),
        ada.http.get("config", headers=elsewhere),
        ada.http.post("gradio_api/queue/join", headers=elsewhere, json={"data": [], "fn_index": 0}),
    ):
        assert answer.status_code == 403
        assert FOREIGN in answer.text
    frame = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}
    assert "gradio" in ada.http.get("", headers=frame).text.lower()
    assert 'target="_blank"' in come().http.get("", headers=frame).text


def test_a_limit_is_one_persons_wherever_they_are(come: Callable[..., Visitor]) -> None:
    def refused(visitor: Visitor) -> str | None:
        return visitor.call("ask", [[], "What?", [], {}]).error

    here, there = come("bo"), come("bo")
    assert [refused(here) for _ in range(PUBLIC.questions)] == [None] * PUBLIC.questions
    assert "within a minute, which is the limit" in str(refused(there))
    assert refused(come("cy")) is None


def test_no_secret_of_a_login_is_seen(members: Public, provider: Provider, come: Callable[..., Visitor]) -> None:
    ada = come("ada")
    secrets = [SECRET, *provider.given, ada.http.headers["Cookie"].removeprefix("session=")]
    assert len(secrets) > 4
    pages = ("", "config", "gradio_api/info", "gradio_api/user", "gradio_api/token", "gradio_api/app_id")
    seen = [ada.http.get(page).text for page in pages] + [ada.ask("What?").everything, members.log]
    seen += [path.read_text("utf-8", "replace") for path in members.folder.rglob("*") if path.is_file()]
    assert not [secret for secret in secrets if any(secret in text for text in seen)]
    assert "What?" not in members.log


def test_the_theme_that_the_hub_asks_for_is_kept_and_nothing_else(come: Callable[..., Visitor]) -> None:
    stranger = come()
    dark = stranger.http.get("", params={"__theme": "dark", "q": "a question"}).text
    assert "color-scheme: dark" in dark
    assert "_target_url=/?__theme=dark" in dark
    assert "a question" not in dark
    assert "script" not in stranger.http.get("", params={"__theme": '"><script>'}).text


@pytest.mark.parametrize(
    ("environment", "required"),
    [
        ({}, False),
        ({"OAUTH_CLIENT_ID": "x"}, False),
        ({"SPACE_ID": "a/b", "SYSTEM": "spaces"}, False),
        ({"SPACE_ID": "a/b", "SYSTEM": "spaces", "OAUTH_CLIENT_ID": "x"}, True),
    ],
)
def test_only_a_space_with_a_client_asks_for_a_login(
    environment: dict[str, str], required: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SPACE_ID", "SYSTEM", "OAUTH_CLIENT_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_required() == required


def test_a_password_beside_the_login_is_refused() -> None:
    check_login(with_passwords=False)
    with pytest.raises(UserError, match="--auth"):
        check_login(with_passwords=True)


def test_without_the_login_its_packages_are_not_needed(tmp_path: Path) -> None:
    code = """
import sys
sys.modules |= {"authlib": None, "itsdangerous": None}
sys.argv = ["app.py", "--model", "no-such-model"]
import app
app.main()
"""
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=PATIENCE)
    assert "There is no model “no-such-model”" in told.stderr
