"""float16 with scaled gradients, as on a GPU without bfloat16. torch can do it on a CPU; only accelerate says no."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from bitsandbytes.nn import Linear4bit

from finetune.adapters import add_adapters
from finetune.checkpoint import load_state, save_state
from finetune.optimise import make_optimizer
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


def qlora_step(
    base: Path, data: Path, accelerator: Accelerator, *, computed: torch.dtype, optimizer: str
) -> tuple[float, float, Course]:
    """A step of QLoRA with its own optimiser. bitsandbytes computes as on a GPU that has, or has not, bfloat16."""
    loaded = load(read_card(base), "4bit")
    recipe = load_recipe("memeworld_instruct", ["lora_rank=4", "quantise=4bit", f"optimizer={optimizer}"])
    batches = batches_of(loaded, data, micro=4)
    torch.manual_seed(0)
    add_adapters(loaded.model, recipe)
    keep(loaded.model, recipe, computed)
    for module in loaded.model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = computed
    made = course(loaded, accelerator=accelerator, **asdict(recipe))
    accelerator._optimizers.clear()  # the course's own would unscale the gradients a second time
    made = replace(made, optimizer=accelerator.prepare(make_optimizer(loaded.model, recipe)))
    return *take_step(made, batches, supervised=sum(batch.supervised for batch in batches), rate=1e-3), made


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_qlora_without_bfloat16_takes_nearly_the_same_step(base: Path, data: Path, optimizer: str) -> None:
    half = qlora_step(base, data, scaling(2.0**10), computed=torch.float16, optimizer=optimizer)
    AcceleratorState._reset_state(reset_partial_state=True)
    usual = Accelerator(cpu=True, mixed_precision="bf16")
    wanted = qlora_step(base, data, usual, computed=torch.bfloat16, optimizer=optimizer)
    assert half[:2] == pytest.approx(wanted[:2], rel=0.03)
    learned, theirs = trainable(half[2].llava), trainable(wanted[2].llava)
    assert {weight.dtype for weight in learned.values()} == {torch.float32}
    moved = [name for name in learned if ".lora_B." in name]
    assert len(moved) == 14
    for name in moved:  # from zero, by the rate at most
        assert float(learned[name].detach().abs().max()) == pytest.approx(1e-3, rel=0.01)
        assert (learned[name].sign() == theirs[name].sign()).float().mean() > 0.9


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_qlora_without_bfloat16_skips_a_step_that_overflows(base: Path, data: Path, optimizer: str) -> None:
    accelerator = scaling(2.0**40)
    _, _, made = qlora_step(base, data, accelerator, computed=torch.float16, optimizer=optimizer)
    learned = trainable(made.llava)
    assert not any(learned[name].any() for name in learned if ".lora_B." in name)
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
