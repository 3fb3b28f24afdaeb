import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from finetune.__main__ import _new_run, _training_parser, main
from finetune.recipe import (
    RECIPES,
    TEMPLATES,
    Recipe,
    all_recipes,
    inherit,
    load_recipe,
    named_recipe,
    recipe_from,
    save_recipe,
    show,
)
from llava_app import prompts
from llava_app.checkpoints import OWN, Card, built_in
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
def test_every_recipe_of_the_project_is_valid_and_says_where_it_is_from_and_what_it_needs(path: Path) -> None:
    named = named_recipe(path.stem)
    assert all(len(text) > 20 for text in (named.about, named.source, named.needs))
    assert named.recipe.global_batch % named.recipe.micro_batch == 0


def test_recipes_for_several_gpus_name_the_configs_that_go_with_them() -> None:
    fits = {"align": {"ddp", "zero2"}, "instruct": {"fsdp2", "zero3"}}  # the projector alone, the whole model
    full = [named for named in all_recipes() if named.name.startswith(("llava", "sci")) and not named.recipe.lora_rank]
    assert len(full) == 7
    for named in full:
        assert set(re.findall(r"(\w+)\.yaml", named.needs)) == fits[named.recipe.stage], named.name
    assert {path.stem for path in (RECIPES / "accelerate").iterdir()} == set().union(*fits.values())


def test_a_stage_in_a_recipes_name_is_its_stage() -> None:
    told = {named.name: named.recipe.stage for named in all_recipes() if named.name.endswith(("_align", "_instruct"))}
    assert len(told) >= 8
    assert all(name.endswith(stage) for name, stage in told.items())


def test_llava15_recipes_have_the_published_figures() -> None:
    align, instruct = load_recipe("llava15_7b_align"), load_recipe("llava15_7b_instruct")
    assert (align.learning_rate, align.global_batch, align.template, align.image_mode) == (1e-3, 256, "plain", "crop")
    assert (instruct.learning_rate, instruct.global_batch, instruct.template) == (2e-5, 128, "vicuna_v1")
    assert {align.warmup_ratio, instruct.warmup_ratio} == {0.03}
    assert {align.max_length, instruct.max_length} == {2048}


PUBLISHED = {  # name: learning rate, global batch, epochs, template, image mode
    "llava_v1_7b_align": (2e-3, 128, 1, "plain", "crop"),
    "llava_v1_7b_instruct": (2e-5, 32, 3, "vicuna_v1", "crop"),
    "llava15_13b_align": (1e-3, 256, 1, "plain", "crop"),
    "llava15_13b_instruct": (2e-5, 128, 1, "vicuna_v1", "pad"),
    "llava15_7b_lora": (2e-4, 128, 1, "vicuna_v1", "pad"),
    "scienceqa": (2e-5, 128, 12, "vicuna_v1", "crop"),
}


@pytest.mark.parametrize(("name", "figures"), PUBLISHED.items(), ids=PUBLISHED)
def test_recipes_have_the_published_figures(name: str, figures: tuple[object, ...]) -> None:
    recipe = load_recipe(name)
    found = (recipe.learning_rate, recipe.global_batch, recipe.epochs, recipe.template, recipe.image_mode)
    assert found == figures


def test_lora_as_published() -> None:
    recipe = load_recipe("llava15_7b_lora")
    assert (recipe.lora_rank, recipe.lora_alpha, recipe.lora_dropout) == (128, 256, 0.05)
    assert recipe.projector_learning_rate == 2e-5


