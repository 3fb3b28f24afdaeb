"""examples/nginx.conf, in a real nginx in front of two servers that say what they were sent."""

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from tests.serving import PATIENCE, ROOT

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


class Page(BaseHTTPRequestHandler):
    """Says what it was sent, and by which process; at /stream one word, and another when `go_on` is set."""

    protocol_version = "HTTP/1.1"
    go_on = threading.Event()

    def do_GET(self) -> None:
        said = json.dumps({"port": self.server.server_port, **{k.lower(): v for k, v in self.headers.items()}})
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        if self.path == "/stream":
            self.wfile.write(b"one ")
            self.wfile.flush()
            assert self.go_on.wait(PATIENCE)
        self.wfile.write(said.encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if NGINX is None:
        pytest.skip("no nginx here; install it (apt-get install nginx-light) to try examples/nginx.conf")
    folder = tmp_path_factory.mktemp("nginx")
    pages = [ThreadingHTTPServer(("127.0.0.1", 0), Page) for _ in range(2)]
    for page in pages:
        threading.Thread(target=page.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = (ROOT / "examples" / "nginx.conf").read_text(encoding="utf-8")
    for number, page in enumerate(pages):
        text = text.replace(f"127.0.0.1:786{number}", f"127.0.0.1:{page.server_port}")
    (folder / "nginx.conf").write_text(text.replace("listen 8080", f"listen 127.0.0.1:{port}"), encoding="utf-8")
    start = [NGINX, "-e", "stderr", "-g", f"daemon off; pid {folder}/pid;", "-c", str(folder / "nginx.conf")]
    server = subprocess.Popen(start)
    try:
        _wait_for(port, server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()
        for page in pages:
            page.shutdown()
            page.server_close()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 5).close()
            return
        except OSError:
            time.sleep(0.05)
    pytest.fail("nginx did not start")


def test_a_page_is_told_who_asks_and_what_it_is_called_whatever_a_visitor_says(proxy: str) -> None:
    forged = {"X-Forwarded-For": "192.0.2.1", "X-Forwarded-Host": "elsewhere.example", "X-Forwarded-Proto": "https"}
    told = httpx.get(proxy, headers={**forged, "Host": "llava.example:8080", "Origin": "http://other.example"}).json()
    assert (told["host"], told["x-forwarded-host"]) == ("llava.example:8080", "llava.example:8080")
    assert (told["x-forwarded-for"], told["x-forwarded-proto"]) == ("127.0.0.1", "http")
    assert told["origin"] == "http://other.example"


def test_a_browser_and_a_program_without_cookies_each_stay_with_one_process(proxy: str) -> None:
    """Browsers from one address are spread; of 64, all with one process has a chance of 2 to the power of -63."""
    with httpx.Client(base_url=proxy) as client:

        def new(*paths: str) -> set[int]:
            """The processes that answer somebody who comes for the first time."""
            client.cookies.clear()
            return {client.get(path).json()["port"] for path in paths}

        assert len(set().union(*(new("/gradio_api/call/ask") for _ in range(16)))) == 1
        browsers = set()
        for _ in range(64):
            ports = new("/", "/config", "/")
            assert len(ports) == 1
            browsers |= ports
    assert len(browsers) == 2


def test_an_answer_arrives_as_it_is_written(proxy: str) -> None:
    with httpx.stream("GET", f"{proxy}/stream", timeout=PATIENCE) as answer:
        words = answer.iter_bytes()
        assert next(words) == b"one "
        Page.go_on.set()
        assert b"port" in b"".join(words)


@pytest.mark.parametrize("path", ["/metrics", "/%6detrics", "/config/../metrics", "/metrics?a"])
def test_the_figures_stay_inside(proxy: str, path: str) -> None:
    assert httpx.get(proxy + path).status_code == 403
