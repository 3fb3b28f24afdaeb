"""Pages elsewhere, in the browser of somebody who may use this one."""

from collections.abc import Callable
from typing import Any

import pytest

from llava_app.ui.door import POLICY
from llava_app.ui.origins import FOREIGN, RENAMED, refusal
from tests.security.conftest import Public
from tests.security.visitor import Visitor

PUBLIC_NAME = "llava.example.org"


def told(method: str = "POST", server: tuple[str, int] = ("10.0.0.7", 7860), **headers: str) -> str | None:
    """What a request with these headers is told, `_` in their names being `-`."""
    named = {"host": PUBLIC_NAME} | {name.replace("_", "-"): value for name, value in headers.items()}
    encoded = [(name.encode(), value.encode()) for name, value in named.items()]
    return refusal({"type": "http", "method": method, "server": server, "headers": encoded})


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": f"https://{PUBLIC_NAME}.evil.example"},
        {"origin": "null"},
        {"origin": "null", "host": ""},
        {"origin": f"https://{PUBLIC_NAME}", "sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"},
        {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"},  # a form that is sent here
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "cors"},
        {"origin": "https://evil.example", "x_forwarded_host": "evil.example"},
    ],
)
def test_what_a_page_elsewhere_sends_is_refused(headers: dict[str, str]) -> None:
    assert told(**headers) == FOREIGN
    assert told("OPTIONS", **headers) == FOREIGN


def test_a_picture_or_script_that_a_page_elsewhere_wants_is_refused() -> None:
    assert told("GET", sec_fetch_site="cross-site", sec_fetch_mode="no-cors") == FOREIGN


@pytest.mark.parametrize(
    "headers",
    [
        {},  # curl, gradio_client, MCP clients
        {"origin": f"https://{PUBLIC_NAME}", "sec_fetch_site": "same-origin"},
        {"origin": f"https://{PUBLIC_NAME}", "sec_fetch_site": "same-origin", "host": "127.0.0.1:7860"},  # a proxy's
        {"origin": f"http://{PUBLIC_NAME}"},  # plain HTTP, or an old browser
        {"origin": f"http://{PUBLIC_NAME}:8080"},  # behind a proxy that leaves the port away
        {"sec_fetch_site": "none", "sec_fetch_mode": "navigate"},
    ],
)
def test_what_the_page_itself_and_programs_send_goes_on(headers: dict[str, str]) -> None:
    assert told(**headers) is None


def test_a_space_knows_its_name_whatever_its_proxies_call_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_HOST", "somebody-llava.hf.space")
    assert told(origin="https://somebody-llava.hf.space") is None
    assert told(origin="https://other.hf.space") == FOREIGN


def test_a_link_to_the_page_and_the_frame_of_a_space_may_be_opened() -> None:
    assert told("GET", sec_fetch_site="cross-site", sec_fetch_mode="navigate", sec_fetch_dest="document") is None
    assert told("GET", sec_fetch_site="cross-site", sec_fetch_mode="navigate", sec_fetch_dest="iframe") is None


@pytest.mark.parametrize(
    ("host", "refused"),
    [
        ("localhost:7860", False),
        ("LOCALHOST:7860", False),
        ("127.0.0.1:7860", False),
        ("[::1]:7860", False),
        ("localhost:9000", False),  # through ssh -L
        ("evil.example:7860", True),
        ("127.0.0.1.evil.example:7860", True),
        ("localhost:7860@evil.example:7860", True),
        ("llava.example.org", False),  # what nginx on this machine passes on
        ("llava.example.org:8080", False),
    ],
)
def test_on_this_machine_a_name_from_elsewhere_is_refused_unless_a_proxy_passes_it_on(host: str, refused: bool) -> None:
    for address in ("127.0.0.1", "::1"):
        assert told("GET", (address, 7860), host=host) == (RENAMED.format(port=7860) if refused else None)
    assert told("GET", host=host) is None
    assert told("GET", ("127.0.0.1", 80), host="evil.example") == RENAMED.format(port=80)


def test_the_running_page_refuses_pages_elsewhere_before_anything_is_kept(
    public: Public, visit: Callable[[], Visitor]
) -> None:
    visitor = visit()
    evil = {"Origin": "https://evil.example"}
    uploads = set(public.folder.rglob("*"))
    body: dict[str, Any] = {"fn_index": visitor.event("send")["id"], "data": [], "session_hash": visitor.session}
    for answer in (
        visitor.http.get("config", headers=evil),
        visitor.http.post("gradio_api/queue/join", headers=evil, json=body),
        visitor.http.post("gradio_api/upload", headers=evil, files={"files": b"planted"}),
    ):
        assert answer.status_code == 403
        assert FOREIGN in answer.text
    port = visitor.http.base_url.port
    assert visitor.http.get("", headers={"Host": f"evil.example:{port}"}).text == RENAMED.format(port=port)
    assert visitor.http.get("", headers={"Host": "llava.example.org"}).status_code == 200
    assert set(public.folder.rglob("*")) == uploads


@pytest.mark.parametrize("path", ["", "config", "theme.css", "gradio_api/file=/etc/passwd", "gradio_api/run/x"])
def test_every_answer_tells_the_browser_to_fetch_no_picture_from_elsewhere(visitor: Visitor, path: str) -> None:
    assert visitor.http.get(path).headers["content-security-policy"] == POLICY
    assert "img-src 'self' data: blob:;" in POLICY
