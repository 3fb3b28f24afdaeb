import gc

import psutil
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, DynamicCache, GPTNeoXConfig, LlamaConfig, LlavaConfig

from llava_app import loading
from llava_app.checkpoints import Card
from llava_app.conversation import Conversation
from llava_app.engine import Sampling
from llava_app.engine.decoder import make_decoder
from llava_app.engine.local import LocalEngine
from llava_app.engine.weights import Weights
from llava_app.errors import ModelError
from llava_app.loading import load
from llava_app.memory import LEAST_ROOM, MOST_ROWS, Need, free_bytes, make_plan, need, zeros
from tests.fixtures_model import tiny_config

# The shapes of LLaVA-1.5-7B.
SEVEN = LlavaConfig(
    vision_config=CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    ),
    text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=4096),
)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_plan_knows_what_a_loaded_model_takes(tiny_card: Card, precision: str) -> None:
    model = load(tiny_card, precision).model
    wanted = need(model.config, precision)
    assert wanted.weights == sum(parameter.nbytes for parameter in model.parameters())
    cache, embeds_1SD = DynamicCache(), torch.zeros(1, 5, 64, dtype=model.dtype)
    with torch.no_grad():
        model.model.language_model(inputs_embeds=embeds_1SD, cache=cache)
        features_SD = model.get_image_features(torch.zeros(1, 3, 28, 28, dtype=model.dtype)).pooler_output[0]
    assert 5 * wanted.token == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert (wanted.picture, wanted.picture_tokens) == (features_SD.nbytes, len(features_SD))
    assert wanted.positions == 512


def test_a_head_that_shares_the_embeddings_counts_too() -> None:
    tied, untied = (need(tiny_config(tie_word_embeddings=tied), "float32") for tied in (True, False))
    assert untied.weights == tied.weights


