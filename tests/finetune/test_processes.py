"""Two processes learn what one does, with copies of the model and with the model shared out between them.

Micro-batches of one example: while one process reads a picture, the other reads text only; and in a step of seven
examples one process has a micro-batch more.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from finetune.__main__ import main
from finetune.assemble import assemble
from finetune.processes import share_out
from finetune.recipe import RECIPES, load_recipe
from llava_app.checkpoints import read_card
from llava_app.errors import TrainingError
from llava_app.loading import load

ROOT = Path(__file__).parent.parent.parent
CONFIGS = RECIPES / "accelerate"
FAST = ("precision=float32", "global_batch=7", "micro_batch=1", "epochs=2", "max_steps=5", "save_every=2")

# What each of the processes runs, one after the other, since importing takes longest.
SCRIPT = """
import json, os, signal, sys
import finetune.train
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from finetune.__main__ import main

copies, shared_out, resumed, variables = map(json.loads, sys.argv[1:])
def as_if_gpus():  # accelerate shares a model out among GPUs only; torch does it among processors too
    AcceleratorState._reset_state()
    PartialState().distributed_type = DistributedType.MULTI_GPU

assert main(copies) == 0
as_if_gpus()
os.environ.update(variables)
real, steps = finetune.train.take_step, []
def counted(*positional, **named):
    steps.append(real)
    if len(steps) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(*positional, **named)
finetune.train.take_step = counted
assert main(shared_out) == 130
as_if_gpus()
assert main(resumed) == 0
"""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="torch runs several processes on POSIX only")


def start(base: Path, data: Path, name: str) -> list[str]:
    return ["instruct", f"--base={base}", f"--data={data}", f"--name={name}", "--allow-refused=0.2", *FAST]


def variables(config: str) -> dict[str, str]:
    """What `accelerate launch --config_file` tells its processes."""
    parsed = launch_command_parser().parse_args(["--config_file", str(CONFIGS / config), "-m", "finetune"])
    told, *_ = _validate_launch_command(parsed)
    found = prepare_multi_gpu_env(told)
    return {name: value for name, value in found.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.fixture(scope="module")
def runs(tower: Path, language: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs one, two (copies) and parts (shared out, interrupted and resumed)."""
    folder = tmp_path_factory.mktemp("processes")
    base = folder / "base"
    assemble(tower, language, base, dtype=torch.float32)  # so that results can be compared closely
    script = folder / "run.py"
    script.write_text(SCRIPT, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    resumed = ["instruct", "--name=parts", "--resume"]
    given = (start(base, data, "two"), start(base, data, "parts"), resumed, variables("fsdp2.yaml"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, *map(json.dumps, given)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Stopped after step 3" in done.stdout
    assert "going on after step 3" in done.stdout
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*start(base, data, "one"), f"--runs={folder / 'runs'}"]) == 0
    return folder / "runs"


@pytest.mark.parametrize("name", ["two", "parts"])
def test_two_processes_learn_what_one_does(name: str, runs: Path) -> None:
    one, other = (load_file(runs / run / "model.safetensors") for run in ("one", name))
    assert one.keys() == other.keys()
    for key, weight in one.items():
        torch.testing.assert_close(other[key], weight, atol=1e-5, rtol=1e-4)
    alone, together = (_losses(runs / run / "log.jsonl") for run in ("one", name))
    assert alone == pytest.approx(together, rel=1e-5)


def _losses(log: Path) -> list[float]:
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [line.get("loss") or line["held_out_loss"] for line in lines]


def test_what_cannot_be_shared_out_is_said(base: Path, data: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    model = load(read_card(base), "float32").model
    for change in ("optimizer=adamw8bit", "feature_cache=1"):
        with pytest.raises(TrainingError, match=r"shared out among devices.*ddp\.yaml"):
            share_out(accelerator, model, load_recipe("memeworld_instruct", [change]))


@pytest.mark.parametrize("config", [path.name for path in CONFIGS.glob("*.yaml")])
def test_accelerate_reads_each_config(config: str) -> None:
    parsed = launch_command_parser().parse_args(["--config_file", str(CONFIGS / config), "-m", "finetune"])
    told, *_ = _validate_launch_command(parsed)
    assert told.num_processes == 8
    assert (told.multi_gpu, told.use_fsdp, told.use_deepspeed).count(True) == 1
