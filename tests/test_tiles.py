"""How many tiles and tokens a picture takes: the figures of the original, and those of transformers' processors."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, LlavaConfig, LlavaNextConfig, PretrainedConfig

from llava_app.memory import published_config
from llava_app.presets import PRESETS
from llava_app.processors import make_processor
from llava_app.tiles import Tiling, tiling_of
from tests.family_models import llava_config, next_config
from tests.fixtures_model import byte_tokenizer

BY_FAMILY = {preset.family: published_config(preset) for preset in PRESETS}
NEXT, ONEVISION = BY_FAMILY["llava-1.6"], BY_FAMILY["llava-onevision"]
SIDES = st.integers(1, 2048)

# Ran on the original code, LLaVA-1.6 with CLIP-L/14-336.
NEXT_TOKENS = {
    (1344, 672): 1752,
    (672, 1344): 1776,
    (672, 672): 2928,
    (500, 333): 1464,
    (333, 500): 1476,
    (1000, 200): 1598,
    (336, 336): 1176,
    (640, 480): 2340,
    (480, 640): 2352,
    (1920, 1080): 1948,
    (1080, 1920): 1968,
    (300, 100): 776,
    (1000, 1): 576,
}
ONEVISION_TOKENS = {(384, 384): 1485, (672, 672): 3699, (1344, 672): 6615, (500, 333): 1836}


@pytest.mark.parametrize("size", NEXT_TOKENS)
def test_next_takes_as_many_tokens_as_the_original(size: tuple[int, int]) -> None:
    assert tiling_of(NEXT).tokens(*size) == NEXT_TOKENS[size]


@pytest.mark.parametrize("size", ONEVISION_TOKENS)
def test_onevision_takes_as_many_tokens_as_the_original(size: tuple[int, int]) -> None:
    assert tiling_of(ONEVISION).tokens(*size) == ONEVISION_TOKENS[size]


@pytest.mark.parametrize(
    ("size", "tiles"),
    [((672, 672), 5), ((1344, 672), 3), ((672, 1344), 3), ((1000, 200), 4), ((336, 336), 3), ((1000, 1), 4)],
)
def test_next_cuts_the_best_grid_and_an_overview(size: tuple[int, int], tiles: int) -> None:
    assert tiling_of(NEXT).tiles(*size) == tiles


@pytest.mark.parametrize(("side", "tokens"), [(336, 576), (224, 256)])
def test_llava_15_takes_the_same_for_every_picture(side: int, tokens: int) -> None:
    tiling = tiling_of(LlavaConfig(vision_config=CLIPVisionConfig(image_size=side, patch_size=14)))
    assert {tiling.tokens(*size) for size in NEXT_TOKENS} == {tokens}
    assert {tiling.tiles(*size) for size in NEXT_TOKENS} == {1}


def test_a_class_token_that_is_kept_counts() -> None:
    vision = CLIPVisionConfig(image_size=336, patch_size=14)
    assert tiling_of(LlavaConfig(vision_config=vision, vision_feature_select_strategy="full")).tokens(9, 9) == 577


@pytest.mark.parametrize("config", [NEXT, ONEVISION], ids=lambda config: config.model_type)
def test_transformers_counts_the_same_for_ten_thousand_sizes(config: PretrainedConfig) -> None:
    processor = make_processor(config, byte_tokenizer(), image_mode="anyres", template_name="vicuna_v1")
    tiling, side, rng = tiling_of(config), config.vision_config.image_size, random.Random(0)
    spare = 1 if config.vision_feature_select_strategy == "default" else 0  # the class token that is dropped
    for _ in range(10_000):
        width, height = (int(2 ** rng.uniform(0, 11)) for _ in range(2))
        counted = processor._get_number_of_features(height, width, side, side) - spare
        assert tiling.tokens(width, height) == counted, (width, height)


@given(SIDES, SIDES, st.sampled_from([NEXT, ONEVISION, llava_config(), next_config()]))
def test_no_picture_takes_more_than_the_most(width: int, height: int, config: PretrainedConfig) -> None:
    tiling = tiling_of(config)
    assert 0 < tiling.tokens(width, height) <= tiling.most_tokens
    assert 0 < tiling.tiles(width, height) <= tiling.most_tiles


def test_transformers_own_order_of_grids_decides_otherwise_where_two_fit_equally_well() -> None:
    """The original lists width before height; transformers reads the same list as height before width."""
    assert tiling_of(LlavaNextConfig()).tokens(300, 100) == 1360
    assert tiling_of(LlavaNextConfig()).tokens(640, 480) == 2340


def test_the_most_of_next_is_two_by_two() -> None:
    assert tiling_of(NEXT).most_tokens == 2928


def test_a_model_without_grids_has_one_tile() -> None:
    assert (Tiling(28, 4).most_tiles, Tiling(28, 4).most_tokens) == (1, 16)
