"""What is said of the published models is what their shapes give."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from llava_app.checkpoints import HUB_PRESETS
from llava_app.memory import comfortable, need, published_config
from llava_app.outlook import BIG
from llava_app.presets import PRESETS, Preset
from llava_app.prompts import TEMPLATES


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_the_parameters_are_those_of_the_class(preset: Preset) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(published_config(preset))
    assert sum(parameter.numel() for parameter in model.parameters()) == preset.parameters
    assert preset.template in TEMPLATES


def test_the_smallest_come_first() -> None:
    sizes = [preset.parameters for preset in PRESETS]
    assert [card.source for card in HUB_PRESETS] == [preset.source for preset in PRESETS]
    assert max(sizes[:2]) < min(sizes[2:])


def test_four_bits_of_seven_billion_and_a_long_talk_fit_a_gpu_of_eight_gigabytes() -> None:
    big = next(preset for preset in PRESETS if preset.name == BIG)
    assert comfortable(need(published_config(big), "4bit")) == pytest.approx(7.6e9, rel=0.02)


@pytest.mark.parametrize("preset", PRESETS[:2], ids=lambda preset: preset.name)
def test_what_is_offered_without_a_gpu_fits_an_ordinary_computer(preset: Preset) -> None:
    wanted = need(published_config(preset), "bfloat16")
    assert wanted.weights + wanted.step < 4e9
