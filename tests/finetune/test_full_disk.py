"""A full disk stops a run; what was saved before is whole, and the run goes on from it when there is room."""

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import finetune.train
from finetune import checkpoint
from finetune.__main__ import main
from finetune.assemble import assemble
from finetune.checkpoint import cut_log
from finetune.held_out import Evaluation
from finetune.log import Log
from finetune.output import Output
from finetune.recipe import Recipe, save_recipe
from llava_app.checkpoints import find
from llava_app.errors import TrainingError
from tests.disks import files_of_at_most

resource = pytest.importorskip("resource", reason="Windows cannot limit the size of a file")

LORA = ("lora_rank=4", "lora_dropout=0.3", "learning_rate=1e-2", "optimizer=adamw8bit")


@pytest.fixture
def exact(tower: Path, language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base stored in float32, beside which commands run."""
    monkeypatch.chdir(tmp_path)
    assemble(tower, language, tmp_path / "base", dtype=torch.float32)
    return tmp_path / "base"


def in_little_room(real: Callable[..., Any], *, call: int, size: int) -> Callable[..., Any]:
    """As `real`, whose call of that number (1, 2 …) cannot write files beyond `size` bytes."""
    calls = []

    def limited(*positional: Any, **named: Any) -> Any:
        calls.append(named)
        with files_of_at_most(size if len(calls) == call else resource.RLIM_INFINITY):
            return real(*positional, **named)

    return limited


def finetune_in(*arguments: str) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return main(["instruct", *arguments])


def start(base: Path, data: Path, name: str) -> list[str]:
    settings = ["precision=float32", "global_batch=8", "micro_batch=4", "epochs=2", "max_steps=5", "save_every=2"]
    return [f"--base={base}", f"--data={data}", f"--name={name}", "--allow-refused=0.2", *settings]


def learned(name: str) -> dict[str, torch.Tensor]:
    """The weights of a finished run."""
    (file,) = Path("runs", name).glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("how", [(), LORA], ids=["whole", "LoRA"])
def test_a_full_disk_leaves_the_last_state_whole_and_the_run_goes_on(
    how: tuple[str, ...],
    exact: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert finetune_in(*start(exact, data, "whole"), *how) == 0
    limited = in_little_room(finetune.train._save_state, call=2, size=2000)
    with monkeypatch.context() as patched:
        patched.setattr(finetune.train, "_save_state", limited)
        assert finetune_in(*start(exact, data, "full"), *how) == 2
    told = capsys.readouterr().err
    assert "state cannot be written" in told
    assert "make room, then go on with --resume" in told
    assert [path.name for path in Path("runs/full/state").iterdir()] == ["step-2"]

    assert finetune_in("--name=full", "--resume") == 0
    one, other = learned("whole"), learned("full")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("owner", "name", "call"), [(Output, "save", 2), (finetune.train, "write_card", 1)], ids=["model", "card"]
)
def test_a_run_that_cannot_write_its_model_goes_on_later(
    owner: object,
    name: str,
    call: int,
    exact: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, in_little_room(getattr(owner, name), call=call, size=200))
        assert finetune_in(*start(exact, data, "full")) == 2
    assert re.search("cannot be written|The disk is full", capsys.readouterr().err)
    assert not Path("runs/full/card.json").exists()
    assert finetune_in("--name=full", "--resume") == 0
    assert find("full").stage == "instruct"


def test_a_run_that_cannot_write_its_settings_can_be_started_anew(
    exact: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save_recipe_and_fill(made: Recipe, path: Path) -> None:
        save_recipe(made, path)
        until_the_end.enter_context(files_of_at_most(100))

    with monkeypatch.context() as patched, ExitStack() as until_the_end:
        patched.setattr(checkpoint, "save_recipe", save_recipe_and_fill)
        assert finetune_in(*start(exact, data, "full")) == 2
    assert "The disk is full" in capsys.readouterr().err
    assert Path("runs/full/recipe.yaml").exists()
    assert finetune_in(*start(exact, data, "full"), "max_steps=1") == 0


def test_a_disk_that_is_full_before_is_found_out_before_training(
    exact: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with files_of_at_most(200_000):  # the tiny model has more
        assert finetune_in(*start(exact, data, "mine")) == 2
    assert "The model cannot be saved in" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_log_without_room_says_so() -> None:
    with Log(Path("/dev/full"), writes=True) as log, pytest.raises(TrainingError, match=r"No space left.*--resume"):
        log.write(Evaluation(1, 2.0, []))


def test_half_a_line_in_the_log_is_found_out_and_dropped_without_room(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Log(path, writes=True) as log:
        log.write(Evaluation(1, 2.0, []))
        room = path.stat().st_size + 20
        with files_of_at_most(room), pytest.raises(TrainingError, match=r"No space left.*--resume"):
            log.write(Evaluation(2, 1.0, []))
    assert path.stat().st_size == room
    with files_of_at_most(0):
        cut_log(tmp_path, 1)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]
