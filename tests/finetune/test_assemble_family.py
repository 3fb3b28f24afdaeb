"""Any language model and any eyes: assembled, trained through both stages, saved, loaded, and talked to."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from finetune.assemble import assemble
from finetune.checkpoint import save_model
from finetune.recipe import load_recipe
from finetune.stages import apply_stage, trainable
from llava_app.checkpoints import Card, catalogue, write_card
from llava_app.conversation import Conversation
from llava_app.engine.local import LocalEngine
from llava_app.errors import ModelError
from llava_app.images import Picture
from llava_app.loading import Loaded, load
from llava_app.prompts import encode
from tests.family_models import answer, generated

SMALL: dict[str, Any] = {
    "hidden_size": 64,  # fewer cannot be had in 4 bits on a CPU
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT: dict[str, Any] = SMALL | {"max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1}
EYES: dict[str, Any] = SMALL | {"image_size": 28, "patch_size": 14}
LANGUAGES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"num_key_value_heads": 1}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "phi": (PhiConfig, PhiForCausalLM, {}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"pad_token_id": 1}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"head_dim": 32, "num_key_value_heads": 1}),
}
RED, GREEN = (Picture(Image.new("RGB", (60, 30), colour), colour) for colour in ("red", "green"))
TALK = Conversation().ask("Which colour?", [RED]).answer("It is red.")


def tokenizer(*added: str, **settings: str) -> PreTrainedTokenizerFast:
    """Bytes, <s> and </s>, and what else is asked for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **settings)
    made.add_tokens(list(added), special_tokens=True)
    return made


def write_language(folder: Path, name: str, words: PreTrainedTokenizerFast, rows: int | None = None) -> Path:
    config, model, settings = LANGUAGES[name]
    torch.manual_seed(3)
    model(config(**TEXT, **settings, vocab_size=rows or len(words))).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_tower(folder: Path, kind: str) -> Path:
    torch.manual_seed(4)
    clip = kind == "clip"
    model = CLIPVisionModel(CLIPVisionConfig(**EYES)) if clip else SiglipVisionModel(SiglipVisionConfig(**EYES))
    model.save_pretrained(folder)
    return folder


def learn(model: PreTrainedModel, loaded: Loaded, stage: str) -> set[str]:
    """Two steps of a stage on one example; the names of the weights that moved."""
    apply_stage(model, load_recipe(f"memeworld_{stage}"))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    encoded = encode(TALK, loaded.processor, open_answer=False)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    for _ in range(2):
        logits = model(input_ids=encoded.input_ids[None], pixel_values=encoded.pixel_values, **encoded.shapes).logits[0]
        taught = encoded.supervised[1:]
        functional.cross_entropy(logits[:-1][taught], encoded.input_ids[1:][taught]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def through_both_stages(card: Card, runs: Path) -> None:
    """Stage 1, stage 2, save, catalogue, load, and answers; each stage moves its own parts and no others."""
    loaded = load(card, "float32")
    model = loaded.model
    aligned = learn(model, loaded, "align")
    assert aligned
    assert {name for name in aligned if "projector" not in name} <= {"model.image_newline"}
    instructed = learn(model, loaded, "instruct")
    assert any("language_model" in name for name in instructed)
    assert not any("vision_tower" in name for name in aligned | instructed)
    save_model(runs / "out", model, model.state_dict(), processor=loaded.processor, dtype=torch.float32)
    write_card(runs / "out", Card("out", str(runs / "out"), "run", "instruct", card.template, card.image_mode))
    (listed,) = (each for each in catalogue(runs) if each.kind == "run")
    again = load(listed, "float32")
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in again.model.state_dict().items())
    answers_as_generate(again)
    answers_as_generate(load(listed, "4bit"))


def answers_as_generate(loaded: Loaded) -> None:
    """Alone, from the cache, and two people at once."""
    people = [TALK.ask("Why?"), Conversation().ask("What?", [RED, GREEN])]
    expected = [generated(loaded, conversation) for conversation in people]
    engine = LocalEngine(loaded)
    assert [answer(engine, conversation) for conversation in people] == expected
    assert answer(engine, people[0]) == expected[0]
    assert engine.snapshot().tokens_reused > 0
    with ThreadPoolExecutor(2) as both:
        assert list(both.map(lambda conversation: answer(engine, conversation), people)) == expected
    engine.close()


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_kind_of_language_model_learns_to_see_and_answers(tmp_path: Path, name: str) -> None:
    language = write_language(tmp_path / "language", name, tokenizer())
    card = assemble(write_tower(tmp_path / "eyes", "clip"), language, tmp_path / "base", dtype=torch.float32)
    assert card.template == ("mistral_instruct" if name == "mistral" else "vicuna_v1")
    through_both_stages(card, tmp_path / "runs")


