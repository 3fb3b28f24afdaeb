"""A run exported is one standard model that answers as before, with a card for people."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from finetune import export as exporting
from finetune.__main__ import main
from finetune.assemble import assemble
from finetune.export import HUB_LICENCES, _compare, export, origin
from llava_app.checkpoints import Card, built_in, read_card, revision
from llava_app.errors import TrainingError
from llava_app.loading import load
from llava_app.presets import PRESETS

FAST = ("precision=float32", "global_batch=8", "micro_batch=4", "max_steps=3", "learning_rate=1e-2")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands run in."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(base: Path, data: Path, *more: str) -> Path:
    assert main(["instruct", "--base", str(base), "--data", str(data), "--name", "mine", *FAST, *more]) == 0
    return Path("runs/mine")


def test_an_exported_lora_run_is_a_plain_model_that_answers_the_same(base: Path, data: Path, folder: Path) -> None:
    run = train(base, data, "lora_rank=4")
    assert main(["export", str(run), "out"]) == 0
    assert not list(Path("out").glob("adapter*"))
    plain = LlavaForConditionalGeneration.from_pretrained("out", dtype=torch.float32)
    ids = torch.arange(40)[None] + 3
    with torch.no_grad():
        merged, adapted = plain(input_ids=ids).logits, load(read_card(run), "float32").model(input_ids=ids).logits
    torch.testing.assert_close(merged, adapted, atol=2e-2, rtol=1e-2)
    assert {value.dtype for value in load_file("out/model.safetensors").values()} == {torch.float16}
    assert load(read_card(Path("out")), "float32").model.generation_config.eos_token_id == [1]


def test_a_run_that_sees_tiles_is_exported_too(tower: Path, language: Path, data: Path, folder: Path) -> None:
    assemble(tower, language, folder / "tiled", image_mode="anyres")
    run = train(folder / "tiled", data, "image_mode=anyres", "max_steps=1")
    assert main(["export", str(run), "out"]) == 0
    assert read_card(Path("out")).image_mode == "anyres"


def test_the_model_card_says_where_it_comes_from_and_what_was_measured(base: Path, data: Path) -> None:
    export(train(base, data), Path("out"))
    text = Path("out/README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---")[1])["pipeline_tag"] == "image-text-to-text"
    assert "license" not in yaml.safe_load(text.split("---")[1])
    assert "Base: base (revision " in text
    assert "20 records of records.json" in text
    assert "- learning_rate: 0.01" in text
    curve = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| ") and "step" not in line]
    assert [int(step) for step, _, _ in curve] == [0, 1, 2, 3]
    assert float(curve[0][2]) > float(curve[3][2])
    assert "Not measured yet" in text
    assert "README.md" in read_card(Path("out")).files
    found = {"pope": {"score": 85.94, "count": 9000}, "vibes": {"score": None, "count": 0}}
    Path("runs/mine/scores.json").write_text(json.dumps(found), encoding="utf-8")
    export(Path("runs/mine"), Path("measured"))
    text = Path("measured/README.md").read_text(encoding="utf-8")
    assert "- pope: 85.9 % of 9,000 questions, before export" in text
    assert "vibes" not in text


def test_the_front_matter_names_base_and_licence_where_they_are_known() -> None:
    card = Card("mine", "runs/mine", "run", "instruct", "vicuna_v1", "pad")
    commit, shipped = "0123456789" * 4, revision(Path(built_in().source))
    known = {
        ("LLaVA-1.5-7B", commit): ["base_model: llava-hf/llava-1.5-7b-hf", "license: llama2"],
        ("somebody/llava", commit): ["base_model: somebody/llava"],
        ("memeworld", shipped): ["license: apache-2.0"],
        ("LLaVA-1.5-7B", "ab" * 32): [],  # a run of that name
        ("base", "base"): [],
    }
    assert {base: origin(replace(card, base=base[0], base_revision=base[1])) for base in known} == known
    assert {preset.licence for preset in PRESETS} <= HUB_LICENCES.keys()


def test_too_little_memory_for_a_merge_says_what_an_export_can_do(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llava_app.loading.free_bytes", lambda device: 1e3)
    assert main(["export", str(base), str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "for its weights in float32" in told
    assert told.endswith("or export on a machine with more.\n")


def test_a_merge_that_changes_the_answers_is_refused() -> None:
    assert _compare([[1], [2], [3], [4]], [[1], [2], [3], [5]]) == 0.75
    with pytest.raises(TrainingError, match="Only 25%"):
        _compare([[1], [2], [3], [4]], [[1], [3], [4], [5]])


def test_pushing_gives_the_hub_the_folder_and_keeps_it_private(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, object]]] = []

    class Hub:
        def create_repo(self, repository: str, **settings: object) -> None:
            calls.append((repository, settings))

        def upload_folder(self, **settings: object) -> None:
            calls.append((str(settings["repo_id"]), {"folder": settings["folder_path"]}))

    monkeypatch.setattr(exporting, "HfApi", Hub)
    assert exporting.push(Path("out"), "me/mine") == "https://huggingface.co/me/mine"
    assert calls == [("me/mine", {"private": True, "exist_ok": True}), ("me/mine", {"folder": Path("out")})]


def test_a_taken_folder_and_an_unfinished_run_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "full").mkdir()
    (folder / "full/file").touch()
    assert main(["export", "full", "full"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["export", "full", "out"]) == 2
    assert "no finished model" in capsys.readouterr().err
