from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from finetune.assemble import assemble
from finetune.recipe import load_recipe
from finetune.stages import PARTS, STAGES, apply_stage, describe, learning_parts, part_of, trainable
from llava_app.checkpoints import read_card
from llava_app.loading import load


@pytest.fixture
def model(base: Path) -> LlavaForConditionalGeneration:
    return load(read_card(base), "float32").model


@pytest.mark.parametrize("stage", STAGES)
def test_exactly_the_parts_of_a_stage_learn(stage: str, model: LlavaForConditionalGeneration) -> None:
    learning = apply_stage(model, load_recipe(f"memeworld_{stage}"))
    assert {part_of(name) for name in trainable(model)} == set(STAGES[stage].trains) == set(learning)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (part_of(name) in STAGES[stage].trains)


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        (("instruct", "frozen=projector"), ("language_model",)),
        (("instruct", "frozen=language_model"), ("projector",)),
        (("instruct", "frozen=projector", "vision_learning_rate=1e-5"), ("language_model", "vision_tower")),
        (("align", "frozen=projector", "vision_learning_rate=1e-5"), ("vision_tower",)),
    ],
)
def test_a_frozen_part_does_not_learn(
    how: tuple[str, ...], parts: tuple[str, ...], model: LlavaForConditionalGeneration
) -> None:
    recipe = load_recipe(f"memeworld_{how[0]}", how[1:])
    assert tuple(apply_stage(model, recipe)) == learning_parts(recipe) == parts
    assert {part_of(name) for name in trainable(model)} == set(parts)


@pytest.mark.parametrize("stage", STAGES)
def test_the_printed_counts_add_up(stage: str, model: LlavaForConditionalGeneration) -> None:
    learning = apply_stage(model, load_recipe(f"memeworld_{stage}"))
    assert sum(learning.values()) == sum(weight.numel() for weight in trainable(model).values())
    frozen = model.num_parameters() - sum(learning.values())
    assert f"frozen: {frozen:,}" in describe(model, learning)
    assert all(f"{part} {count:,}" in describe(model, learning) for part, count in learning.items())


def test_every_parameter_belongs_to_one_part(model: LlavaForConditionalGeneration) -> None:
    assert {part_of(name) for name, _ in model.named_parameters()} == set(PARTS)


def test_a_later_stage_undoes_the_freezing_of_the_earlier(model: LlavaForConditionalGeneration) -> None:
    apply_stage(model, load_recipe("memeworld_align"))
    assert set(apply_stage(model, load_recipe("memeworld_instruct"))) == {"projector", "language_model"}
    assert any(part_of(name) == "language_model" for name in trainable(model))


def test_the_identity_of_a_linear_projector_stays_frozen(tmp_path: Path, tower: Path, language: Path) -> None:
    card = assemble(tower, language, tmp_path / "linear", projector="linear")
    model = load(card, "float32").model
    apply_stage(model, load_recipe("memeworld_align"))
    assert {name.removeprefix("model.multi_modal_projector.") for name in trainable(model)} == {
        "linear_1.weight",
        "linear_1.bias",
    }
    second = model.model.multi_modal_projector.linear_2
    torch.testing.assert_close(second.weight.detach(), torch.eye(64))
