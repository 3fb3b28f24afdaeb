import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.optim import AdamW

from finetune.checkpoint import (
    Run,
    alone,
    cut_log,
    load_run,
    load_state,
    refuse_taken,
    restore,
    save_model,
    save_state,
    stored_dtype,
)
from finetune.output import Output
from finetune.recipe import load_recipe
from llava_app.checkpoints import read_card
from llava_app.errors import TrainingError
from llava_app.loading import Loaded, load


@pytest.fixture(scope="module")
def loaded(base: Path) -> Loaded:
    return load(read_card(base), "float32")


def small_net() -> tuple[dict[str, nn.Parameter], AdamW]:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    return dict(net.named_parameters()), AdamW(net.parameters(), lr=0.1)


def move(learning: dict[str, nn.Parameter], optimizer: AdamW) -> None:
    sum((torch.rand(()) * weight**2).sum() for weight in learning.values()).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_run_is_read_back_as_it_was_saved(tmp_path: Path) -> None:
    recipe = load_recipe("memeworld_align", ["max_steps=5"])
    run = Run("mine", "base", Path("a.json"), Path("pictures"), recipe, 0.5, {"records": 3})
    run.save(tmp_path)
    assert load_run(tmp_path) == run
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


def test_resuming_what_never_started_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no run to resume.*without --resume"):
        load_run(tmp_path / "never")


@pytest.mark.parametrize("text", ["", "name: [", "name: mine"])
def test_damaged_settings_of_a_run_are_named(tmp_path: Path, text: str) -> None:
    Run("mine", "base", Path("a.json"), Path("pictures"), load_recipe("memeworld_align")).save(tmp_path)
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(TrainingError, match=r"run\.yaml is damaged.*another --name"):
        load_run(tmp_path)


@pytest.mark.parametrize(("file", "advice"), [("run.yaml", "--resume"), ("card.json", "another --name")])
def test_a_run_is_never_overwritten(tmp_path: Path, file: str, advice: str) -> None:
    refuse_taken(tmp_path)
    (tmp_path / file).touch()
    with pytest.raises(TrainingError, match=advice):
        refuse_taken(tmp_path)


def test_a_restored_state_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    accelerator, (learning, optimizer) = Accelerator(), small_net()
    move(learning, optimizer)
    save_state(tmp_path, 1, learning=learning, optimizer=optimizer, accelerator=accelerator)
    move(learning, optimizer)

    others, other_optimizer = small_net()
    torch.manual_seed(99)
    assert restore(tmp_path, learning=others, optimizer=other_optimizer, accelerator=accelerator) == 1
    move(others, other_optimizer)
    assert all(torch.equal(others[name], weight) for name, weight in learning.items())


