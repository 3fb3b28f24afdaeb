"""In which numbers each part of a model is kept, computed and saved."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from finetune.__main__ import main
from finetune.adapters import add_adapters
from finetune.precision import ACCELERATE, computed_in, keep, loaded_in
from finetune.recipe import Recipe, load_recipe
from finetune.stages import PARTS, apply_stage, part_of
from llava_app.checkpoints import find, read_card, write_card
from llava_app.errors import TrainingError
from llava_app.loading import load

HALF, WHOLE = torch.bfloat16, torch.float32
LORA = ("lora_rank=4", "lora_alpha=8")
CASES = {  # stage and changes: numbers of the tower, the projector, the language model, the adapters
    ("align",): (HALF, WHOLE, HALF, None),
    ("instruct",): (HALF, WHOLE, WHOLE, None),
    ("instruct", "vision_learning_rate=1e-5"): (WHOLE, WHOLE, WHOLE, None),
    ("instruct", "frozen=projector"): (HALF, HALF, WHOLE, None),
    ("instruct", "frozen=language_model"): (HALF, WHOLE, HALF, None),
    ("instruct", *LORA): (HALF, WHOLE, HALF, WHOLE),
    ("instruct", *LORA, "frozen=projector"): (HALF, HALF, HALF, WHOLE),
    ("instruct", *LORA, "quantise=4bit"): (HALF, WHOLE, HALF, HALF),
    ("instruct", "precision=float32"): (WHOLE, WHOLE, WHOLE, None),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands run in."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepared(base: Path, recipe: Recipe, computed: torch.dtype) -> LlavaForConditionalGeneration:
    model = load(read_card(base), loaded_in(read_card(base), recipe)).model
    if recipe.lora_rank:
        add_adapters(model, recipe)
    keep(model, recipe, computed)
    apply_stage(model, recipe)
    return model


def kept(model: LlavaForConditionalGeneration) -> dict[str, set[torch.dtype]]:
    found: dict[str, set[torch.dtype]] = {part: set() for part in (*PARTS, "adapters")}
    for name, weight in model.named_parameters():
        if weight.is_floating_point():  # what is quantised lies in bytes
            found["adapters" if ".lora_" in name else part_of(name)].add(weight.dtype)
    return found


@pytest.mark.parametrize(("how", "wanted"), CASES.items(), ids=map(" ".join, CASES))
def test_each_part_is_kept_as_planned(how: tuple[str, ...], wanted: tuple[torch.dtype, ...], base: Path) -> None:
    recipe = load_recipe(f"memeworld_{how[0]}", how[1:])
    model = prepared(base, recipe, computed_in(recipe, bfloat16=True))
    parts = ("vision_tower", "projector", "language_model", "adapters")
    assert kept(model) == {part: {dtype} - {None} for part, dtype in zip(parts, wanted, strict=True)}


def test_what_learns_starts_exactly_as_it_is_stored(base: Path) -> None:
    model = prepared(base, load_recipe("memeworld_instruct"), HALF)
    exact = load(read_card(base), "float32").model.state_dict()
    for name, weight in model.state_dict().items():
        wanted = exact[name] if part_of(name) != "vision_tower" else exact[name].to(weight.dtype)
        assert torch.equal(weight, wanted), name


@pytest.mark.parametrize("quantise", ["none", "4bit"])
def test_without_bfloat16_nothing_that_learns_is_in_float16(base: Path, quantise: str) -> None:
    recipe = load_recipe("memeworld_instruct", [*LORA, f"quantise={quantise}"])
    computed = computed_in(recipe, bfloat16=False)
    assert ACCELERATE[computed] == "fp16"
    model = prepared(base, recipe, computed)
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {WHOLE}
    assert kept(model)["vision_tower"] == {torch.float16}


def test_the_numbers_to_compute_in_follow_recipe_and_machine() -> None:
    recipe = load_recipe("memeworld_align")
    whole = replace(recipe, precision="float32")
    assert [computed_in(recipe, bfloat16=has) for has in (True, False)] == [HALF, torch.float16]
    assert [computed_in(whole, bfloat16=has) for has in (True, False)] == [WHOLE, WHOLE]
    assert [ACCELERATE[dtype] for dtype in (WHOLE, HALF, torch.float16)] == ["no", "bf16", "fp16"]


def test_frozen_weights_are_saved_as_the_base_has_them(base: Path, data: Path, folder: Path) -> None:
    run = ["align", "--base", str(base), "--data", str(data), "--name", "mine", "--allow-refused", "0.2"]
    assert main([*run, "max_steps=1", "global_batch=8", "micro_batch=8"]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (base, folder / "runs/mine"))
    assert before.keys() == after.keys()
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert {name.split(".")[0] for name in moved} == {"multi_modal_projector"}


def test_a_run_does_not_start_from_an_adapter(base: Path, data: Path, folder: Path) -> None:
    first = ["instruct", "--base", str(base), "--data", str(data), "--name", "mine", *LORA, "max_steps=1"]
    assert main([*first, "global_batch=8", "micro_batch=8"]) == 0
    write_card(folder / "runs/mine", replace(find("mine"), base="the first"))
    with pytest.raises(TrainingError, match=r"mine is an adapter on the first\. Merge them .* export"):
        loaded_in(find("mine"), load_recipe("memeworld_instruct"))
