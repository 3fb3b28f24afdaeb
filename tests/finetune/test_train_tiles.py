"""A LLaVA that sees tiles learns on them: the same loss as the model's own, and the ends of rows learn too."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from finetune.__main__ import main
from finetune.assemble import assemble
from finetune.collate import StepCollator
from finetune.data import Example, Examples, read_records
from finetune.packing import use_packing
from finetune.recipe import load_recipe
from finetune.supervision import SupervisedLoss
from llava_app.checkpoints import read_card
from llava_app.errors import RecipeError
from llava_app.loading import load
from tests.finetune.conftest import record

CLASSES = {"anyres": "llava_next", "anyres_max_9": "llava_onevision"}


@pytest.fixture(params=CLASSES)
def tiled(
    request: pytest.FixtureRequest, tmp_path: Path, tower: Path, language: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(tmp_path)
    assemble(tower, language, tmp_path / "tiled", image_mode=request.param, dtype=torch.float32)
    return tmp_path / "tiled"


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_the_models_own(tiled: Path, data: Path, *, packing: bool) -> None:
    loaded = load(read_card(tiled), "float32")
    both = record("both", ["What changed?", "All."], ["0.png", "1.png"])
    records = [*read_records(data)[:3], both, *read_records(data)[-1:]]
    examples = tuple(Example(each, tuple(data.parent / name for name in each["image"]), 0) for each in records)
    encoded = Examples(examples, loaded.processor, max_length=512)
    theirs = 0.0
    for one in (encoded[number] for number in range(len(examples))):
        labels = one.input_ids.where(one.supervised, -100)[None]
        inputs = {"input_ids": one.input_ids[None], "pixel_values": one.pixel_values, **one.shapes}
        theirs += float(loaded.model(**inputs, labels=labels).loss.detach() * one.supervised[1:].sum())
    use_packing(loaded.model, 512)
    processor = loaded.processor
    collator = StepCollator(processor.tokenizer.pad_token_id, processor.image_token_id, 5, packing)
    (batch,) = collator([encoded[n] for n in range(5)])
    assert float(SupervisedLoss(loaded.model)(batch).detach()) == pytest.approx(theirs, rel=1e-4)


def test_both_stages_train_on_tiles_and_the_card_says_so(tiled: Path, data: Path) -> None:
    settings = ["--data", str(data), "--allow-refused", "0.2", "image_mode=anyres", "precision=float32", "max_steps=2"]
    batch = ["global_batch=4", "micro_batch=2"]
    assert main(["align", "--base", str(tiled), "--name", "first", *settings, *batch]) == 0
    assert main(["instruct", "--base", "runs/first", "--name", "second", *settings, *batch]) == 0
    cards = [read_card(Path("runs") / name) for name in ("first", "second")]
    assert [card.image_mode for card in cards] == ["anyres", "anyres"]
    newlines = [load_file(path / "model.safetensors")["image_newline"] for path in (tiled, Path("runs/second"))]
    assert not torch.equal(*newlines)
    trained = load(cards[1], "float32").model.config
    assert trained.model_type == load(read_card(tiled), "float32").model.config.model_type
    assert trained.model_type in CLASSES.values()


def test_adapters_and_tiles_are_not_combined() -> None:
    with pytest.raises(RecipeError, match="row ends no adapter holds"):
        load_recipe("memeworld_instruct", ["lora_rank=4", "image_mode=anyres"])
