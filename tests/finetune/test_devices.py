"""Steps of training on a pretended GPU: every tensor where it belongs, and the loss that the CPU finds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch.optim import SGD

from finetune import precision
from finetune.checkpoint import Run
from finetune.collate import Batch, StepCollator
from finetune.data import Example, Examples, read_records
from finetune.features import FeatureStore
from finetune.recipe import Recipe, load_recipe, recipe_from
from finetune.supervision import SupervisedLoss
from finetune.train import Course, _prepare, take_step
from llava_app.checkpoints import read_card
from llava_app.loading import Loaded, load
from tests.emulated_cuda import move


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def batches_of(loaded: Loaded, data: Path, recipe: Recipe) -> list[Batch]:
    """Two with pictures and one without."""
    records = read_records(data)
    pictures = [tuple(data.parent / name for name in record.get("image", ())) for record in records]
    examples = tuple(Example(record, paths, 0) for record, paths in zip(records, pictures, strict=True))
    encoded = Examples(examples, loaded.processor, max_length=512)
    processor = loaded.processor
    collator = StepCollator(processor.tokenizer.pad_token_id, processor.image_token_id, 4, recipe.packing)
    return collator([encoded[n] for n in (*range(8), *range(16, 20))])


def course(
    base: Path, data: Path, folder: Path, device: torch.device, *, stage: str = "instruct", **settings: Any
) -> tuple[Course, list[Batch]]:
    """A run of `stage` that has just begun, and the batches of its first step. 16 bits without autocast: see `cuda`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = recipe_from({**vars(load_recipe(f"memeworld_{stage}")), **settings})
    loaded = load(read_card(base), precision.loaded_in(read_card(base), recipe), device=torch.device("cpu"))
    batches = batches_of(loaded, data, recipe)
    torch.manual_seed(0)
    _prepare(loaded.model, recipe, precision.computed_in(recipe, bfloat16=True))
    accelerator = Accelerator(cpu=True)
    if device.type != "cpu":
        move(loaded.model)
        accelerator.state.device = PartialState().device = device
    weights = [weight for weight in loaded.model.parameters() if weight.requires_grad]
    optimizer = SGD([{"params": weights, "scale": 1.0}])
    model, optimizer = accelerator.prepare(SupervisedLoss(loaded.model).train(), optimizer)
    run = Run("mine", "base", data, data.parent, recipe)
    examples = Examples((), loaded.processor, max_length=512)
    features = FeatureStore(folder, 1e9) if recipe.feature_cache else None
    return Course(run, folder, accelerator, model, optimizer, examples, [], [], 10, features), batches


def figures(made: Course, batches: list[Batch]) -> list[float]:
    """Losses and norms of two steps."""
    supervised = sum(batch.supervised for batch in batches)
    both = [take_step(made, batches, supervised=supervised, rate=0.1) for _ in range(2)]
    return [figure for step in both for figure in step]


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True},
        {"packing": False},
        {"stage": "align", "feature_cache": 1},
        {"lora_rank": 4},
        {"vision_learning_rate": 1e-3},
        {"lora_rank": 4, "quantise": "4bit", "precision": "bfloat16"},
    ],
)
def test_steps_elsewhere_are_those_of_the_cpu(
    base: Path, data: Path, tmp_path: Path, learning_device: torch.device, settings: dict[str, Any]
) -> None:
    settings = {"precision": "float32", **settings}
    elsewhere = figures(*course(base, data, tmp_path / "there", learning_device, **settings))
    here = figures(*course(base, data, tmp_path / "here", torch.device("cpu"), **settings))
    assert elsewhere == pytest.approx(here, rel=1e-4 if settings["precision"] == "float32" else 0.05)


@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4, "quantise": "4bit"}])
def test_losses_in_16_bit_on_a_gpu(
    base: Path,
    data: Path,
    tmp_path: Path,
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    *,
    computed: torch.dtype,
    settings: dict[str, Any],
) -> None:
    exact, batches = course(base, data, tmp_path, torch.device("cpu"), precision="float32")
    with torch.no_grad():
        wanted = [exact.model(batch).item() for batch in batches]
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(precision, "computed_in", lambda *_, **__: computed)
    made, batches = course(base, data, tmp_path, cuda, precision="bfloat16", **settings)
    with torch.autocast("cuda", computed):
        losses = [made.model(batch.to(cuda)) for batch in batches]
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert [loss.item() for loss in losses] == pytest.approx(wanted, rel=0.01)
    assert [loss.item() for loss in losses] != wanted
