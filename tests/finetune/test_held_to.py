"""What a run promises beside its steps: features kept on disk, a vision tower that learns, examples held out."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from finetune import features
from finetune.__main__ import main
from finetune.collate import Batch, StepCollator
from finetune.data import Example, Examples, read_records
from finetune.data.mixture import open_data
from finetune.features import FeatureStore, tower_digest
from finetune.held_out import split
from finetune.supervision import SupervisedLoss
from llava_app.checkpoints import read_card
from llava_app.loading import Loaded, load
from tests.finetune.conftest import COLOURS, record
from tests.finetune.test_full_disk import files_of_at_most

FAST = ("precision=float32", "global_batch=8", "micro_batch=4", "save_every=2", "max_steps=5", "epochs=3")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def instruct(*arguments: str) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return main(["instruct", *arguments])


def start(name: str, base: Path, data: Path, *more: str) -> int:
    return instruct("--base", str(base), "--data", str(data), "--name", name, *FAST, *more)


@pytest.fixture(scope="module")
def loaded(base: Path) -> Loaded:
    return load(read_card(base), "float32")


@pytest.fixture
def batch(loaded: Loaded, data: Path) -> Batch:
    records = read_records(data)[:6]
    examples = tuple(Example(record, (data.parent / record["image"][0],), 0) for record in records)
    encoded = Examples(examples, loaded.processor, max_length=512)
    return StepCollator(0, 3, 6, packing=False)([encoded[place] for place in range(6)])[0]


def test_features_come_from_the_tower_once(
    loaded: Loaded, batch: Batch, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FeatureStore(folder / "features", 1e6)
    first = store.fill(batch, loaded.model)
    monkeypatch.setattr(features, "tower_features", lambda *_: pytest.fail("asked again"))
    again = FeatureStore(folder / "features", 1e6).fill(batch, loaded.model)
    assert first.features is not None
    assert again.features is not None
    assert torch.equal(first.features, again.features)
    with torch.no_grad():
        model = SupervisedLoss(loaded.model)
        torch.testing.assert_close(model(first), model(batch), rtol=1e-3, atol=1e-2)


def test_no_more_features_are_kept_than_allowed(loaded: Loaded, batch: Batch, folder: Path) -> None:
    store = FeatureStore(folder / "features", 1000)
    whole = FeatureStore(folder / "others", 1e6).fill(batch, loaded.model).features
    kept = store.fill(batch, loaded.model).features
    assert kept is not None
    assert whole is not None
    assert torch.equal(kept, whole)
    assert 0 < sum(path.stat().st_size for path in (folder / "features").iterdir()) <= 1000


def test_a_full_disk_keeps_no_features_and_stops_nothing(
    loaded: Loaded, batch: Batch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = FeatureStore(folder / "features", 1e6)
    with files_of_at_most(200):
        made = store.fill(batch, loaded.model).features
        store.fill(batch, loaded.model)
    whole = FeatureStore(folder / "others", 1e6).fill(batch, loaded.model).features
    assert made is not None
    assert whole is not None
    assert torch.equal(made, whole)
    assert list((folder / "features").iterdir()) == []
    assert capsys.readouterr().out.count("cannot be written") == 1


def test_another_tower_has_other_features(loaded: Loaded) -> None:
    before = tower_digest(loaded.model)
    weight = loaded.model.model.vision_tower.encoder.layers[0].mlp.fc1.bias
    with torch.no_grad():
        weight[0] += 1
        assert tower_digest(loaded.model) != before
        weight[0] -= 1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_with_kept_features_learns_the_same_each_time(base: Path, data: Path, precision: str) -> None:
    for name in ("first", "second"):
        assert start(name, base, data, "feature_cache=0.01", f"precision={precision}") == 0
    assert 15 <= len(list(Path("runs/features").glob("*/*.npy"))) <= 16  # one of twenty examples is held out
    one, other = (load_file(f"runs/{name}/model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_in_which_the_vision_tower_learns_moves_it_as_far_as_it_is_read(base: Path, data: Path) -> None:
    assert start("mine", base, data, "vision_learning_rate=1e-3") == 0
    one, other = (load_file(path / "model.safetensors") for path in (base, Path("runs/mine")))
    layers = [name for name in one if ".encoder.layers." in name]
    moved = {re.findall(r"layers\.(\d)", name)[0] for name in layers if not torch.equal(one[name], other[name])}
    assert moved == {"0"}  # the projector reads the layer before the last


@pytest.mark.parametrize(("count", "wanted", "held"), [(1000, 16, 16), (100, 16, 5), (19, 16, 0), (100, 0, 0)])
def test_held_out_examples_are_few_and_never_learned_from(count: int, wanted: int, held: int) -> None:
    learned, kept = split(np.arange(count), wanted, seed=3)
    assert len(kept) == held
    assert sorted(learned + kept) == list(range(count))
    assert split(np.arange(count), wanted, seed=3) == (learned, kept)


def test_no_copy_of_a_held_out_record_is_learned_from(folder: Path) -> None:
    for name, count in (("a", 50), ("b", 30)):
        records = [record(f"{name}{n}", ["Hi?", "Hi."]) for n in range(count)]
        (folder / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / "mix.yaml").write_text("parts: [{data: a.json, weight: 2.5}, {data: b.json}]", encoding="utf-8")
    data = open_data(folder / "mix.yaml")
    parts = split(data.originals(), 16, seed=0)
    learned, kept = ([data.read(index)[0]["id"] for index in part] for part in parts)
    assert len(set(kept)) == len(kept) == 4
    assert not set(kept) & set(learned)
    assert len(set(kept) | set(learned)) == 80
    assert any(name.startswith("a") for name in kept)


def test_the_questions_asked_are_not_always_those_at_the_datas_begin() -> None:
    _, kept = split(np.arange(1000), 16, seed=3)
    assert kept[:3] != sorted(kept)[:3]
    assert split(np.arange(1000), 16, seed=4)[1] != kept


def test_held_out_examples_without_a_picture_are_asked_too(base: Path, folder: Path) -> None:
    records = [record(str(n), ["Say a colour.", COLOURS[n % len(COLOURS)]]) for n in range(60)]
    (folder / "text.json").write_text(json.dumps(records), encoding="utf-8")
    assert start("mine", base, folder / "text.json", "max_steps=1") == 0
    first = json.loads(Path("runs/mine/log.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert [answer["question"] for answer in first["answers"]] == ["Say a colour."] * 3
