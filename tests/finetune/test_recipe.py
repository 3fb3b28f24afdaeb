import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from finetune.recipe import RECIPES, Recipe, load_recipe, recipe_from, save_recipe
from llava_app.errors import RecipeError

SMALLEST = {
    "stage": "align",
    "template": "plain",
    "image_mode": "pad",
    "learning_rate": 1e-3,
    "global_batch": 8,
    "micro_batch": 4,
}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_project_is_valid_and_names_its_stage(path: Path) -> None:
    assert path.stem.endswith(load_recipe(path.stem).stage)


def test_llava15_recipes_have_the_published_figures() -> None:
    align, instruct = load_recipe("llava15_7b_align"), load_recipe("llava15_7b_instruct")
    assert (align.learning_rate, align.global_batch, align.template, align.image_mode) == (1e-3, 256, "plain", "crop")
    assert (instruct.learning_rate, instruct.global_batch, instruct.template) == (2e-5, 128, "vicuna_v1")
    assert {align.warmup_ratio, instruct.warmup_ratio} == {0.03}
    assert {align.max_length, instruct.max_length} == {2048}


def test_a_saved_recipe_is_read_back_equal(tmp_path: Path) -> None:
    recipe = recipe_from({**SMALLEST, "max_steps": 7, "learning_rate": 3.3e-5})
    save_recipe(recipe, tmp_path / "mine.yaml")
    assert load_recipe(str(tmp_path / "mine.yaml")) == recipe


def test_overrides_change_their_field_only() -> None:
    before = load_recipe("memeworld_align")
    after = load_recipe("memeworld_align", ["learning_rate=1e-4", "max_steps=5", "gradient_checkpointing=true"])
    changed = {name for name, value in asdict(after).items() if value != asdict(before)[name]}
    assert changed == {"learning_rate", "max_steps", "gradient_checkpointing"}
    assert (after.learning_rate, after.max_steps, after.gradient_checkpointing) == (1e-4, 5, True)


def test_max_steps_can_be_taken_back() -> None:
    assert load_recipe("memeworld_align", ["max_steps=null"]).max_steps is None


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("stage", "pretrain", "align or instruct"),
        ("image_mode", "stretch", "pad or crop"),
        ("precision", "float16", "bfloat16 or float32"),
        ("learning_rate", 0.0, "between 1e-08 and 1.0"),
        ("learning_rate", float("nan"), "between"),
        ("learning_rate", "fast", "a number"),
        ("learning_rate", True, "a number"),
        ("global_batch", 0, "between 1 and 65536"),
        ("micro_batch", 2.5, "a whole number"),
        ("warmup_ratio", 1.5, "between 0.0 and 1.0"),
        ("epochs", None, "a whole number"),
        ("max_steps", 0, "between 1"),
        ("gradient_checkpointing", "yes", "true or false"),
        ("seed", -1, "between 0"),
    ],
)
def test_a_wrong_value_is_refused_with_field_value_and_limit(field: str, value: object, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from({**SMALLEST, field: value})
    assert field in str(caught.value)
    assert str(value) in str(caught.value)
    assert told in str(caught.value)


def test_a_misspelt_field_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"'lerning_rate'.*mean learning_rate"):
        load_recipe("memeworld_align", ["lerning_rate=1"])


def test_an_override_without_equals_is_refused() -> None:
    with pytest.raises(RecipeError, match="'epochs' is not an override"):
        load_recipe("memeworld_align", ["epochs"])


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(RecipeError, match="llava15_7b_align"):
        load_recipe("llava2")


def test_a_missing_field_is_named() -> None:
    with pytest.raises(RecipeError, match="micro_batch"):
        recipe_from({name: value for name, value in SMALLEST.items() if name != "micro_batch"})


@pytest.mark.parametrize("text", ["stage: [align", "just words"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"broken\.yaml"):
        load_recipe(str(path))


def test_recipe_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, finetune.recipe; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_recipe_cannot_be_changed() -> None:
    recipe = Recipe(**SMALLEST)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        recipe.epochs = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("recipe", "overrides", "told"),
    [
        ("memeworld_instruct", ["quantise=4bit"], "Give a lora_rank"),
        ("memeworld_instruct", ["quantise=4bit", "lora_rank=4", "precision=float32"], "precision=bfloat16"),
        ("memeworld_instruct", ["feature_cache=1", "vision_learning_rate=1e-5"], "frozen vision tower"),
        ("memeworld_align", ["lora_rank=4"], "projector only"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(recipe: str, overrides: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe(recipe, overrides)
