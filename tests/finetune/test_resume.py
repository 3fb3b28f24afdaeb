"""A run that is killed and resumed ends with the weights of one that was not, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.assemble import assemble
from finetune.interrupt import StopSignal

ROOT = Path(__file__).parent.parent.parent
SETTINGS = ("precision=float32", "global_batch=8", "micro_batch=4", "epochs=7", "save_every=5")  # 21 steps

# Sends a process a real signal at an exact place: before the given call of a function of the given module.
AT_A_CALL = """
import importlib, os, sys
module, name, number, signal = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
module = importlib.import_module(module)
real, calls = getattr(module, name), 0
def counted(*positional, **named):
    global calls
    calls += 1
    if calls == number:
        os.kill(os.getpid(), signal)
    return real(*positional, **named)
setattr(module, name, counted)
from finetune.__main__ import main
sys.exit(main(sys.argv[5:]))
"""


pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGKILL")


def finetune(folder: Path, *arguments: str, stop: tuple[str, str, int, int] | None = None) -> tuple[int, str]:
    """Run the command line in `folder`, interrupted where `stop` says; returns its exit code and what it printed."""
    program = ["-c", AT_A_CALL, *map(str, stop)] if stop else ["-m", "finetune"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *program, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def states(folder: Path) -> set[str]:
    return {path.name for path in (folder / "runs/mine/state").iterdir()}


def logged(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "runs/mine/log.jsonl").read_text(encoding="utf-8").splitlines()
    return [(line["step"], line.get("loss") or line["held_out_loss"]) for line in map(json.loads, lines)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_is_noted_and_a_second_one_obeyed(number: signal.Signals) -> None:
    obeyed: list[int] = []
    before = signal.signal(number, lambda number, _: obeyed.append(number))
    with StopSignal() as stop:
        os.kill(os.getpid(), number)
        assert (stop.asked, obeyed) == (True, [])
        os.kill(os.getpid(), number)
        assert obeyed == [number]
    signal.signal(number, before)


def test_interrupted_in_every_way_and_resumed_equals_uninterrupted(
    tmp_path: Path, tower: Path, language: Path, data: Path
) -> None:
    base = tmp_path / "base"
    assemble(tower, language, base, dtype=torch.float32)
    start = ("instruct", "--name", "mine", "--base", str(base), "--data", str(data), *SETTINGS)
    resume = ("instruct", "--name", "mine", "--resume")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    assert finetune(whole, *start)[0] == 0

    code, _ = finetune(broken, *start, stop=("finetune.train", "take_step", 8, signal.SIGKILL))
    assert (code, states(broken)) == (-signal.SIGKILL, {"step-5"})
    code, _ = finetune(broken, *resume, stop=("torch", "save", 2, signal.SIGKILL))  # while step-10 is being written
    assert (code, states(broken)) == (-signal.SIGKILL, {"step-5", "partial"})
    code, told = finetune(broken, *resume, stop=("finetune.train", "take_step", 8, signal.SIGINT))
    assert (code, states(broken)) == (130, {"step-10", "step-13"})
    assert "Stopped after step 13. To go on: python -m finetune instruct --name mine --resume" in told
    assert "Traceback" not in told
    assert finetune(broken, *resume)[0] == 0

    assert logged(broken) == logged(whole)
    mine, theirs = (load_file(folder / "runs/mine/model.safetensors") for folder in (broken, whole))
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(theirs[name]) for name in theirs)
    assert (broken / "runs/mine/card.json").exists()
    assert not (broken / "runs/mine/state").exists()
