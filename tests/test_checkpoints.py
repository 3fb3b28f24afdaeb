import hashlib
import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from llava_app import checkpoints
from llava_app.checkpoints import HUB_PRESETS, Card, built_in, catalogue, find, read_card, write_card
from llava_app.errors import ModelError


def finished_model(folder: Path, name: str = "A model") -> Card:
    """A folder that has the files of a model, though no weights in them, and its card."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    card = Card(
        name=name,
        source=str(folder),
        kind="run",
        stage="align",
        template="plain",
        image_mode="crop",
        trained=("projector",),
        base="built in",
        base_revision="abc",
        data={"count": 7},
        recipe={"learning_rate": 1e-3},
        scores={"memeworld": {"accuracy": 0.5}},
        about="Captions only. 日本",
    )
    write_card(folder, card)
    return card


def change(folder: Path, **values: object) -> None:
    path = folder / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values))


def test_a_card_comes_back_as_written_with_the_hashes_of_its_files(tmp_path: Path) -> None:
    written = finished_model(tmp_path / "run")
    read = read_card(tmp_path / "run")
    assert replace(read, files={}) == written
    assert read.files == {
        "config.json": hashlib.sha256(b"{}").hexdigest(),
        "model.safetensors": hashlib.sha256(b"weights").hexdigest(),
    }


def test_training_state_and_the_card_itself_are_no_files_of_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "optimizer.bin").write_bytes(b"x")
    (folder / "card.json.tmp").write_text("left by a crash")
    (folder / "parts").mkdir()
    (folder / "parts" / "one.safetensors").write_bytes(b"y")
    write_card(folder, Card("m", str(folder), "run", "base", "plain", "pad"))
    write_card(folder, Card("m", str(folder), "run", "base", "plain", "pad"))
    assert list(read_card(folder).files) == ["parts/one.safetensors"]
    assert not (folder / "card.json.tmp").exists()


def test_a_crash_before_the_rename_leaves_the_folder_unlisted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        finished_model(tmp_path / "run", "Half")
    assert "Half" not in [card.name for card in catalogue(tmp_path)]


def test_kind_and_source_follow_from_where_the_card_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished_model(tmp_path / "demo" / "memeworld")
    shutil.copytree(tmp_path / "demo" / "memeworld", tmp_path / "runs" / "copy")
    monkeypatch.setattr(checkpoints, "DEMO", tmp_path / "demo")
    assert built_in().kind == "built-in"
    copy = read_card(tmp_path / "runs" / "copy")
    assert (copy.kind, copy.source) == ("run", str(tmp_path / "runs" / "copy"))


def test_the_catalogue_has_built_in_models_then_runs_newest_first_then_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "DEMO", tmp_path / "demo")
    finished_model(tmp_path / "demo" / "memeworld", "Built in")
    for name, finished_at in (("old", 1000), ("new", 3000), ("middle", 2000)):
        finished_model(tmp_path / "runs" / name, name)
        os.utime(tmp_path / "runs" / name / "card.json", (finished_at, finished_at))
    (tmp_path / "runs" / "unfinished").mkdir()
    names = [card.name for card in catalogue(tmp_path / "runs")]
    assert names[:6] == ["Built in", "new", "middle", "old", "LLaVA-OneVision-0.5B", "LLaVA-Interleave-0.5B"]
    assert len(names) == 4 + len(HUB_PRESETS)


def test_the_catalogue_needs_no_runs_folder(tmp_path: Path) -> None:
    assert [card.kind for card in catalogue(tmp_path / "absent")][-2:] == ["hub", "hub"]


def test_a_broken_card_is_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    finished_model(tmp_path / "good", "Good")
    finished_model(tmp_path / "bad")
    (tmp_path / "bad" / "card.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        cards = catalogue(tmp_path)
    assert [card.name for card in cards if card.kind == "run"] == ["Good"]
    assert "bad" in caplog.text


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    finished_model(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks model\.safetensors"):
        read_card(tmp_path / "run")


def test_a_folder_without_a_card_is_not_a_finished_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no finished model"):
        read_card(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("stage", "pretrain"), ("image_mode", "stretch"), ("name", 7), ("trained", "projector"), ("files", ["a"])],
)
def test_a_wrong_field_of_a_card_is_named(tmp_path: Path, field: str, value: object) -> None:
    finished_model(tmp_path / "run")
    change(tmp_path / "run", **{field: value})
    with pytest.raises(ModelError, match=field):
        read_card(tmp_path / "run")


@pytest.mark.parametrize("text", ["[]", '{"format": 2}', "not json", "\xff", '{"format": 1}'])
def test_a_file_that_is_no_card_is_a_model_error(tmp_path: Path, text: str) -> None:
    finished_model(tmp_path / "run")
    (tmp_path / "run" / "card.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=r"card\.json"):
        read_card(tmp_path / "run")


@pytest.mark.parametrize("how", ["name", "folder name", "path"])
def test_a_run_is_found_by_its_name_and_its_folder(tmp_path: Path, how: str) -> None:
    finished_model(tmp_path / "run-7", "Seventh")
    asked = {"name": "Seventh", "folder name": "run-7", "path": str(tmp_path / "run-7")}[how]
    assert find(asked, tmp_path).source == str(tmp_path / "run-7")


def test_a_folder_outside_the_runs_is_found_by_its_path(tmp_path: Path) -> None:
    finished_model(tmp_path / "elsewhere" / "model")
    assert find(str(tmp_path / "elsewhere" / "model"), tmp_path / "runs").name == "A model"


def test_hub_models_are_found_by_their_id() -> None:
    card = find("llava-hf/llava-1.5-7b-hf")
    assert (card.name, card.template, card.image_mode) == ("LLaVA-1.5-7B", "vicuna_v1", "pad")


def test_any_other_hub_id_is_taken_as_its_own_files_say() -> None:
    card = find("somebody/llava-of-mine")
    assert (card.kind, card.source, card.template) == ("hub", "somebody/llava-of-mine", "own")


def test_a_folder_without_a_card_is_taken_as_its_own_files_say_unless_it_is_a_run_that_is_not_finished(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    found = find(str(tmp_path))
    assert (found.source, found.kind, found.template, found.image_mode) == (str(tmp_path), "run", "own", "own")
    (tmp_path / "run.yaml").touch()
    with pytest.raises(ModelError, match="no finished model"):
        find(str(tmp_path))


def test_a_path_with_a_mistake_in_it_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ModelError, match="There is no model “runs/absent”"):
        find("runs/absent")


def test_an_unknown_model_is_an_error_that_lists_the_known_ones(tmp_path: Path) -> None:
    finished_model(tmp_path / "run", "Mine")
    with pytest.raises(ModelError, match=r"no model “yours”.*Mine.*LLaVA-1\.5-7B"):
        find("yours", tmp_path)


@pytest.mark.skipif(not (checkpoints.DEMO / "memeworld").exists(), reason="the built-in model is not trained yet")
def test_the_shipped_models_have_cards_and_intact_files() -> None:
    cards = [card for card in catalogue() if card.kind == "built-in"]
    assert {Path(card.source).name for card in cards} == {"memeworld", "memeworld-base"}
    for card in cards:
        for name, digest in card.files.items():
            assert hashlib.sha256((Path(card.source) / name).read_bytes()).hexdigest() == digest, name
