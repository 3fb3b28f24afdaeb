"""The locked packages: they are what is asked for, and their audit never says clean of what it could not look up."""

import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.serving import PATIENCE, ROOT

LOCK = Path(__file__).parent / "requirements.lock"
Faults = dict[tuple[str, str], str]  # name and version → the fault's id
Service = tuple[str, Faults]  # its address, and what it knows
OLD = {("jinja2", "3.1.0"): "GHSA-h5c8-rqwp-cp95"}  # what the audit asks first


def lines(file: Path) -> list[str]:
    """The requirements in the file, without remarks."""
    stated = (line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in stated if line]


def test_the_lock_is_what_the_requirements_ask_for() -> None:
    locked = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines(LOCK))}
    asked = [Requirement(line) for line in lines(ROOT / "requirements.txt")]
    assert not [str(one) for one in asked if locked[canonicalize_name(one.name)] not in one.specifier]
    assert not [name for name, version in locked.items() if Version(version).local]
    assert {"authlib", "itsdangerous"} < set(locked)


def test_a_fault_that_is_explained_is_indeed_not_reached() -> None:
    explained = re.findall(r"^# explained: (\S+) (.*)$", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    code = "\n".join(
        path.read_text("utf-8") for top in ("llava_app", "finetune") for path in (ROOT / top).rglob("*.py")
    )
    assert explained
    for fault, why in explained:
        words = re.findall('"([^"]+)"', why)
        assert words, fault
        assert not [word for word in words if word.lower() in code.lower()], fault


class Osv(BaseHTTPRequestHandler):
    """As much of osv.dev as pip-audit asks for; it knows the faults in `known`."""

    known: Faults

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name, version = query["package"]["name"], query["version"]
        fault = self.known.get((name, version))
        affected = [{"package": {"name": name, "ecosystem": "PyPI"}, "ranges": []}]
        found = [{"id": fault, "summary": "bad", "affected": affected}] if fault else []
        body = json.dumps({"vulns": found} if found else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def osv() -> Iterator[Service]:
    """Its address, and what it knows."""
    known: Faults = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneOsv", (Osv,), {"known": known}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", known
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    lock = tmp_path / "small.lock"
    lock.write_text('# explained: GHSA-old "word" why\ntorch==2.13.0\npillow==12.3.0\n', encoding="utf-8")
    return lock


def audit(lock: Path, address: str) -> tuple[int, str]:
    """Exit code, and all that was said."""
    command = ["bash", str(ROOT / ".ci" / "audit"), str(lock)]
    told = subprocess.run(
        command, env=os.environ | {"OSV_URL": address}, capture_output=True, text=True, timeout=PATIENCE
    )
    return told.returncode, told.stdout + told.stderr


def test_without_its_service_the_audit_says_that_it_did_not_happen(lock: Path, osv: Service) -> None:
    for address in (osv[0], "http://127.0.0.1:9"):  # one that knows nothing, and none at all
        code, told = audit(lock, address)
        assert code == 0
        assert "SKIPPED" in told
        assert "No known vulnerabilities" not in told


def test_the_audit_finds_what_is_not_explained(lock: Path, osv: Service) -> None:
    address, known = osv
    known |= OLD
    assert audit(lock, address)[0] == 0
    known[("torch", "2.13.0")] = "GHSA-old"
    code, told = audit(lock, address)
    assert (code, "1 ignored" in told) == (0, True), told
    known[("pillow", "12.3.0")] = "GHSA-new"
    code, told = audit(lock, address)
    assert code == 1
    assert "GHSA-new" in told
    assert "GHSA-old" not in told
