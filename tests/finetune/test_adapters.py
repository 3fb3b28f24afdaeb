"""LoRA and QLoRA: what learns, what is saved, and that it answers as it was trained."""

import gc
import json
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from finetune.__main__ import main
from finetune.adapters import add_adapters
from finetune.recipe import load_recipe
from finetune.stages import apply_stage, part_of, trainable
from llava_app.checkpoints import built_in, find, read_card, write_card
from llava_app.conversation import Conversation
from llava_app.engine import Sampling
from llava_app.engine.local import LocalEngine
from llava_app.errors import ModelError
from llava_app.images import Picture
from llava_app.loading import Shelf, load

FAST = ("precision=float32", "global_batch=8", "micro_batch=4", "lora_rank=4", "lora_alpha=8", "learning_rate=1e-2")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands run in."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(base: Path, data: Path, *more: str) -> int:
    return main(["instruct", "--base", str(base), "--data", str(data), "--name", "mine", *FAST, *more])


def logits(model: LlavaForConditionalGeneration) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None] + 3).logits.float()


def test_adapters_are_on_every_matrix_of_the_language_model_and_nowhere_else(base: Path) -> None:
    model = load(read_card(base), "float32").model
    before = logits(model)
    recipe = load_recipe("memeworld_instruct", FAST)
    add_adapters(model, recipe)
    learning = apply_stage(model, recipe)
    names = [name for name in trainable(model) if ".lora_" in name]
    assert len(names) == 2 * 7 * 2  # two matrices, seven places, two layers
    assert {part_of(name) for name in names} == {"language_model"}
    assert all(".lora_" in name or part_of(name) == "projector" for name in trainable(model))
    assert learning["projector"] == sum(w.numel() for w in model.model.multi_modal_projector.parameters())
    assert torch.equal(logits(model.eval()), before)  # untrained adapters change nothing


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
def test_a_lora_run_is_small_answers_on_its_base_and_peft_reads_it(base: Path, data: Path, folder: Path) -> None:
    assert run(base, data, "max_steps=4") == 0
    card = find("mine")
    assert not list((folder / "runs/mine").glob("model*.safetensors"))
    served = load(card, "float32")
    assert not torch.allclose(logits(served.model), logits(load(read_card(base), "float32").model), atol=1e-3)
    plain = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, folder / "runs/mine").eval()
    torch.testing.assert_close(logits(theirs), logits(served.model))
    projector = load_file(folder / "runs/mine/adapter_model.safetensors")
    name = "model.multi_modal_projector.linear_1.weight"
    assert torch.equal(projector[f"base_model.model.{name}"], served.model.get_parameter(name))
    engine = LocalEngine(served)
    pieces = list(engine.answer(Conversation().ask("Which colour?"), Sampling(temperature=0, max_new_tokens=5)))
    engine.close()
    assert pieces[-1].finish


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("more", [(), ("gradient_checkpointing=true", "quantise=4bit", "precision=bfloat16")])
def test_an_adapter_whose_projector_was_frozen_has_that_of_its_base(
    base: Path, data: Path, more: tuple[str, ...], folder: Path
) -> None:
    assert run(base, data, "max_steps=2", "frozen=projector", *more) == 0
    adapters = load_file(folder / "runs/mine/adapter_model.safetensors")
    assert all(".lora_" in name for name in adapters)
    assert all(value.abs().max() > 0 for name, value in adapters.items() if ".lora_B." in name)
    served, before = load(find("mine"), "float32").model, load(read_card(base), "float32").model
    projector = "model.multi_modal_projector.linear_1.weight"
    assert torch.equal(served.get_parameter(projector), before.get_parameter(projector))
    theirs = PeftModel.from_pretrained(before, folder / "runs/mine").eval()
    torch.testing.assert_close(logits(theirs), logits(served))


def answer(engine: LocalEngine) -> str:
    asked = Conversation().ask("Which colour?", [Picture(Image.new("RGB", (64, 64), "red"), "red")])
    return "".join(piece.text for piece in engine.answer(asked, Sampling(temperature=0, max_new_tokens=12)))