def living_bytes() -> int:
    """Of all tensors there are, views not counted twice; a packed one is opaque and counts as what it was made of."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    opaque = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.layout != torch.strided)
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    return opaque + sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "8bit"])
def test_the_plan_knows_what_a_model_takes_with_its_decoder(tiny_card: Card, precision: str) -> None:
    before = living_bytes()
    model = load(tiny_card, precision).model
    decoder = make_decoder(Weights(model, eight_bit=precision == "8bit"), rows=1, length=1)
    wanted = need(model.config, precision)
    assert living_bytes() - before == pytest.approx(wanted.weights, rel=0.03)
    del decoder


def test_a_closed_engine_gives_its_memory_back(tiny_card: Card) -> None:
    before = living_bytes()
    engine = LocalEngine(load(tiny_card, "float32"))
    list(engine.answer(Conversation().ask("Hello"), Sampling(temperature=0, max_new_tokens=3)))
    assert living_bytes() - before > 500_000
    engine.close()
    assert living_bytes() - before < 10_000


def test_rows_take_memory_as_they_are_written() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    rows = zeros((4, 100_000_000), torch.bfloat16, torch.device("cpu"))
    assert process.memory_info().rss - before < 100e6
    assert rows.data_ptr() % 64 == 0
    assert not rows[2, :1000].any()
    rows[3, :100_000_000] = 1
    assert process.memory_info().rss - before > 150e6


def test_an_engine_says_what_it_may_yet_take(tiny_card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "free_bytes", lambda device: 1e9)
    engine = LocalEngine(load(tiny_card, "float32"))
    plan = engine._plan
    assert engine.promised == plan.rows * plan.length * plan.token_bytes
    list(engine.answer(Conversation().ask("Hello"), Sampling(temperature=0, max_new_tokens=3)))
    held = engine.snapshot().tokens_held
    assert held > 0
    assert engine.promised == (plan.rows * plan.length - held) * plan.token_bytes
    engine.close()
    less = load(tiny_card, "float32", promised=1e9 - 4e6).plan
    assert less.rows * less.length < plan.rows * plan.length


def test_the_arithmetic_of_four_bits_holds_for_seven_billion() -> None:
    """3.3 GB of quantised layers and 1.2 GB of tower, projector, embeddings and head in 16 bits."""
    four, sixteen = (need(SEVEN, precision) for precision in ("4bit", "bfloat16"))
    assert four.weights == pytest.approx(4.5e9, rel=0.02)
    assert sixteen.weights == pytest.approx(14.1e9, rel=0.01)
    assert (four.token, four.picture_tokens) == (2 * 32 * 4096 * 2, 576)


def test_a_language_model_without_shared_keys_has_as_many_as_heads() -> None:
    text = GPTNeoXConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=260
    )
    config = LlavaConfig(vision_config=tiny_config().vision_config, text_config=text, image_token_index=3)
    assert need(config, "float32").token == 2 * 2 * 64 * 4


NEED = Need(weights=1e9, token=1000, step=1e8, picture=10**5, picture_tokens=500, positions=4000)
LEAST = NEED.picture_tokens + LEAST_ROOM


def with_left(left: float) -> float:
    """Free memory that leaves so many bytes after weights and step."""
    return (NEED.weights + NEED.step + left) / 0.9


def test_rows_go_first_and_then_the_context() -> None:
    full = NEED.positions * NEED.token
    plans = [
        make_plan(NEED, with_left(conversations * full / 0.9 + 1), name="Tiny", precision="4bit")
        for conversations in (100, 15.5, 5.5, 1, 0.5)
    ]
    assert [(plan.rows, plan.length) for plan in plans] == [(16, 4000), (15, 4000), (5, 4000), (1, 4000), (1, 2000)]


@pytest.mark.parametrize(
    ("precision", "step"), [("bfloat16", "--precision 4bit or a smaller model"), ("4bit", "Choose a smaller model")]
)
def test_too_little_memory_is_refused_with_both_numbers_and_what_would_help(precision: str, step: str) -> None:
    with pytest.raises(ModelError, match=rf"Tiny needs 1\.2 GB in {precision} and 1\.0 GB are free.*{step}"):
        make_plan(NEED, 1e9, name="Tiny", precision=precision)


NEEDS = st.builds(
    Need,
    weights=st.floats(1e6, 1e11),
    token=st.integers(100, 10**6),
    step=st.floats(1e5, 1e10),
    picture=st.integers(1000, 10**7),
    picture_tokens=st.integers(1, 3000),
    positions=st.integers(1, 200_000),
)


@given(NEEDS, st.floats(0, 1e12))
@example(NEED, with_left(1.05 * LEAST * NEED.token))
def test_a_plan_never_takes_more_than_is_free_and_never_less_than_is_of_use(wanted: Need, free: float) -> None:
    try:
        plan = make_plan(wanted, free, name="Tiny", precision="4bit")
    except ModelError:
        return
    assert plan.total <= 0.9 * free
    assert 1 <= plan.rows <= MOST_ROWS
    assert plan.length <= wanted.positions
    assert plan.length >= min(wanted.positions, wanted.picture_tokens + LEAST_ROOM)


@given(NEEDS, st.floats(0, 1e12))
def test_what_was_said_to_be_needed_is_enough(wanted: Need, free: float) -> None:
    said = 0.0
    try:
        make_plan(wanted, free, name="Tiny", precision="4bit")
    except ModelError as error:
        said = float(str(error).split(" needs ")[1].split(" GB")[0]) * 1e9
    assume(said)
    assert said > free - 0.05e9
    make_plan(wanted, said + 0.05e9, name="Tiny", precision="4bit")


def test_there_is_free_memory() -> None:
    assert 0 < free_bytes(torch.device("cpu")) < float("inf")


def test_what_torch_keeps_of_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(3e9), int(12e9)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(8e9))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: int(1e9))
    assert free_bytes(torch.device("cuda")) == 10e9