@pytest.mark.parametrize(
    ("eyes", "settings", "features"),
    [
        ("clip", {"projector": "linear"}, 4),
        ("clip", {"class_token": True}, 5),
        ("clip", {"feature_layer": -1, "image_mode": "crop"}, 4),
        ("siglip", {}, 4),
        ("clip", {"image_mode": "anyres"}, 4 + 2 * 4 + 2),
        ("siglip", {"image_mode": "anyres"}, 4 + 2 * 4 + 2),
        ("siglip", {"image_mode": "anyres_max_9"}, 4 + 4 * (3 * 2 + 1)),
    ],
)
def test_every_kind_of_eyes_is_read_as_asked(
    tmp_path: Path, eyes: str, settings: dict[str, Any], features: int
) -> None:
    language = write_language(tmp_path / "language", "llama", tokenizer())
    tower = write_tower(tmp_path / "eyes", eyes)
    card = assemble(tower, language, tmp_path / "base", dtype=torch.float32, **settings)
    loaded = load(card, "float32")
    ids = encode(TALK, loaded.processor, open_answer=False).input_ids
    assert int((ids == loaded.model.config.image_token_id).sum()) == features
    through_both_stages(card, tmp_path / "runs")


@pytest.mark.parametrize(
    ("words", "rows", "grown"),
    [
        (tokenizer(), None, 260),  # neither a padding token nor <image>
        (tokenizer(pad_token="</s>"), None, 259),
        (tokenizer("<image>", pad_token="</s>"), None, 259),
        (tokenizer("<image>", "<pad>", pad_token="<pad>"), 320, 320),  # more rows than tokens: padded by its maker
    ],
)
def test_embeddings_grow_once_by_what_the_tokenizer_lacks(
    tmp_path: Path, words: PreTrainedTokenizerFast, rows: int | None, grown: int
) -> None:
    language = write_language(tmp_path / "language", "llama", words, rows)
    card = assemble(write_tower(tmp_path / "eyes", "clip"), language, tmp_path / "base", dtype=torch.float32)
    loaded = load(card, "float32")
    assert loaded.model.get_input_embeddings().num_embeddings == grown
    assert loaded.model.config.text_config.vocab_size == grown
    assert loaded.processor.image_token_id == loaded.model.config.image_token_id < len(loaded.processor.tokenizer)
    assert loaded.processor.tokenizer.pad_token_id is not None


@pytest.mark.parametrize(("token", "template"), [("<|im_end|>", "qwen"), ("<|eot_id|>", "llama_3")])
def test_a_language_model_keeps_the_template_that_it_speaks(tmp_path: Path, token: str, template: str) -> None:
    words = tokenizer(token)
    language = write_language(tmp_path / "language", "qwen2", words)
    card = assemble(write_tower(tmp_path / "eyes", "clip"), language, tmp_path / "base", dtype=torch.float32)
    assert card.template == template
    ends = load(card, "float32").model.generation_config.eos_token_id
    assert set(ends) == {1, words.convert_tokens_to_ids(token)}


def test_a_head_with_a_bias_is_refused_rather_than_cut(tmp_path: Path) -> None:
    config, model, _ = LANGUAGES["phi"]
    words = tokenizer()
    biased = model(config(**TEXT, vocab_size=len(words)))
    torch.nn.init.ones_(biased.lm_head.bias)
    biased.save_pretrained(tmp_path / "language")
    words.save_pretrained(tmp_path / "language")
    with pytest.raises(ModelError, match="phi model has a bias"):
        assemble(write_tower(tmp_path / "eyes", "clip"), tmp_path / "language", tmp_path / "base")


def test_a_class_token_that_is_not_there_cannot_be_kept(tmp_path: Path) -> None:
    language = write_language(tmp_path / "language", "llama", tokenizer())
    with pytest.raises(ModelError, match="Only a CLIP tower"):
        assemble(write_tower(tmp_path / "eyes", "siglip"), language, tmp_path / "base", class_token=True)
