"""Every class of LLaVA through the same engine: its greedy answers are those of `generate`."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_app.conversation import Conversation
from llava_app.engine.local import LocalEngine
from llava_app.errors import ModelError
from llava_app.images import Picture, picture_of
from llava_app.loading import Loaded, load
from llava_app.processors import load_processor, make_processor
from llava_app.prompts import prepare, template_text
from llava_app.seen import seen
from llava_app.tiles import tiling_of
from tests.family_models import GREEDY, answer, generated
from tests.fixtures_model import byte_tokenizer


def noise(width: int, height: int, seed: int) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Picture(Image.fromarray(pixels), f"noise {width} {height} {seed}")


WIDE, TALL, LINE = noise(70, 30, 1), noise(30, 50, 2), noise(1000, 1, 3)
ONE = Conversation().ask("What is funny?", [WIDE])
CONVERSATIONS = {
    "one picture": ONE,
    "no picture": Conversation().ask("Hello"),
    "a line": Conversation().ask("What?", [LINE]),
    "several in one turn": Conversation().ask("Compare.", [WIDE, TALL]),
    "one in each turn": ONE.answer("A joke.").ask("And this?", [TALL]),
}


@pytest.fixture(scope="session")
def expected(family: Loaded) -> dict[str, str]:
    return {name: generated(family, conversation) for name, conversation in CONVERSATIONS.items()}


def test_answers_are_those_of_generate_alone_and_from_the_cache(
    family_engine: LocalEngine, expected: dict[str, str]
) -> None:
    assert len(set(expected.values())) == len(expected)
    for _ in range(2):  # the second time every prompt and every picture is in the cache
        assert {name: answer(family_engine, conversation) for name, conversation in CONVERSATIONS.items()} == expected
    assert family_engine.snapshot().tokens_reused > 0


def test_answers_are_those_of_generate_for_several_people_at_once(
    family_engine: LocalEngine, expected: dict[str, str]
) -> None:
    with ThreadPoolExecutor(len(expected)) as people:
        answers = people.map(lambda talk: answer(family_engine, talk), CONVERSATIONS.values())
        assert list(answers) == list(expected.values())


def test_a_further_turn_reads_only_what_is_new(family_engine: LocalEngine, family: Loaded) -> None:
    said = answer(family_engine, ONE)
    before = family_engine.snapshot()
    further = ONE.answer(said).ask("Why?")
    assert answer(family_engine, further) == generated(family, further)
    after = family_engine.snapshot()
    picture = prepare(WIDE.image, family.processor).tokens
    assert after.tokens_reused - before.tokens_reused > picture
    assert after.pictures_seen == before.pictures_seen


def test_what_ends_an_answer_in_the_cards_template_ends_it(family: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    script = iter(family.processor.tokenizer(" A joke.###Human: more", add_special_tokens=False)["input_ids"])
    monkeypatch.setattr("llava_app.engine.worker.choose", lambda *_, **__: [next(script)])
    engine = LocalEngine(replace(family, card=replace(family.card, template="llava_v0")))
    pieces = list(engine.answer(ONE, GREEDY))
    engine.close()
    assert "".join(piece.text for piece in pieces) == "A joke."
    assert pieces[-1].finish == "stop"


def test_four_bits_answer_as_generate_does(family: Loaded) -> None:
    loaded = load(family.card, "4bit")
    several = CONVERSATIONS["several in one turn"]
    expected = generated(loaded, several)
    engine = LocalEngine(loaded)  # which takes the head's weights for itself
    assert answer(engine, several) == expected
    engine.close()


@pytest.mark.parametrize("size", [(1, 1), (1, 2048), (2048, 1), (2048, 2048)])
def test_extreme_shapes_give_as_many_features_as_tokens(family: Loaded, size: tuple[int, int]) -> None:
    seen = prepare(Image.new("RGB", size), family.processor)
    with torch.inference_mode():
        features_SD = family.model.get_image_features(seen.pixel_values, **seen.shapes).pooler_output[0]
    assert len(features_SD) == seen.tokens


def test_a_person_can_look_at_the_tiles(family: Loaded) -> None:
    halves = Image.new("RGB", (56, 28), "red")
    halves.paste("blue", (28, 0, 56, 28))
    picture = picture_of(halves, "halves")
    tiles = seen(picture, Conversation().ask("?", [picture]), family.processor, limit=2048).tiles
    assert {tile.size for tile in tiles} == {(28, 28)}
    assert len(tiles) == tiling_of(family.model.config).tiles(56, 28)
    if len(tiles) > 1:
        overview, left, right = tiles
        assert [tile.getpixel((14, 14)) for tile in (left, right)] == [(255, 0, 0), (0, 0, 255)]
        assert (overview.getpixel((3, 14)), overview.getpixel((24, 14))) == ((255, 0, 0), (0, 0, 255))


def test_a_saved_processor_is_loaded_as_it_was(family: Loaded) -> None:
    folder = Path(family.card.source)
    again = load_processor(folder, family.card, config=family.model.config)
    first, second = (prepare(TALL.image, processor) for processor in (family.processor, again))
    assert torch.equal(first.pixel_values, second.pixel_values)
    assert first.tokens == second.tokens


def test_an_image_mode_that_is_not_the_models_is_refused(family: Loaded) -> None:
    wrong = "anyres" if family.card.image_mode == "pad" else "pad"
    with pytest.raises(ModelError, match=f"cannot see pictures in the mode {wrong}; choose"):
        make_processor(family.model.config, byte_tokenizer(), image_mode=wrong, template_name="qwen")


def test_a_template_that_differs_from_the_cards_is_reported(family: Loaded) -> None:
    assert "differs" not in family.why
    path = Path(family.card.source) / "chat_template.jinja"
    kept = path.read_text(encoding="utf-8")
    path.write_text(template_text("qwen"), encoding="utf-8")
    card = replace(family.card, files={name: sha for name, sha in family.card.files.items() if name != path.name})
    try:
        assert "Its own chat template differs from vicuna_v1" in load(card, "float32").why
    finally:
        path.write_text(kept, encoding="utf-8")
