"""Each decoder on small language models of random weights, beside transformers' own forward."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from llava_app.checkpoints import Card
from llava_app.engine.decoder import AnyDecoder, Decoder, LlamaDecoder, Span, is_llama_kin, make_decoder
from llava_app.engine.weights import Weights
from llava_app.loading import load

LENGTH, ROWS = 24, 3


@dataclass(frozen=True)
class Kind:
    """A language model: settings beside those that all of them have."""

    model_type: str
    decoder: type
    settings: dict[str, object]


KINDS = {
    "llama": Kind("llama", LlamaDecoder, {}),
    "llama, shared keys": Kind("llama", LlamaDecoder, {"num_key_value_heads": 2}),
    "llama, biases, tied": Kind(
        "llama", LlamaDecoder, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    ),
    "llama, scaled positions": Kind(
        "llama",
        LlamaDecoder,
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}, "num_key_value_heads": 1},
    ),
    "mistral": Kind("mistral", LlamaDecoder, {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral, window": Kind("mistral", AnyDecoder, {"num_key_value_heads": 2, "sliding_window": 6}),
    "qwen2": Kind("qwen2", LlamaDecoder, {"num_key_value_heads": 2}),
    "qwen2, window": Kind(
        "qwen2",
        AnyDecoder,
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": Kind("qwen3", LlamaDecoder, {"num_key_value_heads": 2, "head_dim": 16}),
    "gemma2": Kind("gemma2", AnyDecoder, {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6}),
    "gpt_neox": Kind("gpt_neox", AnyDecoder, {}),
}


def make_model(name: str) -> PreTrainedModel:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    own = {"vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0} | KINDS[name].settings
    vision = shape | {"image_size": 8, "patch_size": 4, "projection_dim": 32}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=CONFIG_MAPPING[KINDS[name].model_type](**shape | own),
        image_token_index=3,
        tie_word_embeddings=bool(own.get("tie_word_embeddings")),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        for parameter in model.parameters():  # norms and biases too, which begin as ones and zeros
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module", params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> PreTrainedModel:
    return make_model(name)


@pytest.fixture(scope="module")
def decoder(name: str) -> Decoder:
    """Of a model with the same weights; its rows are used over and over."""
    return make_decoder(Weights(make_model(name)), rows=ROWS, length=LENGTH)


@torch.no_grad()
def expected(model: PreTrainedModel, embeds_SD: torch.Tensor) -> torch.Tensor:
    """(S, V) by transformers."""
    return model(inputs_embeds=embeds_SD[None], use_cache=False).logits[0]


def embeds(*, seed: int = 0, length: int = LENGTH) -> torch.Tensor:
    return torch.randn(length, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def step(decoder: Decoder, rows: list[torch.Tensor], spans: list[Span]) -> torch.Tensor:
    return decoder.step(torch.cat([rows[span.row][span.start : span.end] for span in spans]), spans)


def test_the_fastest_decoder_that_computes_the_same_is_taken(name: str, decoder: Decoder) -> None:
    assert type(decoder) is KINDS[name].decoder


STEPS = st.lists(st.lists(st.integers(0, 9), min_size=ROWS, max_size=ROWS), min_size=1, max_size=8)


@given(STEPS, st.permutations(range(ROWS)))
@settings(max_examples=15, deadline=None)
def test_any_mixture_of_prompts_their_parts_and_single_tokens_equals_transformers(
    model: PreTrainedModel, decoder: Decoder, steps: list[list[int]], order: list[int]
) -> None:
    rows = [embeds(seed=row) for row in range(ROWS)]
    logits, held = [expected(model, row) for row in rows], [0] * ROWS
    for sizes in [[LENGTH // 2, 1, 0], *steps]:
        spans = [Span(row, held[row], min(sizes[row], LENGTH - held[row])) for row in order]
        spans = [span for span in spans if span.length]
        if spans:
            wanted = torch.stack([logits[span.row][span.end - 1] for span in spans])
            assert torch.allclose(step(decoder, rows, spans), wanted, atol=1e-4)
        for span in spans:
            held[span.row] = span.end


def test_a_copied_beginning_goes_on_as_if_it_had_been_read(model: PreTrainedModel, decoder: Decoder) -> None:
    first = embeds()
    second = torch.cat([first[:10], embeds(seed=1)[10:]])
    rows = [first, second]
    step(decoder, rows, [Span(1, 0, 20), Span(0, 0, 15)])
    decoder.copy(0, 1, 10)
    found = step(decoder, rows, [Span(0, 15, 1), Span(1, 10, 6)])
    wanted = torch.stack([expected(model, first)[15], expected(model, second)[15]])
    assert torch.allclose(found, wanted, atol=1e-4)


def test_a_row_is_read_anew_from_any_of_its_tokens(model: PreTrainedModel, decoder: Decoder) -> None:
    rows = [embeds()]
    wanted = expected(model, rows[0])
    for start, length in [(0, 20), (7, 5), (3, 1), (4, 20), (0, 6)]:
        assert torch.allclose(step(decoder, rows, [Span(0, start, length)])[0], wanted[start + length - 1], atol=1e-4)


def test_a_step_that_failed_halfway_can_be_taken_again() -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model, rows = make_model("gemma2"), [embeds()]
    wanted = expected(model, rows[0])
    decoder = make_decoder(Weights(model), rows=1, length=LENGTH)
    step(decoder, rows, [Span(0, 0, 5)])
    hook = model.model.language_model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        step(decoder, rows, [Span(0, 5, 5)])
    hook.remove()
    assert torch.allclose(step(decoder, rows, [Span(0, 5, 2)])[0], wanted[6], atol=1e-4)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_length_are_left_to_transformers(rope_type: str) -> None:
    config = make_model("llama").config.text_config
    assert is_llama_kin(config)
    config.rope_parameters = {"rope_type": rope_type}
    assert not is_llama_kin(config)


@pytest.mark.parametrize("name", ["llama, shared keys", "qwen2"])
def test_eight_bits_are_close_to_sixteen(name: str) -> None:
    model = make_model(name).bfloat16()
    rows = [embeds().bfloat16()]
    wanted = expected(model, rows[0]).float()
    decoder = make_decoder(Weights(model, eight_bit=True), rows=1, length=LENGTH)
    found = torch.cat([step(decoder, rows, [Span(0, number, 1)]) for number in range(LENGTH)]).float()
    assert F.cosine_similarity(found, wanted).min() > 0.99
    assert (found - wanted).norm() < 0.05 * wanted.norm()
    many = step(decoder, rows, [Span(0, 0, LENGTH)])[0].float()
    assert (many - wanted[-1]).norm() < 0.05 * wanted[-1].norm()


def test_four_bit_layers_run_as_they_are(tiny_card: Card) -> None:
    model = load(tiny_card, "4bit").model
    rows = [torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(model.dtype)]
    wanted = expected(model, rows[0])[-1].float()
    decoder = make_decoder(Weights(model), rows=1, length=8)
    assert isinstance(decoder, LlamaDecoder)
    found = step(decoder, rows, [Span(0, 0, 8)])[0].float()
    assert (found - wanted).norm() < 0.05 * wanted.norm()
