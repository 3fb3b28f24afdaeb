import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from finetune.assemble import assemble
from llava_app.checkpoints import read_card
from llava_app.conversation import Conversation
from llava_app.errors import ModelError
from llava_app.images import Picture
from llava_app.loading import load
from llava_app.prompts import encode


def test_both_halves_are_kept_as_they_were(base: Path, tower: Path, language: Path) -> None:
    whole = load_file(base / "model.safetensors")
    for prefix, folder in (("vision_tower.", tower), ("language_model.", language)):
        for name, weight in load_file(folder / "model.safetensors").items():
            assert torch.equal(whole[prefix + name][: len(weight)], weight.half()), name


def test_an_assembled_model_loads_and_sees_its_picture(base: Path) -> None:
    loaded = load(read_card(base), "float32")
    picture = Picture(Image.new("RGB", (40, 20), "red"), digest="red")
    encoded = encode(Conversation().ask("Which colour?", [picture]), loaded.processor, open_answer=True)
    logits = loaded.model(input_ids=encoded.input_ids[None], pixel_values=encoded.pixel_values).logits
    assert logits.isfinite().all()
    assert loaded.card.stage == "base"


def test_tokenizer_and_embeddings_grow_by_the_missing_tokens(base: Path, language: Path) -> None:
    loaded = load(read_card(base), "float32")
    tokenizer, config = loaded.processor.tokenizer, loaded.model.config
    before = json.loads((language / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    assert (len(tokenizer), config.text_config.vocab_size) == (before + 2, before + 2)
    assert tokenizer.convert_ids_to_tokens(config.image_token_id) == "<image>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_image_token_is_never_generated(base: Path) -> None:
    loaded = load(read_card(base), "float32")
    assert loaded.model.generation_config.suppress_tokens == [loaded.model.config.image_token_id]


def test_the_same_halves_give_the_same_model(base: Path, tower: Path, language: Path, tmp_path: Path) -> None:
    assemble(tower, language, tmp_path / "again")
    assert read_card(tmp_path / "again").files == read_card(base).files


def test_a_stored_model_names_no_folder_of_this_machine(base: Path, tower: Path) -> None:
    for file in base.glob("*.json"):
        assert str(tower.parent) not in file.read_text(encoding="utf-8")


def test_siglip_towers_keep_every_feature(tmp_path: Path, language: Path) -> None:
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    SiglipVisionModel(config).save_pretrained(tmp_path / "siglip")
    loaded = load(assemble(tmp_path / "siglip", language, tmp_path / "whole", image_mode="crop"), "float32")
    assert loaded.model.config.vision_feature_select_strategy == "full"
    assert not loaded.processor.image_processor.do_pad


def test_a_folder_in_use_is_not_overwritten(base: Path, tower: Path, language: Path) -> None:
    with pytest.raises(ModelError, match="not empty"):
        assemble(tower, language, base)


def test_halves_of_the_wrong_kind_are_named(tmp_path: Path, tower: Path, language: Path) -> None:
    with pytest.raises(ModelError, match="'llama' model; a vision tower is one of clip"):
        assemble(language, language, tmp_path / "out")
    with pytest.raises(ModelError, match="'clip_vision_model' model, which is no causal language model"):
        assemble(tower, tower, tmp_path / "out")
    with pytest.raises(ModelError, match="not a model folder"):
        assemble(tmp_path / "nowhere", language, tmp_path / "out")
