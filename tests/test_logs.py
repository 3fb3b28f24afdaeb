import json
import logging
from collections.abc import Iterator

import pytest

from llava_app.chat import Account
from llava_app.logs import start_log

ACCOUNT = Account("1a2b3c4d", "LLaVA", "stop", 2, 1, 30, 1.25, None)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Afterwards the loggers are as they were."""
    root, app = logging.getLogger(), logging.getLogger("llava_app")
    before = root.handlers[:], root.level, app.level
    yield
    root.handlers, root.level, app.level = before


def test_a_line_names_the_request_and_what_was_counted(capsys: pytest.CaptureFixture[str]) -> None:
    start_log(as_json=False)
    logging.getLogger("llava_app.chat").info("Question answered", extra={"account": ACCOUNT})
    line = capsys.readouterr().err
    counted = "request=1a2b3c4d model=LLaVA outcome=stop turns=2 pictures=1 tokens=30 seconds=1.25\n"
    assert line.endswith(f"INFO Question answered {counted}")


def test_an_object_holds_the_trace_of_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    start_log(as_json=True)
    try:
        raise ValueError("here")
    except ValueError:
        logging.getLogger("llava_app").exception("Error %s", 7)
    told = json.loads(capsys.readouterr().err)
    assert (told["level"], told["from"], told["message"]) == ("ERROR", "llava_app", "Error 7")
    assert "ValueError: here" in told["trace"]


def test_other_libraries_are_heard_only_when_something_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    start_log(as_json=True)
    logging.getLogger("httpx").info("GET https://far.away.example/")
    logging.getLogger("httpx").warning("slow")
    assert json.loads(capsys.readouterr().err)["message"] == "slow"