def test_the_newest_two_states_are_kept(tmp_path: Path) -> None:
    learning, optimizer = small_net()
    for step in (8, 9, 10, 11):
        save_state(tmp_path, step, learning=learning, optimizer=optimizer, accelerator=Accelerator())
    assert {path.name for path in (tmp_path / "state").iterdir()} == {"step-10", "step-11"}
    assert restore(tmp_path, learning=learning, optimizer=optimizer, accelerator=Accelerator()) == 11


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.pt", "random-0.pt"])
@pytest.mark.parametrize("left", [b"", bytes(100)], ids=["empty", "zeros"])
def test_a_damaged_state_is_named_and_the_one_before_it_taken(
    tmp_path: Path, file: str, left: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    accelerator, (learning, optimizer) = Accelerator(), small_net()
    for step in (1, 2):
        move(learning, optimizer)
        save_state(tmp_path, step, learning=learning, optimizer=optimizer, accelerator=accelerator)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n', encoding="utf-8")
    (tmp_path / "state" / "step-2" / file).write_bytes(left)
    others, other_optimizer = small_net()
    assert restore(tmp_path, learning=others, optimizer=other_optimizer, accelerator=accelerator) == 1
    assert f"step-2/{file} is damaged" in capsys.readouterr().out
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8") == '{"step": 1}\n'

    move(others, other_optimizer)
    assert all(torch.equal(others[name], weight) for name, weight in learning.items())
    save_state(tmp_path, 2, learning=others, optimizer=other_optimizer, accelerator=accelerator)
    assert restore(tmp_path, learning=others, optimizer=other_optimizer, accelerator=accelerator) == 2


def test_where_no_state_is_whole_nothing_goes_on(tmp_path: Path) -> None:
    learning, optimizer = small_net()
    for step in (1, 2):
        save_state(tmp_path, step, learning=learning, optimizer=optimizer, accelerator=Accelerator())
        (tmp_path / "state" / f"step-{step}" / "optimizer.pt").unlink()
    move(learning, optimizer)
    before = {name: weight.clone() for name, weight in learning.items()}
    with pytest.raises(TrainingError, match=r"No saved state.*step-2/optimizer.*step-1/optimizer.*Delete .*state, and"):
        restore(tmp_path, learning=learning, optimizer=optimizer, accelerator=Accelerator())
    assert all(torch.equal(learning[name], weight) for name, weight in before.items())


def test_a_state_and_its_log_are_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    lacking: list[str] = []
    rename = Path.replace

    def noted(written: Path, place: Path) -> Path:
        wanted = [tmp_path / "log.jsonl", written, *written.rglob("*")]
        lacking.extend(path.name for path in wanted if path.stat().st_ino not in synced)
        return rename(written, place)

    (tmp_path / "log.jsonl").touch()
    learning, optimizer = small_net()
    monkeypatch.setattr("os.fsync", lambda file: synced.add(os.fstat(file).st_ino))
    monkeypatch.setattr(Path, "replace", noted)
    save_state(tmp_path, 1, learning=learning, optimizer=optimizer, accelerator=Accelerator())
    assert lacking == []
    assert (tmp_path / "state").stat().st_ino in synced


def test_a_half_written_state_is_never_resumed_from(tmp_path: Path) -> None:
    (tmp_path / "state" / "partial").mkdir(parents=True)
    (tmp_path / "state" / "partial" / "weights.safetensors").write_bytes(b"half")
    learning, optimizer = small_net()
    assert restore(tmp_path, learning=learning, optimizer=optimizer, accelerator=Accelerator()) == 0
    save_state(tmp_path, 1, learning=learning, optimizer=optimizer, accelerator=Accelerator())
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-1"]


def test_a_state_of_other_weights_is_refused(tmp_path: Path) -> None:
    learning, optimizer = small_net()
    save_state(tmp_path, 1, learning=learning, optimizer=optimizer, accelerator=Accelerator())
    with pytest.raises(TrainingError, match="other weights"):
        load_state(tmp_path / "state" / "step-1", learning={}, optimizer=optimizer, accelerator=Accelerator())


def test_saving_keeps_the_model_as_it_is_and_stores_what_it_was_given(
    tmp_path: Path, loaded: Loaded, base: Path
) -> None:
    before = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    save_model(tmp_path, loaded.model, loaded.model.state_dict(), processor=loaded.processor, dtype=torch.float16)
    stored, first = load_file(tmp_path / "model.safetensors"), load_file(base / "model.safetensors")
    assert stored.keys() == first.keys()
    assert all(torch.equal(stored[name], first[name]) for name in first)
    after = loaded.model.state_dict()
    assert all(
        after[name].dtype == weight.dtype and torch.equal(after[name], weight) for name, weight in before.items()
    )
    assert {"chat_template.jinja", "generation_config.json", "processor_config.json", "tokenizer.json"} <= {
        path.name for path in tmp_path.iterdir()
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_checkpoint_says_in_which_precision_it_is_stored(tmp_path: Path, loaded: Loaded, dtype: torch.dtype) -> None:
    save_model(tmp_path, loaded.model, loaded.model.state_dict(), processor=loaded.processor, dtype=dtype)
    assert stored_dtype(tmp_path) == dtype


def test_a_model_that_cannot_be_saved_is_found_out_before_training(tmp_path: Path, base: Path) -> None:
    fresh = load(read_card(base), "float32")
    fresh.model.generation_config.temperature = 0.5
    fresh.model.generation_config.do_sample = False
    run = Run("mine", str(base), Path("a.json"), Path("pictures"), load_recipe("memeworld_align"))
    output = Output(run, tmp_path, fresh.card, base, fresh.processor)
    with pytest.raises(TrainingError, match="cannot be saved"):
        output.try_saving(fresh.model)
    assert not (tmp_path / "state" / "trial").exists()


def test_the_log_is_cut_to_the_steps_that_stay(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step}) for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"ste']), encoding="utf-8")
    cut_log(tmp_path, 2)
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines() == lines[:2]


def test_a_folder_that_is_deleted_while_it_trains_is_no_further_error(tmp_path: Path) -> None:
    with alone(tmp_path / "mine", resume=False):
        shutil.rmtree(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