@pytest.mark.parametrize("precision", ["float32", "8bit", "4bit"])
@pytest.mark.parametrize("base_first", [True, False])
def test_a_base_and_its_adapter_share_weights_and_answer_as_alone(
    base: Path, data: Path, folder: Path, precision: str, base_first: bool
) -> None:
    assert run(base, data, "max_steps=4") == 0
    cards = [read_card(base), find("mine")]
    alone = []
    for card in cards:
        engine = LocalEngine(load(card, precision))
        alone.append(answer(engine))
        engine.close()
    shelf = Shelf()
    order = cards if base_first else cards[::-1]
    opened, engines = {}, {}
    for card in order:  # the engine of one has taken the weights over when the other comes
        opened[card] = load(card, precision, shelf=shelf)
        engines[card] = LocalEngine(opened[card])
    assert [answer(engines[card]) for card in cards] == alone
    assert alone[0] != alone[1]
    ours, theirs = (opened[card] for card in cards)
    shared = {id(weight) for weight in theirs.model.parameters()} & {id(weight) for weight in ours.model.parameters()}
    assert len(shared) == sum(part_of(name) != "projector" for name, _ in ours.model.named_parameters())
    assert theirs.weights is ours.weights
    for engine in engines.values():
        engine.close()


def test_weights_wait_on_the_shelf_until_something_else_is_loaded(base: Path, data: Path, folder: Path) -> None:
    assert run(base, data, "max_steps=1") == 0
    shelf = Shelf()
    first = load(read_card(base), "float32", shelf=shelf)
    known = weakref.ref(first.weights)
    del first
    assert load(find("mine"), "float32", shelf=shelf).weights is known()
    load(built_in(), "float32", shelf=shelf)
    gc.collect()
    assert known() is None


def test_weights_that_were_written_anew_are_read_anew(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")
    shelf = Shelf()
    first = load(read_card(copy), "float32", shelf=shelf).weights
    os.utime(copy / "model.safetensors")
    assert load(read_card(copy), "float32", shelf=shelf).weights is not first


def test_adapters_of_another_kind_are_refused(base: Path, data: Path, folder: Path) -> None:
    assert run(base, data, "max_steps=1") == 0
    path = folder / "runs/mine/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"use_dora": True}), encoding="utf-8")
    write_card(path.parent, read_card(path.parent))
    with pytest.raises(ModelError, match="trained with use_dora, which this app does not know"):
        load(find("mine"), "float32")


@pytest.mark.parametrize("more", [("optimizer=adamw8bit",), ("gradient_checkpointing=true",)])
def test_a_run_on_a_4_bit_base_learns(base: Path, data: Path, more: tuple[str, ...], folder: Path) -> None:
    assert run(base, data, "quantise=4bit", "precision=bfloat16", "max_steps=2", *more) == 0
    adapters = load_file(folder / "runs/mine/adapter_model.safetensors")
    learned = [value for name, value in adapters.items() if ".lora_B." in name]
    assert len(learned) == 14
    assert all(value.abs().max() > 0 for value in learned)  # they begin at zero
    four_bit, full = load(find("mine"), "4bit").model, load(find("mine"), "float32").model
    assert type(four_bit.model.language_model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert logits(four_bit).isfinite().all()
    assert logits(full).isfinite().all()


def test_an_adapter_without_its_base_or_on_another_one_is_refused(base: Path, data: Path, folder: Path) -> None:
    assert run(base, data, "max_steps=1") == 0
    card = find("mine")
    path = folder / "runs/mine/adapter_config.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(str(base), "nowhere"), encoding="utf-8")
    write_card(path.parent, replace(card, base="nowhere"))
    with pytest.raises(ModelError, match=r"adapter of nowhere, which is not here"):
        load(read_card(path.parent), "float32")
    path.write_text(text, encoding="utf-8")
    write_card(folder / "runs/mine", replace(card, base_revision="0" * 64))
    with pytest.raises(ModelError, match="as it was then"):
        load(find("mine"), "float32")