def test_the_recipes_are_listed_and_one_is_shown_whole(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{path.stem} " in listed for path in RECIPES.glob("*.yaml"))
    assert main(["recipes", "llava15_7b_qlora_8gb", "learning_rate=3e-4", "micro_batch=2"]) == 0
    shown = capsys.readouterr().out
    assert "learning_rate: 0.0003" in shown
    assert "2 examples at a time, 64 times" in shown
    (tmp_path / "mine.yaml").write_text(shown, encoding="utf-8")
    assert named_recipe(str(tmp_path / "mine.yaml")).recipe.learning_rate == 3e-4


def test_a_shown_recipe_is_read_back_equal(tmp_path: Path) -> None:
    for named in all_recipes():
        path = tmp_path / f"{named.name}.yaml"
        path.write_text(show(named), encoding="utf-8")
        assert named_recipe(str(path)) == named


def card(stage: str, template: str) -> Card:
    return Card("Eve", "runs/eve", "run", stage, template, "crop")


def test_a_recipe_inherits_template_and_image_mode_and_says_so() -> None:
    recipe, told = inherit(load_recipe("own_data"), card("instruct", "vicuna_v1"))
    assert (recipe.template, recipe.image_mode) == ("vicuna_v1", "crop")
    assert told == "inherited from Eve: template vicuna_v1\ninherited from Eve: image_mode crop"


def test_what_a_recipe_overrides_is_told() -> None:
    recipe = load_recipe("llava15_7b_instruct")
    same, told = inherit(recipe, card("align", "plain"))
    assert same == recipe
    assert told == ("overrides Eve: template vicuna_v1 instead of plain\noverrides Eve: image_mode pad instead of crop")


def test_stage_two_does_not_inherit_the_template_of_stage_one() -> None:
    with pytest.raises(RecipeError, match=r"Eve has only stage 1.*template=vicuna_v1"):
        inherit(load_recipe("own_data"), card("align", "plain"))


def test_a_model_without_a_card_hands_on_what_its_files_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(built_in().source, folder, ignore=shutil.ignore_patterns("card.json"))
    asked = ["--name", "mine", "--base", str(folder), "--data", "d.json", "--recipe", "memeworld_several"]
    run = _new_run("instruct", _training_parser("instruct").parse_args(asked))
    assert (run.recipe.template, run.recipe.image_mode) == ("vicuna_v1", "pad")
    assert "inherited from bare: template vicuna_v1" in capsys.readouterr().out


def test_what_no_file_of_the_model_shows_is_asked_for() -> None:
    bare = Card("Eve", "eve", "run", "instruct", OWN, "pad")
    with pytest.raises(RecipeError, match=r"Eve has no card.*which template .*Give template= one of plain, vicuna_v1"):
        inherit(load_recipe("own_data"), bare)
    given, told = inherit(load_recipe("own_data", ["template=qwen"]), bare)
    assert (given.template, told) == ("qwen", "inherited from Eve: image_mode pad")


def test_the_templates_of_recipes_are_those_that_there_are() -> None:
    assert tuple(prompts.TEMPLATES) == TEMPLATES


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
        ("template", "foo", "plain or vicuna_v1"),
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


@pytest.mark.parametrize("override", ["template=[x", "seed=2020-99-99"])
def test_an_override_that_is_no_yaml_is_refused_in_one_sentence(override: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("own_data", [override])
    told = str(caught.value)
    assert told.startswith(f"{override!r} is not YAML: ")
    assert "\n" not in told


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(RecipeError, match="llava15_7b_align"):
        load_recipe("llava2")
    with pytest.raises(RecipeError, match=r"Did you mean llava15_7b_lora\?"):
        load_recipe("llava15_7b_lore")


def test_a_missing_field_is_named() -> None:
    with pytest.raises(RecipeError, match=r"^The recipe lacks template, micro_batch\. Give"):
        recipe_from({name: value for name, value in SMALLEST.items() if name not in ("micro_batch", "template")})


@pytest.mark.parametrize("text", ["stage: [align", "just words"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"broken\.yaml") as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)


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
        ("memeworld_instruct", ["lora_rank=4", "frozen=language_model"], "lora_rank lets learn"),
        ("memeworld_instruct", ["lora_rank=4", "vision_learning_rate=1e-5"], "holds no vision tower"),
        ("memeworld_align", ["frozen=projector"], "trains nothing else"),
        ("memeworld_instruct", ["frozen=projectr"], "'projectr'; it can be none or projector or language_model"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(recipe: str, overrides: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe(recipe, overrides)
