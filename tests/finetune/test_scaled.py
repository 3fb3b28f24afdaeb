"""float16 with scaled gradients, as on a GPU without bfloat16. torch can do it on a CPU; only accelerate says no."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from finetune.checkpoint import load_state, save_state
from finetune.precision import keep
from finetune.recipe import load_recipe
from finetune.stages import trainable
from finetune.train import Course, take_step
from llava_app.checkpoints import read_card
from llava_app.loading import load
from tests.finetune.test_train import batches_of, course


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def scaling(scale: float) -> Accelerator:
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator


def step(base: Path, data: Path, accelerator: Accelerator | None) -> tuple[float, float, Course]:
    """A step in float16 or, without an accelerator that scales, in float32."""
    loaded = load(read_card(base), "float32")
    batches = batches_of(loaded, data, micro=4)
    if accelerator:
        keep(loaded.model, load_recipe("memeworld_instruct"), torch.float16)
    made = course(loaded, accelerator=accelerator)
    return *take_step(made, batches, supervised=sum(batch.supervised for batch in batches), rate=0.1), made


def test_a_scaled_step_in_float16_is_nearly_that_of_float32(base: Path, data: Path) -> None:
    before = load(read_card(base), "float32").model.state_dict()
    loss, norm, exact = step(base, data, None)
    AcceleratorState._reset_state(reset_partial_state=True)
    half_loss, half_norm, half = step(base, data, scaling(2.0**10))
    assert half_loss == pytest.approx(loss, rel=1e-3)
    assert half_norm == pytest.approx(norm, rel=1e-2)
    for name, weight in trainable(half.llava).items():
        assert weight.dtype == torch.float32
        way, wanted = weight - before[name], exact.llava.get_parameter(name) - before[name]
        assert (way - wanted).norm() < 0.05 * wanted.norm(), name


def test_a_step_whose_gradients_overflow_moves_nothing_and_lowers_the_scale(base: Path, data: Path) -> None:
    before = load(read_card(base), "float32").model.state_dict()
    accelerator = scaling(2.0**40)
    _, _, made = step(base, data, accelerator)
    assert all(torch.equal(weight, before[name]) for name, weight in trainable(made.llava).items())
    assert accelerator.scaler.get_scale() == 2.0**39


def test_the_scale_survives_a_resume(base: Path, data: Path, tmp_path: Path) -> None:
    accelerator = scaling(2.0**40)
    _, _, made = step(base, data, accelerator)
    learning = trainable(made.llava)
    save_state(tmp_path, 1, learning=learning, optimizer=made.optimizer, accelerator=accelerator)
    accelerator.scaler.load_state_dict(torch.amp.GradScaler("cpu", init_scale=4.0).state_dict())
    state = tmp_path / "state" / "step-1"
    load_state(state, learning=learning, optimizer=made.optimizer, accelerator=accelerator)
    assert accelerator.scaler.get_scale() == 2.0**39
