"""Checkpoints in the original LLaVA layout, made from a tiny model, come over with every weight and every answer."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from finetune.__main__ import main
from finetune.assemble import assemble
from llava_app.checkpoints import read_card
from llava_app.conversation import Conversation
from llava_app.images import Picture
from llava_app.loading import Loaded, load
from llava_app.prompts import encode

NAMES = {"linear_1": "0", "linear_2": "2"}


@pytest.fixture(params=["mlp2x_gelu", "linear"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def standard(tmp_path: Path, tower: Path, language: Path, kind: str) -> Loaded:
    """A LLaVA in the standard layout, with weights large enough that answers wander."""
    torch.manual_seed(3)
    loaded = load(assemble(tower, language, tmp_path / "standard", projector=kind, dtype=torch.float32), "float32")
    for name, weight in loaded.model.named_parameters():
        if "norm" not in name and not (kind == "linear" and "linear_2" in name):
            torch.nn.init.normal_(weight, std=0.3)
    loaded.model.lm_head.weight = loaded.model.model.language_model.embed_tokens.weight
    return loaded


def original_names(model: LlavaForConditionalGeneration, kind: str) -> dict[str, torch.Tensor]:
    """The weights of language model and projector as the original code calls them."""
    body = model.model.language_model.state_dict()
    weights = {f"model.{name}": value.clone() for name, value in body.items()}
    weights["lm_head.weight"] = model.lm_head.weight.detach().clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as old versions stored it
    for name, value in model.model.multi_modal_projector.state_dict().items():
        layer, _, last = name.partition(".")
        if kind == "mlp2x_gelu":
            weights[f"model.mm_projector.{NAMES[layer]}.{last}"] = value.clone()
        elif layer == "linear_1":
            weights[f"model.mm_projector.{last}"] = value.clone()
    return weights


def split(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Those of the language model, those of the projector."""
    projector = {name: value for name, value in weights.items() if "mm_projector" in name}
    return {name: value for name, value in weights.items() if name not in projector}, projector


@pytest.fixture
def vision(standard: Loaded, tmp_path: Path) -> Path:
    """The vision tower by itself, as the original code names it."""
    standard.model.model.vision_tower.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def write_config(folder: Path, standard: Loaded, kind: str) -> None:
    folder.mkdir(exist_ok=True)
    settings = standard.model.config.text_config.to_dict() | {
        "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_projector_type": kind,
        "mm_vision_tower": "openai/clip", "mm_vision_select_layer": -2, "image_aspect_ratio": "pad",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    standard.processor.tokenizer.save_pretrained(folder)


def answer(loaded: Loaded) -> list[int]:
    picture = Picture(Image.new("RGB", (30, 20), "red"), "red")
    encoded = encode(Conversation().ask("What?", [picture]), loaded.processor, open_answer=True)
    ids = encoded.input_ids[None]
    written = loaded.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=encoded.pixel_values, max_new_tokens=12,
        do_sample=False,
    )  # fmt: skip
    return written[0, ids.shape[1] :].tolist()


def bring_over(*arguments: str | Path) -> int:
    return main(["import", *map(str, arguments)])


def test_whole_weights_in_shards(standard: Loaded, vision: Path, kind: str, tmp_path: Path) -> None:
    write_config(tmp_path / "old", standard, kind)
    weights = list(original_names(standard.model, kind).items())
    for number, part in enumerate((dict(weights[::2]), dict(weights[1::2])), 1):
        torch.save(part, tmp_path / f"old/pytorch_model-0000{number}-of-00002.bin")
    assert bring_over(tmp_path / "old", tmp_path / "new", "--vision", vision) == 0
    new = load(read_card(tmp_path / "new"), "float32")
    before = standard.model.state_dict()
    assert all(torch.equal(before[name], value) for name, value in new.model.state_dict().items())
    assert answer(new) == answer(standard)
    assert len(set(answer(new))) > 1
    assert (new.card.stage, new.card.template, new.card.image_mode) == ("instruct", "vicuna_v1", "pad")


def test_a_projector_on_its_language_model(standard: Loaded, vision: Path, kind: str, tmp_path: Path) -> None:
    language, projector = split(original_names(standard.model, kind))
    write_config(tmp_path / "vicuna", standard, kind)
    torch.save(language, tmp_path / "vicuna/pytorch_model.bin")
    write_config(tmp_path / "old", standard, kind)
    torch.save(projector, tmp_path / "old/mm_projector.bin")
    assert bring_over(tmp_path / "old", tmp_path / "no", "--vision", vision) == 2
    assert bring_over(tmp_path / "old", tmp_path / "new", "--vision", vision, "--language", tmp_path / "vicuna") == 0
    new = load(read_card(tmp_path / "new"), "float32")
    assert (new.card.stage, new.card.template) == ("align", "plain")
    before = standard.model.state_dict()
    assert all(torch.equal(before[name], value) for name, value in new.model.state_dict().items())


def test_lora_is_merged_into_its_language_model(standard: Loaded, vision: Path, kind: str, tmp_path: Path) -> None:
    language, projector = split(original_names(standard.model, kind))
    target, (down, up) = "model.layers.1.mlp.up_proj.weight", (torch.randn(2, 64), torch.randn(128, 2))
    write_config(tmp_path / "vicuna", standard, kind)
    torch.save({**language, target: language[target] - 2 * up @ down}, tmp_path / "vicuna/pytorch_model.bin")
    write_config(tmp_path / "old", standard, kind)
    stem = f"base_model.model.{target.removesuffix('.weight')}"
    adapters = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    torch.save(adapters, tmp_path / "old/adapter_model.bin")
    others = {f"base_model.model.{name}": value for name, value in projector.items()}
    torch.save(others, tmp_path / "old/non_lora_trainables.bin")
    (tmp_path / "old/adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}), encoding="utf-8")
    assert bring_over(tmp_path / "old", tmp_path / "new", "--vision", vision, "--language", tmp_path / "vicuna") == 0
    new = load(read_card(tmp_path / "new"), "float32")
    before = standard.model.state_dict()
    for name, value in new.model.state_dict().items():
        torch.testing.assert_close(before[name], value, atol=1e-5, rtol=1e-5)
    assert answer(new) == answer(standard)


@pytest.mark.parametrize("kind", ["linear"], indirect=True)
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("less", "language model do not fit"),
        ("more", "Its projector has"),
        ("code", "plain tensors"),
        ("kind", "'qformer'"),
    ],
)
def test_what_does_not_fit_or_runs_code_is_refused(
    standard: Loaded,
    vision: Path,
    kind: str,
    tmp_path: Path,
    damage: str,
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_config(tmp_path / "old", standard, "qformer" if damage == "kind" else kind)
    weights: dict[str, object] = dict(original_names(standard.model, kind))
    if damage == "less":
        del weights["model.norm.weight"]
    elif damage == "more":
        weights["model.mm_projector.4.weight"] = torch.ones(1)
    elif damage == "code":
        weights["model.norm.weight"] = Path("any object that is no tensor")
    torch.save(weights, tmp_path / "old/pytorch_model.bin")
    assert bring_over(tmp_path / "old", tmp_path / "new", "--vision", vision) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
