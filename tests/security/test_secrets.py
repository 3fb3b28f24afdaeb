"""Secrets of the machine are seen nowhere: not in the log, on the pages, in the folder of runs or in errors."""

import os
import subprocess
import sys
from pathlib import Path

from tests.openai_server import Status, openai_server
from tests.security.conftest import SECRETS, SERVER_PASSWORD, Public
from tests.security.visitor import Visitor
from tests.serving import PATIENCE, ROOT

ALL = (*SECRETS.values(), SERVER_PASSWORD)
PAGES = ("", "config", "gradio_api/info", "gradio_api/openapi.json", "theme.css", "gradio_api/app_id", "manifest.json")


def assert_hidden(text: str, where: str) -> None:
    assert not [secret for secret in ALL if secret in text], where


def test_the_pages_the_answers_the_log_and_the_files_hold_no_secret(public: Public, visitor: Visitor) -> None:
    for page in PAGES:
        assert_hidden(visitor.http.get(page).text, page)
    assert_hidden(visitor.ask("What?").everything, "an answer")
    assert_hidden(visitor.call("greet", []).everything, "the list of models")
    assert_hidden(visitor.call("choose", ["scripted"]).everything, "the line about a model")
    assert_hidden(visitor.call("ask", [[], "?", [], {"model": "x"}]).everything, "an error")
    assert_hidden(visitor.call("send", ["nonsense"]).everything, "a fault")
    assert_hidden(public.log, "the log")
    for file in (path for path in public.folder.rglob("*") if path.is_file()):
        assert not any(secret.encode() in file.read_bytes() for secret in ALL), file


def test_the_servers_password_is_in_no_error_when_it_refuses(tmp_path: Path) -> None:
    with openai_server([Status(401, message="no such key")]) as server:
        address = server.replace("http://", f"http://owner:{SERVER_PASSWORD}@")
        code = f"""
from llava_app.engine import Sampling
from llava_app.conversation import Conversation
from llava_app.ui.models import ask_remotely, connect
servers = connect([{address!r}])
try:
    list(ask_remotely(servers.cards()[0], servers).engine.answer(Conversation().ask("?"), Sampling()))
finally:
    servers.close()
    connect(["owner:{SERVER_PASSWORD}@host"])
"""
        told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert "asks for a key" in told.stderr
    said = [line for line in told.stderr.splitlines() if not line.startswith("  ")]  # without the source of this test
    assert "“host” is no address of a server" in said[-1]
    assert_hidden("\n".join(said) + told.stdout, "the errors")


def test_a_key_that_a_teacher_repeats_in_its_refusal_is_not_written_down(tmp_path: Path) -> None:
    key = SECRETS["OPENAI_API_KEY"]
    (tmp_path / "captions.jsonl").write_text('{"image": "a.png", "captions": ["A cat."]}\n', encoding="utf-8")
    with openai_server([Status(401, message=f"Incorrect API key provided: {key}.")]) as server:
        command = ["generate", "captions.jsonl", "--out=set", "--teacher=scripted"]
        told = subprocess.run(
            [sys.executable, "-m", "finetune", *command],
            cwd=tmp_path,
            env=os.environ | SECRETS | {"OPENAI_BASE_URL": server, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    assert_hidden(told.stdout + told.stderr, "what it says")
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert_hidden(file.read_text(encoding="utf-8"), str(file))
