import pytest

import app
from llava_app.loading import PRECISIONS


def test_the_page_is_for_this_machine_only_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACE_ID", raising=False)
    flags = app.parse([])
    assert (flags.model, flags.precision, flags.host, flags.port) == (None, "auto", "127.0.0.1", 7860)
    assert str(flags.runs) == "runs"


def test_on_a_space_the_page_is_for_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "somebody/llava")
    assert app.parse([]).host == "0.0.0.0"


def test_the_precisions_are_those_that_loading_knows() -> None:
    assert app.PRECISIONS == PRECISIONS


def test_a_precision_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app.parse(["--precision", "5bit"])
    assert "5bit" in capsys.readouterr().err


def test_a_model_that_does_not_exist_is_refused_before_anything_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["app.py", "--model", "no-such-model"])
    with pytest.raises(SystemExit, match="There is no model “no-such-model”"):
        app.main()
