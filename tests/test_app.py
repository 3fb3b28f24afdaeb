import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import app
from llava_app import flags
from llava_app.flags import parse
from llava_app.precision import PRECISIONS
from tests.serving import PATIENCE, ROOT, serving


def test_the_page_is_for_this_machine_only_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACE_ID", raising=False)
    told = parse([])
    assert (told.model, told.precision, told.host, told.port) == (None, "auto", "127.0.0.1", 7860)
    assert (str(told.runs), told.public) == ("runs", False)


def test_on_a_space_the_page_is_for_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "somebody/llava")
    assert (parse([]).host, parse([]).public) == ("0.0.0.0", True)


def test_a_space_is_told_the_flags_in_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_FLAGS", "--feedback --runs 'my runs' --auth me")
    told = parse(["--auth", "you:file"])
    assert (told.feedback, str(told.runs), told.auth) == (True, "my runs", ["me", "you:file"])


def test_the_precisions_are_those_that_loading_knows() -> None:
    assert flags.PRECISIONS == PRECISIONS


def test_a_precision_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--precision", "5bit"])
    assert "5bit" in capsys.readouterr().err


def test_a_model_that_does_not_exist_is_refused_before_anything_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["app.py", "--model", "no-such-model"])
    with pytest.raises(SystemExit, match="There is no model “no-such-model”"):
        app.main()


def test_the_page_starts_without_torch_which_only_the_models_process_needs() -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys, llava_app.ui.page; sys.exit('torch' in sys.modules)"], check=True
    )


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("app") / "app.log"


@pytest.fixture(scope="module")
def address(log: Path) -> Iterator[str]:
    with serving("--runs", str(log.parent), log=log) as address:
        yield address


@pytest.fixture(scope="module")
def config(address: str) -> dict[str, Any]:
    """What the page is made of: its components, and its events with the components they read and write."""
    with urllib.request.urlopen(address + "config") as answer:
        return json.load(answer)


def conversation(config: dict[str, Any]) -> dict[str, Any]:
    return next(component for component in config["components"] if component["type"] == "chatbot")


def test_the_address_is_printed(address: str, log: Path) -> None:
    line = f"The page is at {address}"
    deadline = time.monotonic() + 60  # the server answers a moment before it says where
    while line not in log.read_text(encoding="utf-8") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert line in log.read_text(encoding="utf-8")


def test_a_port_that_is_taken_is_named(address: str, log: Path) -> None:
    port = address.rstrip("/").rpartition(":")[2]
    command = [sys.executable, "app.py", "--runs", str(log.parent), "--port", port]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=PATIENCE)
    assert told.returncode == 1
    assert told.stderr == f"app.py: The page cannot open port {port} on 127.0.0.1. Choose another one with --port.\n"


def test_no_event_believes_the_conversation_that_the_browser_shows(config: dict[str, Any]) -> None:
    window = conversation(config)["id"]
    assert any(window in event["outputs"] for event in config["dependencies"])
    assert all(window not in event["inputs"] for event in config["dependencies"])


def test_the_conversation_drops_foreign_tags_and_cleans_its_html(config: dict[str, Any]) -> None:
    props = conversation(config)["props"]
    assert (props["allow_tags"], props["sanitize_html"]) == (False, True)


def test_the_page_offers_one_interface_to_programs_and_shows_no_faults(config: dict[str, Any]) -> None:
    offered = [event["api_name"] for event in config["dependencies"] if event["api_visibility"] != "private"]
    assert offered == ["ask"]
    assert not config["show_error"]
    assert not config["analytics_enabled"]
    assert config["footer_links"] == []
