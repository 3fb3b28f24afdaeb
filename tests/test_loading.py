import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import HTTPError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaProcessor, SiglipVisionConfig

import llava_app.precision
from llava_app import checkpoints, hub, loading, processors
from llava_app.checkpoints import HUB_PRESETS, OWN, Card, built_in, find, read_card, write_card
from llava_app.conversation import Conversation
from llava_app.errors import ModelError
from llava_app.images import Picture
from llava_app.loading import described, load
from llava_app.memory import smallest
from llava_app.outlook import default_card, outlook
from llava_app.precision import best_device, choose_precision, quantisation
from llava_app.processors import make_processor
from llava_app.prompts import encode, template_text
from tests.fixtures_model import byte_tokenizer, tiny_config, write_tiny_model

SEVEN_B = next(card for card in HUB_PRESETS if card.name == "LLaVA-1.5-7B")
needs_demo = pytest.mark.skipif(
    not (checkpoints.DEMO / "memeworld").exists(), reason="the built-in model is not trained yet"
)


@pytest.fixture
def folder(tiny_card: Card, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny_card.source, tmp_path / "tiny"))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise HTTPError("Name or service not known")

    monkeypatch.setattr(hub.HfApi, "model_info", unreachable)


def change_json(path: Path, **values: object) -> None:
    """Change a file of a model, whose card is then written anew."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    write_card(path.parent, read_card(path.parent))


def test_the_weights_come_back_as_saved(tiny_card: Card) -> None:
    loaded = load(tiny_card, "float32")
    saved = load_file(Path(tiny_card.source) / "model.safetensors")
    assert torch.equal(loaded.model.lm_head.weight, saved["language_model.lm_head.weight"])
    assert not loaded.model.training


def test_a_run_that_rewrites_its_weights_does_not_touch_a_loaded_model(folder: Path) -> None:
    weight = load(read_card(folder), "float32").model.lm_head.weight
    before = weight.clone()
    path = folder / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_every_weight_has_the_asked_precision(tiny_card: Card, precision: str) -> None:
    loaded = load(tiny_card, precision)
    assert loaded.precision == precision
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, precision)}


def test_four_bit_quantises_the_language_model_and_nothing_else(tiny_card: Card) -> None:
    loaded = load(tiny_card, "4bit")
    kinds = {
        name: type(module).__name__
        for name, module in loaded.model.named_modules()
        if "Linear" in type(module).__name__
    }
    quantised = {name for name, kind in kinds.items() if kind == "Linear4bit"}
    assert quantised == {name for name in kinds if name.startswith("model.language_model.layers")}
    weight = loaded.model.model.language_model.layers[0].mlp.up_proj.weight
    assert weight.quant_state.quant_type == "nf4"
    assert weight.quant_state.nested
    assert loaded.model.model.language_model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


@needs_demo
def test_the_built_in_model_runs_in_four_bit_on_this_machine() -> None:
    loaded = load(built_in(), "4bit")
    picture = Picture(Image.new("RGB", (112, 112), "red"), "red")
    encoded = encode(Conversation().ask("what is this?", [picture]), loaded.processor, open_answer=True)
    assert encoded.pixel_values is not None
    logits = loaded.model(input_ids=encoded.input_ids[None], pixel_values=encoded.pixel_values).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_small_model_runs_in_float32_on_a_gpu(tiny_card: Card, device: str) -> None:
    chosen, why = choose_precision("auto", Path(tiny_card.source), device=torch.device(device))
    assert chosen == "float32"
    assert f"float32 on the {device.upper()}" in why


@pytest.mark.parametrize(("device", "precision"), [("cuda", "4bit"), ("mps", "float16")])
def test_a_big_model_runs_in_four_bit_on_a_gpu_that_has_it(
    tiny_card: Card, monkeypatch: pytest.MonkeyPatch, device: str, precision: str
) -> None:
    monkeypatch.setattr(llava_app.precision, "SMALL_BYTES", 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")
    chosen, why = choose_precision("auto", Path(tiny_card.source), device=torch.device(device))
    assert chosen == precision
    assert "GPU" in why


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_four_bit_computes_in_what_the_gpu_has(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    settings = quantisation(torch.device("cuda"))
    assert settings.bnb_4bit_compute_dtype == dtype
    assert (settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant) == ("nf4", True)


def test_four_bit_on_an_apple_gpu_is_refused_with_what_to_choose(tiny_card: Card) -> None:
    with pytest.raises(ModelError, match="Choose float16"):
        choose_precision("4bit", Path(tiny_card.source), device=torch.device("mps"))


@pytest.mark.parametrize(("native", "precision"), [(True, "8bit"), (False, "float32")])
def test_a_model_runs_in_8_bit_on_a_cpu_that_has_bfloat16(
    tiny_card: Card, monkeypatch: pytest.MonkeyPatch, *, native: bool, precision: str
) -> None:
    monkeypatch.setattr(loading, "best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert load(tiny_card).precision == precision


def test_an_unknown_precision_is_named(tiny_card: Card) -> None:
    with pytest.raises(ModelError, match="no precision int2"):
        load(tiny_card, "int2")


def test_tied_weights_count_as_complete(tmp_path: Path) -> None:
    card = write_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    assert not [name for name in load_file(tmp_path / "tied" / "model.safetensors") if "lm_head" in name]
    model = load(card, "float32").model
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


@pytest.mark.parametrize("damage", ["missing", "unexpected", "of the wrong shape"])
def test_weights_that_do_not_fit_are_refused_by_name(folder: Path, damage: str) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "linear_1.bias" in name)
    if damage == "unexpected":
        weights["linear_9.bias"] = weights[name].clone()
    elif damage == "missing":
        del weights[name]
    else:
        weights[name] = weights[name][:-1].clone()
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"1 {damage} \(.*linear_[19]\.bias"):
        load(read_card(folder), "float32")


def test_truncated_weights_are_a_model_error(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="Tiny cannot be loaded"):
        load(read_card(folder), "float32")


def test_pickled_weights_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    card = Card("Pickled", str(folder), "run", "instruct", "vicuna_v1", "pad")
    with pytest.raises(ModelError, match="Pickled cannot be loaded"):
        load(card, "float32")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja"])
def test_a_folder_without_one_of_its_files_is_a_model_error(folder: Path, name: str) -> None:
    card = read_card(folder)
    (folder / name).unlink()
    with pytest.raises(ModelError, match="Tiny"):
        load(card, "float32")


def test_processor_fields_come_from_the_config(folder: Path) -> None:
    change_json(folder / "processor_config.json", patch_size=14, num_additional_image_tokens=5)
    processor = load(read_card(folder), "float32").processor
    assert (processor.patch_size, processor.num_additional_image_tokens) == (7, 1)


def test_image_tokens_that_do_not_match_the_image_features_are_refused(
    tiny_card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tower without a class token: the processor then counts one token less than the model makes features.
    monkeypatch.setitem(
        processors._TOWERS, "clip_vision_model", replace(processors._TOWERS["clip_vision_model"], class_tokens=0)
    )
    with pytest.raises(ModelError, match="reserves 15 tokens for an image and its vision tower makes 16"):
        load(tiny_card, "float32")


def test_images_prepared_in_another_size_than_the_tower_sees_are_refused(folder: Path) -> None:
    path = folder / "processor_config.json"
    image_processor = json.loads(path.read_text())["image_processor"]
    sizes = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    change_json(path, image_processor=image_processor | sizes)
    with pytest.raises(ModelError, match="prepares images at 56 px but its tower sees 28 px"):
        load(read_card(folder), "float32")


def test_another_image_token_than_the_models_is_refused(folder: Path) -> None:
    change_json(folder / "config.json", image_token_index=4)
    with pytest.raises(ModelError, match="writes images as token 3 but its config expects 4"):
        load(read_card(folder), "float32")


def test_a_model_without_an_end_token_is_refused(folder: Path) -> None:
    change_json(folder / "generation_config.json", eos_token_id=None)
    with pytest.raises(ModelError, match="eos_token_id"):
        load(read_card(folder), "float32")


def test_the_card_decides_whether_images_are_padded(folder: Path) -> None:
    change_json(folder / "card.json", image_mode="crop")
    assert load(read_card(folder), "float32").processor.image_processor.do_pad is False


def test_a_saved_processor_is_read_by_transformers_alone(tiny_card: Card) -> None:
    ours = load(tiny_card, "float32").processor
    theirs = AutoProcessor.from_pretrained(tiny_card.source)
    picture = Image.effect_noise((40, 20), 90).convert("RGB")
    text = "USER: <image>\nWhat? ASSISTANT:"
    a, b = (p(images=picture, text=text, return_tensors="pt") for p in (ours, theirs))
    assert torch.equal(a["input_ids"], b["input_ids"])
    assert torch.equal(a["pixel_values"], b["pixel_values"])
    assert theirs.chat_template == template_text("vicuna_v1")


def processor_for(image_mode: str) -> LlavaProcessor:
    return make_processor(tiny_config(), byte_tokenizer(), image_mode=image_mode, template_name="vicuna_v1")


def test_pad_shows_the_whole_picture_and_crop_its_centre() -> None:
    wide = Image.new("RGB", (60, 20), "white")
    wide.paste("black", (0, 0, 20, 20))
    wide.paste("black", (40, 0, 60, 20))
    padded, cropped = (
        processor_for(mode).image_processor(wide, return_tensors="pt")["pixel_values"][0] for mode in ("pad", "crop")
    )
    assert (cropped > 1).all()  # only the white middle, 1.9 standard deviations above the mean
    assert padded[:, :8].abs().max() < 0.03  # the mean colour above the picture
    assert padded[:, 14, 0].max() < -1  # its black left end


def test_a_siglip_tower_has_no_class_token() -> None:
    config = tiny_config()
    config.vision_config = SiglipVisionConfig(image_size=28, patch_size=7)
    config.vision_feature_select_strategy = "full"
    processor = make_processor(config, byte_tokenizer(), image_mode="crop", template_name="plain")
    inputs = processor(images=Image.new("RGB", (9, 9)), text="<image>", return_tensors="pt")
    assert int((inputs["input_ids"] == 3).sum()) == 16
    assert list(processor.image_processor.image_mean) == [0.5, 0.5, 0.5]


def test_an_unreachable_hub_is_an_error_that_names_the_way_out(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_app.outlook.free_bytes", lambda device: 1e12)
    monkeypatch.setattr("llava_app.outlook.no_room", lambda download, name: None)
    with pytest.raises(ModelError, match=r"Hub did not deliver llava-hf/.*choose the built-in model"):
        load(SEVEN_B)


def test_a_model_that_does_not_fit_is_refused_before_it_is_downloaded_with_one_that_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llava_app.outlook.free_bytes", lambda device: 6e9)
    monkeypatch.setattr(loading, "folder_of", lambda card: pytest.fail("it was fetched"))
    with pytest.raises(ModelError, match=r"needs 1\d\.\d GB in bfloat16 and 6\.0 GB .*LLaVA-Interleave-0.5B fits"):
        load(SEVEN_B, "bfloat16")
    monkeypatch.setattr("llava_app.outlook.free_bytes", lambda device: 1e8)
    with pytest.raises(ModelError, match=r"LLaVA-1.5-7B needs .* The built-in model fits"):
        load(SEVEN_B, "bfloat16")


def test_a_download_that_the_disk_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_app.outlook.free_bytes", lambda device: 1e12)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda folder: SimpleNamespace(free=9e9))
    with pytest.raises(ModelError, match=r"takes 14\.1 GB on the disk and 9\.0 GB are free there.*HF_HOME"):
        load(SEVEN_B)


def test_what_a_model_would_take_is_known_before_it_is_loaded(
    tiny_card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_app.outlook.free_bytes", lambda device: 6e9)
    tiny, big = outlook(tiny_card, "float32"), outlook(SEVEN_B, "bfloat16", given_back=12e9)
    assert tiny
    assert big
    assert tiny.needed == pytest.approx(smallest(load(tiny_card, "float32").plan.need))
    assert (tiny.family, tiny.context, tiny.precision, tiny.free, tiny.download) == ("llava", 512, "float32", 6e9, 0)
    assert (tiny.refusal, big.refusal) == (None, None)
    assert (big.free, big.parameters, big.download) == (18e9, 7_063_427_072, 2 * 7_063_427_072)
    assert outlook(replace(SEVEN_B, source="some/body")) is None  # nothing is known of it before the download
    with pytest.raises(ModelError, match="no config"):
        outlook(replace(tiny_card, source=str(tmp_path)))


def test_a_hub_model_gets_the_template_and_the_padding_it_was_trained_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "chat_template.jinja").write_text("as published")
    monkeypatch.setattr(loading, "folder_of", lambda card: folder)
    monkeypatch.setattr("llava_app.outlook.free_bytes", lambda device: 1e12)
    monkeypatch.setattr(loading, "free_bytes", lambda device: 1e12)
    processor = load(SEVEN_B, "float32").processor
    assert processor.chat_template == template_text("vicuna_v1")
    assert processor.image_processor.do_pad is True


def test_a_gpu_gets_the_memory_of_unused_weights_back_before_room_is_planned(
    tiny_card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free_bytes(device: torch.device) -> float:
        events.append("measured")
        return 1e12

    events: list[str] = []
    shelf, cpu = loading.Shelf(), torch.device("cpu")
    load(tiny_card, "float32", shelf=shelf, device=cpu)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("given back"))
    monkeypatch.setattr(loading, "free_bytes", free_bytes)
    load(tiny_card, "bfloat16", shelf=shelf, device=cpu)
    assert events[:2] == ["given back", "measured"]


def test_who_holds_no_conversation_needs_room_for_the_weights_only(
    tiny_card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load(tiny_card, "float32").plan.need.weights
    for free, fits in ((1.01 * weights, True), (0.99 * weights, False)):
        monkeypatch.setattr(loading, "free_bytes", lambda device, free=free: free)
        with pytest.raises(ModelError, match="--precision 4bit"):
            load(tiny_card, "float32")
        if fits:
            load(tiny_card, "float32", advice="Buy memory.")
            continue
        with pytest.raises(ModelError, match=r"GB for its weights in float32 and .* free\. Buy memory\.$"):
            load(tiny_card, "float32", advice="Buy memory.")


class TestDefaultCard:
    @pytest.fixture(autouse=True)
    def _machine(self, tiny_card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpu_fault = llava_app.precision.gpu_fault.__wrapped__
        monkeypatch.setattr(llava_app.precision, "gpu_fault", lambda: None)
        monkeypatch.setattr("llava_app.outlook.built_in", lambda: tiny_card)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(23.5e9), int(24e9)))

    def test_without_a_gpu_it_is_the_built_in_model(self, tiny_card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        card, why = default_card()
        assert card == tiny_card
        assert why.startswith("No NVIDIA GPU here, so this is the small built-in model. For photographs, LLaVA-OneVisi")

    def test_a_gpu_that_torch_was_not_built_for_is_not_used(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(*_: object, **__: object) -> torch.Tensor:
            raise torch.AcceleratorError("CUDA error: no kernel image is available\nCompile with TORCH_USE_CUDA_DSA")

        monkeypatch.setattr(llava_app.precision, "gpu_fault", self.gpu_fault)
        monkeypatch.setattr(torch, "ones", fail)
        assert best_device().type != "cuda"
        assert caplog.messages == ["The GPU is not used: CUDA error: no kernel image is available"]
        assert default_card()[1].startswith("PyTorch cannot use the NVIDIA GPU here, so this is the small built-in")

    def test_with_room_and_the_hub_it_is_the_big_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("llava_app.outlook.hub_answers", lambda card: True)
        card, why = default_card()
        assert card.name == "LLaVA-1.5-7B"
        assert why == "The GPU has 23.5 GB free and LLaVA-1.5-7B needs 7.6 GB."

    def test_without_room_it_is_the_built_in_model(self, tiny_card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(4e9), int(24e9)))
        card, why = default_card()
        assert card == tiny_card
        assert "4.0 GB free" in why

    @pytest.mark.usefixtures("no_hub")
    def test_with_neither_hub_nor_copy_it_is_the_built_in_model(self, tiny_card: Card) -> None:
        card, why = default_card()
        assert card == tiny_card
        assert "Hub is out of reach" in why


def test_a_folder_without_a_card_is_loaded_as_its_own_files_say(tiny_card: Card, tmp_path: Path) -> None:
    shutil.copytree(tiny_card.source, tmp_path / "bare", ignore=shutil.ignore_patterns("card.json"))
    bare, carded = load(find(str(tmp_path / "bare")), "float32"), load(tiny_card, "float32")
    assert bare.processor.chat_template == carded.processor.chat_template
    assert all(torch.equal(weight, carded.model.state_dict()[name]) for name, weight in bare.model.state_dict().items())
    assert "differs" not in bare.why


def test_what_a_model_without_a_card_was_trained_with_is_read_from_its_own_files(folder: Path) -> None:
    (folder / "card.json").unlink()
    told = described(find(str(folder)))
    assert (told.template, told.image_mode, told.stage) == ("vicuna_v1", "pad", "instruct")
    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    settings["image_processor"]["do_pad"] = False
    (folder / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['role'] }}", encoding="utf-8")
    told = described(find(str(folder)))
    assert (told.template, told.image_mode) == (OWN, "crop")
