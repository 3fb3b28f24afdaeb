"""One public page for all of these tests, with a scripted model behind it and secrets around it."""

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.openai_server import openai_server
from tests.security.visitor import Visitor
from tests.serving import serving

# Secrets of the machine, none of which may ever be seen.
SECRETS = {
    "OPENAI_API_KEY": "sk-canary-5d1f0c1e",
    "HF_TOKEN": "hf_canary9a8b7c6d",
    "LLAVA_PASSWORD": "canary-password-31337",
}
SERVER_PASSWORD = "canary-of-the-server-77"


@dataclass
class Public:
    """The page: its address, where its files lie, and what its model was asked."""

    address: str
    folder: Path
    asked: list[dict[str, Any]] = field(default_factory=list)
    reply: str = "Fine."
    free: threading.Event = field(default_factory=threading.Event)  # while it is not set, no answer comes

    def answer(self) -> str:
        self.free.wait()
        return self.reply

    @property
    def log(self) -> str:
        return (self.folder / "app.log").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Public]:
    folder = tmp_path_factory.mktemp("public")
    page = Public("", folder)
    page.free.set()
    with openai_server(lambda _: page.answer(), page.asked) as server:
        server = server.replace("http://", f"http://owner:{SERVER_PASSWORD}@")
        flags = ("--public", "--server", server, "--model", "scripted", "--runs", str(folder / "runs"))
        environment = SECRETS | {"GRADIO_TEMP_DIR": str(folder / "uploads")}
        with serving(*flags, log=folder / "app.log", environment=environment) as page.address:
            yield page


_hosts = (f"198.51.100.{number}" for number in itertools.count(1))


@pytest.fixture
def visit(public: Public) -> Iterator[Callable[[], Visitor]]:
    """Makes visitors, each from an address that nobody had before."""
    visitors: list[Visitor] = []

    def make() -> Visitor:
        visitors.append(Visitor(public.address, next(_hosts)))
        return visitors[-1]

    yield make
    for visitor in visitors:
        visitor.http.close()


@pytest.fixture
def visitor(visit: Callable[[], Visitor]) -> Visitor:
    return visit()
