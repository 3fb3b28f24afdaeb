"""The Space: its files alone in an empty folder, its upload, and the borrowed GPU."""

import base64
import json
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from llava_app.__main__ import main
from llava_app.checkpoints import Card, built_in, read_card, write_card
from llava_app.cli import space
from llava_app.cli.space import space_files, start_with
from llava_app.conversation import Conversation
from llava_app.engine import Piece, Sampling
from llava_app.errors import BusyError, ContextError
from tests.security.visitor import Visitor
from tests.serving import serving

TOKEN = "hf_canary9a8b7c6d"


@pytest.fixture
def model(tiny_card: Card, tmp_path: Path) -> Path:
    """A folder of runs with a model in it, and what a training run leaves beside it."""
    folder = Path(shutil.copytree(tiny_card.source, tmp_path / "runs" / "tiny"))
    for name in ("state", "job"):
        (folder / name).mkdir()
        (folder / name / "large.bin").write_bytes(b"x")
    for name in (".env", "secret.token", ".secrets/mine.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(TOKEN)
    return folder


def test_the_files_of_the_space_are_the_page_and_the_chosen_model(model: Path) -> None:
    names = set(space_files(space.find(str(model))))
    assert {"app.py", "README.md", "requirements.txt", "llava_app/ui/page.py", "runs/tiny/card.json"} < names
    assert "llava_app/demo/memeworld/card.json" in names
    assert not [name for name in names if name.startswith(("finetune", "tests", ".")) or "__pycache__" in name]
    assert not [name for name in names if "large.bin" in name or "secret" in name]
    assert not [name for name in space_files(None) if name.startswith("runs/")]


@pytest.mark.parametrize("in_git", [True, False])
def test_what_is_somebodys_own_stays_here(in_git: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = ("app.py", "llava_app/ui/page.css", "examples/questions.json")
    own = ("llava_app/.env", "examples/secret.token", ".git.json", "llava_app/.ssh/key.json", "llava_app/state/a.json")
    for name in (*pages, *own):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(TOKEN)
    monkeypatch.setattr(space, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    if in_git:
        for command in (("init", "-q"), ("add", *pages)):
            subprocess.run(["git", *command], cwd=tmp_path, check=True)
        (tmp_path / "examples" / "untracked.json").write_text(TOKEN)
    assert set(space_files(None)) == set(pages)


def test_every_file_of_the_page_is_of_a_kind_that_a_folder_without_git_uploads() -> None:
    assert {path for path in space._tracked() if "__pycache__" not in path.parts} <= set(space._released())


def test_a_model_comes_with_everything_that_its_card_names(model: Path) -> None:
    (model / "log.jsonl").write_text("{}")
    for name in ("state", "job", ".secrets"):
        shutil.rmtree(model / name)
    for name in (".env", "secret.token"):
        (model / name).unlink()
    write_card(model, read_card(model))
    assert "runs/tiny/log.jsonl" in space_files(space.find(str(model)))


def test_a_model_is_named_as_it_lies_there(model: Path) -> None:
    assert start_with(space.find(str(model))) == "runs/tiny"
    assert start_with(built_in()) == "memeworld"
    assert start_with(space.find("llava-hf/llava-1.5-13b-hf")) == "llava-hf/llava-1.5-13b-hf"


def test_its_files_alone_start_and_answer_with_the_environment_of_a_space(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "space"
    for name, file in space_files(space.find(str(model))).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / name)
    environment = {"SPACE_ID": "somebody/llava", "SYSTEM": "spaces", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    environment["LLAVA_FLAGS"] = f"--model {start_with(space.find(str(model)))}"
    with serving(log=tmp_path / "log", folder=folder, environment=environment) as at, Visitor(at) as visitor:
        assert not [part for part in visitor.config["components"] if part["type"] == "tabs"]
        outcome = visitor.ask("What?", model="run/tiny")
        assert (outcome.success, outcome.words.strip()) == (True, "")
        assert "token" in json.dumps(outcome.data)
        assert visitor.call("greet", []).data[0]["value"] == "run/tiny"
    assert not (folder / "runs" / "feedback").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs; it keeps what it is sent in `sent`."""

    sent: dict[str, Any]

    def do_GET(self) -> None:
        if self.path.endswith("/variables"):
            self._reply({key: {"value": value} for key, value in self.sent["variables"].items()})
        else:
            there = self.sent.get("there", [])
            self._reply([{"type": "file", "path": path, "size": 0, "oid": "0"} for path in there])

    def do_DELETE(self) -> None:
        self.sent["variables"].pop(self._body()["key"])
        self._reply({})

    def _body(self) -> dict[str, Any]:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path.endswith("/repos/create"):
            self.sent["create"] = json.loads(body)
            self._reply({"url": f"http://{self.headers['Host']}/spaces/me/llava", "name": "me/llava"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._reply({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            added = [line["value"] for line in lines if line["key"] == "file"]
            self.sent["files"] = {one["path"]: base64.b64decode(one["content"]) for one in added}
            self.sent["gone"] = {line["value"]["path"] for line in lines if line["key"] == "deletedFile"}
            address = f"http://{self.headers['Host']}/spaces/me/llava/commit/1"
            self._reply({"commitUrl": address, "commitOid": "1", "success": True})
        elif self.path.endswith("/variables"):
            variable = json.loads(body)
            self.sent["variables"][variable["key"]] = variable["value"]
            self._reply({})
        else:
            self._reply({})

    def _reply(self, body: Any) -> None:
        code = 200 if self.headers["Authorization"] == f"Bearer {TOKEN}" else 401
        data = json.dumps(body if code == 200 else {}).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    sent: dict[str, Any] = {"variables": {}}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"sent": sent}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(space, "HfApi", lambda: space_api(endpoint, sent.get("token", TOKEN)))
    yield sent
    server.shutdown()
    thread.join()
    server.server_close()


space_api = space.HfApi


def test_the_upload_sends_the_files_and_says_with_which_model_to_start(
    hub: dict[str, Any], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["space", "llava", "--model", "tiny", "--runs", str(model.parent)]) == 0
    assert (hub["create"]["name"], hub["create"]["type"], hub["create"]["sdk"]) == ("llava", "space", "gradio")
    assert hub["files"] == {name: file.read_bytes() for name, file in space_files(space.find(str(model))).items()}
    assert hub["variables"] == {"LLAVA_FLAGS": "--model runs/tiny"}
    told = capsys.readouterr().out
    assert "/spaces/me/llava" in told
    assert TOKEN not in told


def test_another_upload_takes_the_old_model_away_and_leaves_what_is_the_owners(
    hub: dict[str, Any], model: Path
) -> None:
    hub["variables"]["LLAVA_FLAGS"] = "--feedback --model runs/tiny --metrics"
    hub["there"] = [".gitattributes", "packages.txt", "app.py", "llava_app/left.py", "runs/tiny/card.json"]
    assert main(["space", "llava"]) == 0
    assert hub["gone"] == {"llava_app/left.py", "runs/tiny/card.json"}
    assert hub["variables"] == {"LLAVA_FLAGS": "--feedback --metrics"}
    assert main(["space", "llava", "--model", "tiny", "--runs", str(model.parent)]) == 0
    assert hub["gone"] == {"llava_app/left.py"}
    assert hub["variables"] == {"LLAVA_FLAGS": "--feedback --metrics --model runs/tiny"}


def test_a_space_that_had_a_model_alone_is_left_without_flags(hub: dict[str, Any]) -> None:
    hub["variables"]["LLAVA_FLAGS"] = "--model runs/tiny"
    assert main(["space", "llava"]) == 0
    assert hub["variables"] == {}


def test_a_login_is_written_into_what_is_uploaded_and_nowhere_else(hub: dict[str, Any]) -> None:
    assert main(["space", "llava", "--login"]) == 0
    sent, here = hub["files"], {name: file.read_bytes() for name, file in space_files(None).items()}
    assert {name for name in here if sent[name] != here[name]} == {"README.md", "requirements.txt"}
    before, matter = (yaml.safe_load(files["README.md"].decode().split("---")[1]) for files in (here, sent))
    assert matter == before | {"hf_oauth": True}
    lines = [line.split("#")[0].strip() for line in sent["requirements.txt"].decode().splitlines()]
    assert [Requirement(line).extras for line in lines].count({"oauth"}) == 1


def test_a_dry_run_sends_nothing(hub: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["space", "llava", "--dry-run"]) == 0
    assert (hub, "llava_app/ui/page.py" in capsys.readouterr().out.splitlines()) == ({"variables": {}}, True)


def test_a_refusal_of_the_hub_is_told_without_the_token(
    hub: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    hub["token"] = wrong = "hf_wrong_canary"
    assert main(["space", "llava"]) == 2
    told = capsys.readouterr().err
    assert "The Space llava could not be made" in told
    assert "hf auth login" in told
    assert wrong not in told


# The borrowed GPU. `spaces` is there on a Space alone: this stand-in sends arguments and pieces through pickle as its
# fork does, and raises what it raises when there is no GPU.


@pytest.fixture
def zero(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    def lend(*, duration: int) -> Any:
        def through_pickle(function: Any) -> Any:
            def called(*arguments: Any) -> Iterator[Any]:
                if not duration:
                    raise RuntimeError("quota exceeded")
                for item in function(*pickle.loads(pickle.dumps(arguments))):
                    yield pickle.loads(pickle.dumps(item))

            return called

        return through_pickle

    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=lend))
    module = import_module("llava_app.engine.zero")
    monkeypatch.setattr(module, "GPU", "cpu")
    yield module
    sys.modules.pop("llava_app.engine.zero")


def test_an_answer_comes_from_the_borrowed_gpu(zero: ModuleType) -> None:
    engine = zero.ZeroEngine(built_in())
    pieces = list(engine.answer(Conversation().ask("What?"), Sampling(temperature=0)))
    assert pieces[0] == Piece("", phase="queued")
    assert pieces[-1].finish == "stop"
    assert "".join(piece.text for piece in pieces) == "Please show me a picture first."


def test_what_a_person_is_told_in_the_fork_arrives(zero: ModuleType) -> None:
    with pytest.raises(ContextError, match="tokens"):
        list(zero.ZeroEngine(built_in()).answer(Conversation().ask("long " * 5000), Sampling()))


def test_no_gpu_is_told_in_words(zero: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "LONGEST", 0)
    with pytest.raises(BusyError, match="There is no GPU for this question now"):
        list(zero.ZeroEngine(built_in()).answer(Conversation().ask("What?"), Sampling()))
