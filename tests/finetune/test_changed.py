"""What may change before a run goes on: pictures can get lost; the data's records and the base cannot."""

import json
import re
import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

import finetune.train
from finetune.__main__ import main
from finetune.checkpoint import load_run

SETTINGS = ("precision=float32", "global_batch=4", "micro_batch=4", "save_every=1", "max_steps=4", "epochs=2")
RUN = Path("runs/mine")


@pytest.fixture(autouse=True)
def records(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the data in the folder that commands run in, beside a copy of the base."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "base")
    shutil.copytree(data.parent, "data")
    return Path("data") / data.name


def instruct(*arguments: str) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return main(["instruct", "--name=mine", *arguments])


def begin(records: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    """Two steps of a run, which then ends as if it were killed."""
    real, calls = finetune.train.take_step, []

    def killed(*positional: object, **named: object) -> object:
        calls.append(named)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*positional, **named)

    with monkeypatch.context() as patched:
        patched.setattr(finetune.train, "take_step", killed)
        assert instruct("--base=base", f"--data={records}", *SETTINGS, *more) == 130


def test_a_picture_that_is_lost_is_skipped_when_the_run_goes_on(
    records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data/2.png").unlink()
    begin(records, monkeypatch, "--allow-refused=0.07")
    assert load_run(RUN).checked["records"] == 19
    shutil.copy("data/0.png", "data/2.png")  # it stays refused: the run has the examples it had
    for number in range(3, 10):
        Path(f"data/{number}.png").unlink()
    assert instruct("--resume") == 2
    told = capsys.readouterr().err
    assert re.search(r"The pictures of \d of 19 examples cannot be read, more than 7\.0%", told)
    assert "--resume --allow-refused FRACTION" in told
    assert instruct("--resume", "--allow-refused=0.5") == 0
    assert "examples were skipped: a picture" in capsys.readouterr().out
    assert load_run(RUN).allow_refused == 0.5
    steps = [json.loads(line) for line in (RUN / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3, 4]


def test_a_run_does_not_go_on_from_another_base(
    records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(records, monkeypatch, "--allow-refused=0.2")
    weights, card = Path("base/model.safetensors"), Path("base/card.json")
    before = card.read_bytes()
    card.write_bytes(before.replace(b'"name": "base"', b'"name": "new"'))
    assert card.read_bytes() != before
    assert instruct("--resume") == 2
    assert "The base base changed since mine started" in capsys.readouterr().err
    card.write_bytes(before)
    save_file({name: 2 * weight for name, weight in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert instruct("--resume") == 2
    assert "model.safetensors of base changed" in capsys.readouterr().err
