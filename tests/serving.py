"""The real app in a process of its own."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PATIENCE = 90  # s, for a machine that is busy with other things


@dataclass(frozen=True)
class App:
    """An app that answers at `address`."""

    address: str
    process: subprocess.Popen[bytes]


@contextmanager
def serving(*flags: str, log: Path, **more: Any) -> Iterator[str]:
    """The address of an app; as `running`."""
    with running(*flags, log=log, **more) as app:
        yield app.address


@contextmanager
def running(*flags: str, log: Path, folder: Path = ROOT, environment: Mapping[str, str] | None = None) -> Iterator[App]:
    """Start app.py of `folder` on a free port with `flags` and a further `environment`, its output in `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("wb") as output:
        command = [sys.executable, "app.py", "--port", str(port), *flags]
        around = os.environ | (environment or {})
        app = subprocess.Popen(command, cwd=folder, env=around, stdout=output, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}/"
    try:
        _wait_for(address, app, log)
        yield App(address, app)
    finally:
        app.kill()
        app.wait()


def _wait_for(address: str, app: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and app.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the app did not answer at {address}:\n{log.read_text(encoding='utf-8')}")
