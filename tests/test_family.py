"""Every class of LLaVA through the same engine: its greedy answers are those of `generate`."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from llava_app.conversation import Conversation
from llava_app.engine import Sampling
from llava_app.engine.local import LocalEngine
from llava_app.errors import ModelError
from llava_app.images import Picture
from llava_app.loading import Loaded, load
from llava_app.processors import load_processor, make_processor
from llava_app.prompts import encode, look, prepare, template_text
from llava_app.tiles import tiling_of
from tests.family_models import CONFIGS, write_family_model
from tests.fixtures_model import byte_tokenizer

GREEDY = Sampling(temperature=0, max_new_tokens=12)


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


@pytest.fixture(scope="module", params=CONFIGS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("family") / request.param
    return load(write_family_model(folder, CONFIGS[request.param]()), "float32")


@pytest.fixture
def engine(loaded: Loaded) -> Iterator[LocalEngine]:
    engine = LocalEngine(loaded)
    yield engine
    engine.close()


def generated(loaded: Loaded, conversation: Conversation) -> str:
    """What `model.generate` answers to the same inputs."""
    encoded = encode(conversation, loaded.processor, open_answer=True)
    ids = encoded.input_ids[None]
    pixels: dict[str, Any] = {} if encoded.pixel_values is None else {"pixel_values": encoded.pixel_values}
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=GREEDY.max_new_tokens,
        eos_token_id=1,
        pad_token_id=2,
        suppress_tokens=[loaded.model.config.image_token_id],
    )
    output = loaded.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, **pixels, **encoded.shapes
    )
    text = loaded.processor.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return text.removeprefix(" ")


@pytest.fixture(scope="module")
def expected(loaded: Loaded) -> dict[str, str]:
    return {name: generated(loaded, conversation) for name, conversation in CONVERSATIONS.items()}


def answer(engine: LocalEngine, conversation: Conversation) -> str:
    return "".join(piece.text for piece in engine.answer(conversation, GREEDY))


def test_answers_are_those_of_generate_alone_and_from_the_cache(engine: LocalEngine, expected: dict[str, str]) -> None:
    assert len(set(expected.values())) == len(expected)
    for _ in range(2):  # the second time every prompt and every picture is in the cache
        assert {name: answer(engine, conversation) for name, conversation in CONVERSATIONS.items()} == expected
    assert engine.snapshot().tokens_reused > 0


def test_answers_are_those_of_generate_for_several_people_at_once(
    engine: LocalEngine, expected: dict[str, str]
) -> None:
    with ThreadPoolExecutor(len(expected)) as people:
        answers = people.map(lambda talk: answer(engine, talk), CONVERSATIONS.values())
        assert list(answers) == list(expected.values())


def test_a_further_turn_reads_only_what_is_new(engine: LocalEngine, loaded: Loaded) -> None:
    said = answer(engine, ONE)
    before = engine.snapshot()
    further = ONE.answer(said).ask("Why?")
    assert answer(engine, further) == generated(loaded, further)
    after = engine.snapshot()
    picture = prepare(WIDE.image, loaded.processor).tokens
    assert after.tokens_reused - before.tokens_reused > picture
    assert after.pictures_seen == before.pictures_seen


def test_what_ends_an_answer_in_the_cards_template_ends_it(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    script = iter(loaded.processor.tokenizer(" A joke.###Human: more", add_special_tokens=False)["input_ids"])
    monkeypatch.setattr("llava_app.engine.worker.choose", lambda *_, **__: [next(script)])
    engine = LocalEngine(replace(loaded, card=replace(loaded.card, template="llava_v0")))
    pieces = list(engine.answer(ONE, GREEDY))
    engine.close()
    assert "".join(piece.text for piece in pieces) == "A joke."
    assert pieces[-1].finish == "stop"


def test_four_bits_answer_too(loaded: Loaded) -> None:
    engine = LocalEngine(load(loaded.card, "4bit"))
    assert answer(engine, CONVERSATIONS["several in one turn"]) is not None
    engine.close()


@pytest.mark.parametrize("size", [(1, 1), (1, 2048), (2048, 1), (2048, 2048)])
def test_extreme_shapes_give_as_many_features_as_tokens(loaded: Loaded, size: tuple[int, int]) -> None:
    seen = prepare(Image.new("RGB", size), loaded.processor)
    with torch.inference_mode():
        features_SD = loaded.model.get_image_features(seen.pixel_values, **seen.shapes).pooler_output[0]
    assert len(features_SD) == seen.tokens


def test_a_person_can_look_at_the_tiles(loaded: Loaded) -> None:
    halves = Image.new("RGB", (56, 28), "red")
    halves.paste("blue", (28, 0, 56, 28))
    tiles = look(halves, loaded.processor)
    assert {tile.size for tile in tiles} == {(28, 28)}
    assert len(tiles) == tiling_of(loaded.model.config).tiles(56, 28)
    if len(tiles) > 1:
        overview, left, right = tiles
        assert [tile.getpixel((14, 14)) for tile in (left, right)] == [(255, 0, 0), (0, 0, 255)]
        assert (overview.getpixel((3, 14)), overview.getpixel((24, 14))) == ((255, 0, 0), (0, 0, 255))


def test_a_saved_processor_is_loaded_as_it_was(loaded: Loaded) -> None:
    folder = Path(loaded.card.source)
    again = load_processor(folder, loaded.card, config=loaded.model.config)
    first, second = (prepare(TALL.image, processor) for processor in (loaded.processor, again))
    assert torch.equal(first.pixel_values, second.pixel_values)
    assert first.tokens == second.tokens


def test_an_image_mode_that_is_not_the_models_is_refused(loaded: Loaded) -> None:
    wrong = "anyres" if loaded.card.image_mode == "pad" else "pad"
    with pytest.raises(ModelError, match=f"cannot see pictures in the mode {wrong}; choose"):
        make_processor(loaded.model.config, byte_tokenizer(), image_mode=wrong, template_name="qwen")


def test_a_template_that_differs_from_the_cards_is_reported(loaded: Loaded) -> None:
    assert "differs" not in loaded.why
    path = Path(loaded.card.source) / "chat_template.jinja"
    kept = path.read_text(encoding="utf-8")
    path.write_text(template_text("qwen"), encoding="utf-8")
    try:
        assert "Its own chat template differs from vicuna_v1" in load(loaded.card, "float32").why
    finally:
        path.write_text(kept, encoding="utf-8")
