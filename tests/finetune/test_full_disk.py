"""A full disk stops a run; what was saved before is whole, and the run goes on from it when there is room."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import finetune.train
from finetune.__main__ import main
from finetune.assemble import assemble
from finetune.held_out import Evaluation
from finetune.log import Log
from llava_app.errors import TrainingError

resource = pytest.importorskip("resource", reason="Windows cannot limit the size of a file")

ROOM = 200_000  # bytes that a file may have; a state of the tiny model has more, its log less


@pytest.fixture
def exact(tower: Path, language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base stored in float32, beside which commands run."""
    monkeypatch.chdir(tmp_path)
    assemble(tower, language, tmp_path / "base", dtype=torch.float32)
    return tmp_path / "base"


@contextmanager
def little_room() -> Iterator[None]:
    """Real writes fail, with EFBIG instead of ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def finetune_in(*arguments: str) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return main(["instruct", *arguments])


def start(base: Path, data: Path, name: str) -> list[str]:
    settings = ["precision=float32", "global_batch=8", "micro_batch=4", "epochs=2", "max_steps=5", "save_every=2"]
    return [f"--base={base}", f"--data={data}", f"--name={name}", "--allow-refused=0.2", *settings]


def test_a_full_disk_leaves_the_last_state_whole_and_the_run_goes_on(
    exact: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune_in(*start(exact, data, "whole")) == 0
    take_step, rates = finetune.train.take_step, []

    def then_full(*positional: object, rate: float, **named: object) -> object:
        rates.append(rate)
        if len(rates) == 4:
            until_the_end.enter_context(little_room())
        return take_step(*positional, rate=rate, **named)

    with monkeypatch.context() as patched, ExitStack() as until_the_end:
        patched.setattr(finetune.train, "take_step", then_full)
        assert finetune_in(*start(exact, data, "full")) == 2
    told = capsys.readouterr().err
    assert "state cannot be written" in told
    assert "make room, then go on with --resume" in told
    assert [path.name for path in (tmp_path / "runs/full/state").iterdir()] == ["step-2"]

    assert finetune_in("--name=full", "--resume") == 0
    one, other = (load_file(tmp_path / "runs" / name / "model.safetensors") for name in ("whole", "full"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_disk_that_is_full_before_is_found_out_before_training(
    exact: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with little_room():
        assert finetune_in(*start(exact, data, "mine")) == 2
    assert "The model cannot be saved in" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_log_without_room_says_so() -> None:
    with Log(Path("/dev/full"), writes=True) as log, pytest.raises(TrainingError, match=r"No space left.*--resume"):
        log.write(Evaluation(1, 2.0, []))
