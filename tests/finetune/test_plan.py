"""The plan against arithmetic that is published, against counted FLOPs, and against what autograd really keeps."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig, LlavaForConditionalGeneration

from finetune.__main__ import main
from finetune.adapters import add_adapters
from finetune.collate import IGNORE, Batch
from finetune.flops import GPUS, REPORTED, Row, find_device, known_peak, mfu, model_flops, sizes, step_flops
from finetune.packing import use_packing
from finetune.plan import USUAL, base_config, plan_memory
from finetune.precision import keep
from finetune.recipe import Recipe, all_recipes, load_recipe
from finetune.rows import Rows, assumed
from finetune.stages import apply_stage
from finetune.supervision import SupervisedLoss
from llava_app.errors import RecipeError
from llava_app.precision import quantisation
from tests.family_models import next_config
from tests.fixtures_model import tiny_config

ROW = Row(examples=4, tokens=4 * 80, pictures=4, supervised=4 * 80)
VISION = "vision_learning_rate=1e-5"
HOW = [
    ("align",),
    ("instruct",),
    ("instruct", "lora_rank=8"),
    ("instruct", "frozen=projector"),
    ("instruct", "frozen=language_model"),
    ("instruct", VISION),
    ("align", VISION, "frozen=projector"),
]
PRESETS = {named.name: float(size[1]) * 1e9 for named in all_recipes() if (size := re.search(r"_(\d+)gb$", named.name))}
ROOM = PRESETS | {"own_data": 12e9}  # as it says itself


def small() -> LlavaConfig:
    """64 visual tokens; wide enough that matrices outweigh everything else."""
    config = tiny_config()
    config.vision_config.update({"intermediate_size": 256, "num_hidden_layers": 3, "image_size": 112, "patch_size": 14})
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
    config.text_config.update({**shape, "head_dim": 64, "vocab_size": 512})
    return config


def rows(recipe: Recipe, text: int, base: str = "7b") -> Rows:
    """Of a recipe without data."""
    return assumed(sizes(base_config(base)), recipe, text=text, examples=0)


def step(model: LlavaForConditionalGeneration) -> torch.Tensor:
    """The loss of ROW: four examples of 64 visual tokens and 16 of text, all of them supervised."""
    ids_BS = torch.full((4, 80), 5)
    ids_BS[:, :64] = 3
    logits_BSV = model(input_ids=ids_BS, pixel_values=torch.randn(4, 3, 112, 112), use_cache=False).logits
    return functional.cross_entropy(logits_BSV.flatten(0, 1).float(), ids_BS.flatten())


@pytest.mark.parametrize("how", [how for how in HOW if "lora_rank=8" not in how], ids=" ".join)
def test_flops_are_those_that_torch_counts(how: tuple[str, ...]) -> None:
    recipe = load_recipe(f"memeworld_{how[0]}", how[1:])
    model = LlavaForConditionalGeneration._from_config(small(), attn_implementation="eager")
    apply_stage(model, recipe)
    with FlopCounterMode(display=False) as counter:
        step(model).backward()
    assert model_flops(sizes(small()), recipe, ROW) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_a_full_step_of_seven_billion_is_six_flops_per_weight_and_token() -> None:
    size, row = sizes(base_config("7b")), Row(1, 776, 1, 200)
    flops = model_flops(size, load_recipe("llava15_7b_instruct"), row)
    assert flops == pytest.approx(6 * 6.74e9 * 776, rel=0.05)
    lora = model_flops(size, load_recipe("llava15_7b_lora"), row)
    align = model_flops(size, load_recipe("llava15_7b_align"), row)
    assert align < lora < 0.75 * flops


def packed() -> Batch:
    """ROW as training reads it; the first token of an example teaches nothing."""
    ids_BS = torch.full((4, 80), 5)
    ids_BS[:, :64] = 3
    labels_BS = ids_BS.clone()
    labels_BS[:, 0] = IGNORE
    positions, parts = torch.arange(80).repeat(1, 4), torch.tensor([0, 80, 80, 80, 80])
    rows = ids_BS.reshape(1, -1), labels_BS.reshape(1, -1)
    return Batch(*rows, torch.randn(4, 3, 112, 112), parts[1:], positions, parts)


def with_large_eyes() -> LlavaConfig:
    """As `small`, with a vision tower that outweighs the rest."""
    config = small()
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 9, "num_attention_heads": 4}
    config.vision_config.update(shape)
    config.vision_feature_layer = -1  # all are read
    return config


def made(config: LlavaConfig, recipe: Recipe, folder: Path) -> LlavaForConditionalGeneration:
    """A model of random weights, kept in 4 bits if the recipe says so."""
    model = LlavaForConditionalGeneration._from_config(config)
    if recipe.quantise == "none":
        return model.train()
    model.save_pretrained(folder)
    cpu = torch.device("cpu")
    settings = {"quantization_config": quantisation(cpu), "device_map": {"": cpu}}
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, **settings).train()


WAYS = [(how, small, precision) for how in HOW for precision in ("float32", "bfloat16")]
WAYS += [(("instruct", "lora_rank=8", "quantise=4bit"), small, "bfloat16")]
WAYS += [(HOW[-1], with_large_eyes, precision) for precision in ("float32", "bfloat16")]


@pytest.mark.parametrize(("how", "config", "precision"), WAYS)
def test_the_planned_activations_are_those_that_autograd_keeps(
    how: tuple[str, ...], config: Callable[[], LlavaConfig], precision: str, tmp_path: Path
) -> None:
    recipe = load_recipe(f"memeworld_{how[0]}", [*how[1:], f"precision={precision}"])
    model = made(config(), recipe, tmp_path)
    use_packing(model, 512)
    if recipe.lora_rank:
        add_adapters(model, recipe)
    keep(model, recipe, getattr(torch, precision))
    apply_stage(model, recipe)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", enabled=precision == "bfloat16"):
        loss = SupervisedLoss(model)(packed())
    planned = plan_memory(config(), recipe, ROW, gpu=False)
    logits = ROW.supervised * 512 * 4.0  # of the planned 12 bytes, those that are kept
    measured = sum(storage.nbytes() for storage in kept.values())
    assert planned.activations + planned.copies + logits == pytest.approx(measured, rel=0.15)
    assert loss.isfinite()


def test_seven_billion_take_what_is_known_of_them() -> None:
    config, full = base_config("7b"), load_recipe("llava15_7b_instruct")
    memory = plan_memory(config, full, rows(full, USUAL["instruct"]).usual, gpu=True)
    learning = 7_063_427_072 - 303_507_456  # the published port's parameters but the tower's
    assert memory.weights == 4 * learning + 2 * 303_507_456
    assert memory.gradients == 4 * learning
    assert memory.optimiser == 2 * memory.gradients
    align = load_recipe("llava15_7b_align")
    frozen = plan_memory(config, align, rows(align, USUAL["align"]).usual, gpu=True)
    assert frozen.weights == 4 * 20_979_712 + 2 * (7_063_427_072 - 20_979_712)
    lora = load_recipe("llava15_7b_lora")
    assert lora.lora_rank * sizes(config).adapter_sides * sizes(config).layers == 319_815_680


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize(("name", "room"), ROOM.items(), ids=ROOM)
def test_a_preset_fits_into_the_memory_of_its_name_also_at_worst(name: str, room: float, bfloat16: bool) -> None:
    recipe = load_recipe(name)
    worst = rows(recipe, USUAL["instruct"]).worst
    assert worst.tokens == recipe.micro_batch * recipe.max_length
    assert plan_memory(base_config("7b"), recipe, worst, gpu=True, bfloat16=bfloat16).peak < 0.95 * room


def test_without_bfloat16_the_adapters_of_a_quantised_model_are_kept_in_float32() -> None:
    recipe, config = load_recipe("llava15_7b_qlora_24gb"), base_config("7b")
    row = rows(recipe, USUAL["instruct"]).usual
    new, old = (plan_memory(config, recipe, row, gpu=True, bfloat16=has) for has in (True, False))
    adapters = 319_815_680  # of rank 128
    assert old.weights - new.weights == old.gradients - new.gradients == 2 * adapters
    assert old.optimiser - new.optimiser == 4 * adapters
    assert old.copies - new.copies == 2 * adapters / 32  # of one layer at a time
    assert new.copies == 0


def test_a_plan_says_in_what_is_computed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llava15_7b_qlora_16gb", "--device", "t4"]) == 0
    assert "computing in float16, with scaled gradients" in capsys.readouterr().out
    assert main(["plan", "llava15_7b_qlora_16gb", "--device", "l4"]) == 0
    assert "float32, adapters and what is frozen in bfloat16" in capsys.readouterr().out


def test_there_is_a_preset_for_each_of_the_usual_sizes() -> None:
    assert sorted(PRESETS.values()) == [8e9, 12e9, 16e9, 24e9, 48e9]


def test_what_saves_memory_saves_memory() -> None:
    config, recipe = base_config("7b"), load_recipe("llava15_7b_instruct", ["gradient_checkpointing=false"])
    row = rows(recipe, 200).usual
    plain = plan_memory(config, recipe, row, gpu=True).peak
    for change in ({"gradient_checkpointing": True}, {"optimizer": "adamw8bit"}, {"lora_rank": 16}):
        assert plan_memory(config, replace(recipe, **change), row, gpu=True).peak < plain


def test_mfu_is_the_share_of_the_peak() -> None:
    assert mfu(100e12, 2.0, GPUS["a100-80gb"], devices=1) == pytest.approx(50 / 312)


@pytest.mark.parametrize("how", [("align",), ("instruct", "lora_rank=8"), ("instruct", VISION)])
def test_the_flops_of_a_step_are_those_of_its_examples(how: tuple[str, ...]) -> None:
    size, recipe = sizes(small()), load_recipe(f"memeworld_{how[0]}", how[1:])
    lengths, labels = torch.tensor([80, 100]), torch.full((1, 180), IGNORE)
    labels[0, 70:80] = labels[0, 150:] = 5
    packed = Batch(torch.zeros(1, 180), labels, torch.zeros(2, 3, 112, 112), lengths)
    alone = Batch(torch.zeros(1, 90), labels[:, :90], None, torch.tensor([90]))
    rows = Row(1, 80, 1, 10), Row(1, 100, 1, 30), Row(1, 90, 0, 10)
    wanted = sum(model_flops(size, recipe, row) for row in rows)
    assert step_flops(size, recipe, [packed, alone]) == pytest.approx(wanted)


def test_a_peak_is_known_of_exactly_named_devices_only() -> None:
    half, whole = load_recipe("llava15_7b_align"), load_recipe("llava15_7b_align", ["precision=float32"])
    assert set(REPORTED.values()) == set(GPUS)
    assert known_peak("NVIDIA A100-SXM4-80GB", half) == GPUS["a100-80gb"]
    assert known_peak("NVIDIA A100-SXM4-80GB", whole) is None
    assert known_peak("NVIDIA GeForce RTX 4090 D", half) is None


@pytest.mark.parametrize(("name", "told"), [("NVIDIA GeForce RTX 4090 D", "not known here"), ("NVIDIA L40", "181.00")])
def test_a_device_without_a_known_peak_is_planned_but_for_the_hours(
    name: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = SimpleNamespace(name=name, total_memory=24.5e9, major=8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    assert find_device(None).memory == 24.5e9
    assert main(["plan", "llava15_7b_qlora_12gb", "--examples", "1000"]) == 0
    plan = capsys.readouterr().out
    assert f"fits into the 24 GB of {name}" in plan
    assert told in plan
    assert ("hours" in plan or "minutes" in plan) is (name == "NVIDIA L40")


def test_before_ampere_there_is_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(name="NVIDIA TITAN V", total_memory=12e9, major=7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    assert not find_device(None).bfloat16
    assert mfu(1e12, 1.0, find_device(None)) is None


def test_an_unknown_device_names_those_that_are_known() -> None:
    with pytest.raises(RecipeError, match=r"'rtx9000' is not known.*h200.*cpu"):
        find_device("rtx9000")


def test_a_plan_is_printed_and_says_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llava15_7b_instruct", "--device", "rtx4090", "--examples", "665298"]) == 0
    told = capsys.readouterr().out
    assert "does not fit into the 24 GB of NVIDIA RTX 4090" in told
    assert "665,298 examples, 1 epochs" in told
    assert main(["plan", "llava15_7b_qlora_8gb", "micro_batch=2", "--device", "rtx4090"]) == 0
    assert "memory for 2 examples at a time" in capsys.readouterr().out


def test_a_model_that_sees_tiles_is_planned_with_all_of_them() -> None:
    recipe = load_recipe("memeworld_instruct", ["micro_batch=2", "max_length=100"])
    row = assumed(sizes(next_config()), recipe, text=10, examples=0).usual
    assert (row.pictures, row.tokens) == (2 * 5, 2 * (16 + 64 + 8 + 10))  # an overview, 2 x 2 tiles, the ends of rows
