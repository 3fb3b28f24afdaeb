import hashlib
import json
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from filelock import FileLock
from torch.optim import SGD

from finetune import checkpoint, packing
from finetune.__main__ import main
from finetune.checkpoint import Run
from finetune.collate import Batch, StepCollator, pad
from finetune.data import Example, Examples, read_records
from finetune.held_out import UNREADABLE, answers
from finetune.optimise import learning_rate_at
from finetune.packing import use_packing
from finetune.recipe import load_recipe, recipe_from
from finetune.stages import PARTS, STAGES, apply_stage, part_of, trainable
from finetune.supervision import SupervisedLoss
from finetune.train import Course, take_step, train
from llava_app.checkpoints import LOCK_NAME, find, read_card
from llava_app.engine.decoder import LLAMA_KIN
from llava_app.errors import TrainingError
from llava_app.loading import Loaded, load

ROOT = Path(__file__).parent.parent.parent
FAST = ("precision=float32", "global_batch=8", "micro_batch=4")


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    """Its settings are global to a process, which in use trains once."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(stage: str, base: Path, data: Path, *more: str) -> list[str]:
    return [stage, "--base", str(base), "--data", str(data), "--name", "mine", "--allow-refused", "0.2", *FAST, *more]


def batches_of(loaded: Loaded, data: Path, *, micro: int, count: int = 8, packed: bool = True) -> list[Batch]:
    records = read_records(data)[:count]
    examples = tuple(Example(record, (data.parent / record["image"][0],), 0) for record in records)
    encoded = Examples(examples, loaded.processor, max_length=512)
    use_packing(loaded.model, 512)
    processor = loaded.processor
    collator = StepCollator(processor.tokenizer.pad_token_id, processor.image_token_id, micro, packed)
    return collator([encoded[n] for n in range(count)])


def course(
    loaded: Loaded, stage: str = "instruct", accelerator: Accelerator | None = None, **changes: object
) -> Course:
    accelerator = accelerator or Accelerator(cpu=True)
    recipe = recipe_from({**vars(load_recipe(f"memeworld_{stage}")), "precision": "float32", **changes})
    apply_stage(loaded.model, recipe)
    learning = [weight for weight in loaded.model.parameters() if weight.requires_grad]
    model, optimizer = accelerator.prepare(
        SupervisedLoss(loaded.model).train(), SGD([{"params": learning, "scale": 1.0}], lr=1.0)
    )
    run = Run("mine", "base", Path("records.json"), Path("pictures"), recipe)
    return Course(
        run, Path("mine"), accelerator, model, optimizer, Examples((), loaded.processor, max_length=512), [], [], 10
    )


def test_loss_is_the_models_own_at_the_supervised_tokens(base: Path, data: Path) -> None:
    loaded = load(read_card(base), "float32")
    (batch,) = batches_of(loaded, data, micro=8, packed=False)
    mine = SupervisedLoss(loaded.model)(batch) / batch.supervised
    theirs = loaded.model(input_ids=batch.input_ids, pixel_values=batch.pixel_values, labels=batch.labels).loss
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kin", [LLAMA_KIN, ()])
def test_packed_padded_and_single_examples_have_one_loss_and_one_gradient(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, *, kin: tuple[str, ...]
) -> None:
    monkeypatch.setattr(packing, "LLAMA_KIN", kin)
    results = []
    for micro, packed in ((8, True), (8, False), (1, False)):
        loaded = load(read_card(base), "float32")
        apply_stage(loaded.model, load_recipe("memeworld_instruct"))
        model = SupervisedLoss(loaded.model)
        loss = sum(model(batch) for batch in batches_of(loaded, data, micro=micro, packed=packed))
        loss.backward()
        results.append((loss.detach(), {name: weight.grad for name, weight in trainable(loaded.model).items()}))
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], atol=1e-5, rtol=1e-4)


def test_bfloat16_loses_little_in_a_packed_row(base: Path, data: Path) -> None:
    loaded = load(read_card(base), "float32")
    (batch,) = batches_of(loaded, data, micro=8)
    exact = SupervisedLoss(loaded.model)(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = SupervisedLoss(loaded.model)(batch)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=5e-3, atol=0.0)


def test_a_packed_example_does_not_see_the_one_before_it(base: Path, data: Path) -> None:
    loaded = load(read_card(base), "float32")
    (batch,) = batches_of(loaded, data, micro=2, count=2)
    assert batch.positions is not None
    assert batch.parts is not None
    begin, end = int(batch.parts[0]), int(batch.lengths[0])
    with torch.no_grad():
        embeds = loaded.model.get_input_embeddings()(batch.input_ids)
        changed = embeds.clone()
        changed[:, begin:end] = 1.0
        one, other = (
            loaded.model.model.language_model(
                inputs_embeds=some, position_ids=batch.positions, parts=batch.parts
            ).last_hidden_state
            for some in (embeds, changed)
        )
    assert begin > 100  # the system prompt in bytes
    assert torch.equal(one[:, end:], other[:, end:])
    assert not torch.equal(one[:, begin:end], other[:, begin:end])


def test_a_model_that_looks_back_on_fewer_tokens_is_not_packed(base: Path) -> None:
    model = load(read_card(base), "float32").model
    model.config.text_config.sliding_window = 100
    with pytest.raises(TrainingError, match="max_length=100"):
        use_packing(model, 512)


def test_examples_longer_than_the_model_was_made_for_are_refused_before_anything_else(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--base", str(base), "--data", "nowhere.json", "--name", "long", "--runs", str(tmp_path)]
    assert main(["instruct", *where, "max_length=513"]) == 2
    assert "max_length is 513, and the model was made for 512 tokens" in capsys.readouterr().err
    assert not (tmp_path / "long").exists()


FIELDS = "Set gradient_checkpointing=true, quantise=4bit lora_rank=64, micro_batch=16, or share"


def test_too_little_memory_names_fields_of_the_recipe(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llava_app.loading.free_bytes", lambda device: 1e3)
    where = ["--base", str(base), "--data", str(data), "--name", "poor", "--runs", str(tmp_path)]
    assert main(["instruct", *where]) == 2
    told = capsys.readouterr().err
    assert "for its weights in float16" in told
    assert FIELDS in told
    assert main(["align", *where]) == 2
    assert "Set gradient_checkpointing=true, micro_batch=32, or share" in capsys.readouterr().err


def test_micro_batches_of_any_size_make_the_same_step(base: Path, data: Path) -> None:
    results = []
    for micro in (8, 3, 1):
        loaded = load(read_card(base), "float32")
        batches = batches_of(loaded, data, micro=micro)
        supervised = sum(batch.supervised for batch in batches)
        loss, norm = take_step(course(loaded), batches, supervised=supervised, rate=0.1)
        results.append((loss, norm, loaded.model.state_dict()))
    for loss, norm, weights in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert norm == pytest.approx(results[0][1], rel=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, results[0][2][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parts_do_not_move_and_the_others_do(stage: str, base: Path, data: Path) -> None:
    loaded = load(read_card(base), "float32")
    before = {name: weight.clone() for name, weight in loaded.model.named_parameters()}
    (batch,) = batches_of(loaded, data, micro=8)
    take_step(course(loaded, stage), [batch], supervised=batch.supervised, rate=0.1)
    moved = {part_of(name) for name, weight in loaded.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == set(STAGES[stage].trains)
    assert set(PARTS) - moved


def test_a_text_only_step_gives_every_learning_weight_a_gradient(base: Path, data: Path) -> None:
    loaded = load(read_card(base), "float32")
    apply_stage(loaded.model, load_recipe("memeworld_instruct"))
    example = Example(read_records(data)[-1], (), 0)
    encoded = Examples((example,), loaded.processor, max_length=512)[0]
    SupervisedLoss(loaded.model)(pad([encoded], 0)).backward()
    assert all(weight.grad is not None for weight in loaded.model.parameters() if weight.requires_grad)


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(base: Path, data: Path) -> None:
    loaded = load(read_card(base), "float32")
    (batch,) = batches_of(loaded, data, micro=8)
    assert batch.pixel_values is not None
    before = loaded.model.lm_head.weight.clone()
    broken = replace(batch, pixel_values=batch.pixel_values * math.nan)
    with pytest.raises(TrainingError, match="the loss is nan"):
        take_step(course(loaded), [broken], supervised=batch.supervised, rate=0.1)
    assert torch.equal(loaded.model.lm_head.weight, before)


def test_gradients_are_clipped(base: Path, data: Path) -> None:
    loaded = load(read_card(base), "float32")
    before = {name: weight.detach().clone() for name, weight in loaded.model.named_parameters()}
    (batch,) = batches_of(loaded, data, micro=8)
    _, norm = take_step(course(loaded, gradient_clip=1e-3), [batch], supervised=batch.supervised, rate=1.0)
    after = loaded.model.named_parameters()
    squares = sum(float((weight.detach() - before[name]).square().sum()) for name, weight in after)
    assert norm > 1e-3
    assert math.sqrt(squares) == pytest.approx(1e-3, rel=0.02)


def test_learning_rate_warms_up_then_falls_towards_zero() -> None:
    recipe = load_recipe("memeworld_align", ["warmup_ratio=0.1", "learning_rate=1"])
    rates = [learning_rate_at(step, 100, recipe) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert rates[54] == pytest.approx(0.5, abs=0.02)


def test_both_stages_run_and_their_models_are_listed(base: Path, data: Path, folder: Path) -> None:
    assert main([*command("align", base, data, "epochs=2"), "--name", "first"]) == 0
    assert main([*command("instruct", folder / "runs" / "first", data, "epochs=2"), "--name", "second"]) == 0
    first, second = find("first"), find("second")
    assert (first.stage, first.template, first.trained) == ("align", "plain", ("projector",))
    captioner, tokenizer = load(first, "float32").model, load(first, "float32").processor.tokenizer
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    assert captioner.generation_config.eos_token_id == [tokenizer.eos_token_id, newline]
    assert load(second, "float32").model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert (second.stage, second.template, second.base) == ("instruct", "vicuna_v1", "first")
    assert second.trained == ("projector", "language_model")
    assert second.base_revision == hashlib.sha256((folder / "runs/first/card.json").read_bytes()).hexdigest()
    assert first.data["records"], first.data["refused"] == (
        16,
        {"no picture; stage align learns from pictures only": 4},
    )
    assert second.recipe == vars(load_recipe("memeworld_instruct", [*FAST, "epochs=2"]))
    assert load(second, "float32").processor.chat_template != load(first, "float32").processor.chat_template
    assert not list((folder / "runs").glob("*/state"))


def test_training_learns_and_logs_every_step(
    base: Path, data: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("instruct", base, data, "epochs=6")) == 0
    assert torch.cuda.is_available() or "MFU is not logged: the peak of a processor" in capsys.readouterr().out
    lines = [json.loads(line) for line in (folder / "runs/mine/log.jsonl").read_text(encoding="utf-8").splitlines()]
    log = [line for line in lines if "loss" in line]
    assert [line["step"] for line in log] == list(range(1, 19))
    assert log[-1]["loss"] < 0.85 * log[0]["loss"]
    assert all(line["grad_norm"] > 0 and line["tokens_per_second"] > 0 and line["memory"] > 0 for line in log)
    assert "mfu" not in log[0]  # in float32 no peak is known
    measured = [line for line in lines if "held_out_loss" in line]
    assert [line["step"] for line in measured] == [0, 18]
    assert measured[1]["held_out_loss"] < 0.9 * measured[0]["held_out_loss"]
    assert measured[0]["answers"][0].keys() == {"question", "answer", "wanted"}
    assert measured[0]["answers"][0]["question"] == measured[1]["answers"][0]["question"]


def test_a_step_limit_ends_a_run_early(base: Path, data: Path, folder: Path) -> None:
    assert main(command("instruct", base, data, "epochs=100", "max_steps=2")) == 0
    log = (folder / "runs/mine/log.jsonl").read_text(encoding="utf-8").splitlines()
    assert len([line for line in log if '"loss"' in line]) == 2


def test_bfloat16_and_gradient_checkpointing_train_too(base: Path, data: Path) -> None:
    more = ("max_steps=1", "precision=bfloat16", "gradient_checkpointing=true")
    assert main(command("instruct", base, data, *more)) == 0
    assert load(find("mine"), "float32").model.lm_head.weight.isfinite().all()


def test_a_held_out_picture_that_is_gone_is_said_to_be(base: Path, data: Path, folder: Path) -> None:
    loaded, first = load(read_card(base), "float32"), read_records(data)[0]
    examples = Examples((Example(first, (folder / "gone.png",), 0),), loaded.processor, max_length=512)
    assert [said.answer for said in answers(loaded.model, examples, [0])] == [UNREADABLE]


@pytest.mark.parametrize(
    ("tracker", "told"), [("excel", "no tracker 'excel'"), ("trackio", "trackio is not installed")]
)
def test_a_tracker_that_is_not_there_is_said(
    base: Path, data: Path, tracker: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if tracker == "trackio" and find_spec("trackio"):
        pytest.skip("trackio is installed")
    assert main(command("instruct", base, data, "--track", tracker)) == 2
    assert told in capsys.readouterr().err


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_the_numbers_when_asked(base: Path, data: Path, folder: Path) -> None:
    assert main(command("instruct", base, data, "--track", "tensorboard", "max_steps=2")) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "runs" / "tensorboard" / "mine")).Reload()
    lines = [json.loads(line) for line in (folder / "runs/mine/log.jsonl").read_text(encoding="utf-8").splitlines()]
    wanted = [line["loss"] for line in lines if "loss" in line]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(wanted)


def test_a_finished_run_is_not_repeated(base: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command("align", base, data, "max_steps=1")
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "another --name" in capsys.readouterr().err
    assert main(["align", "--name", "mine", "--resume", "epochs=2"]) == 2
    assert "keeps its own" in capsys.readouterr().err
    for kept in (["--images", "elsewhere"], ["--track", "tensorboard"]):
        assert main(["align", "--name", "mine", "--resume", *kept]) == 2
        assert "keeps its own base, data, pictures, recipe and tracker" in capsys.readouterr().err
    assert main(["align", "--name", "mine", "--resume"]) == 0
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["align", "--name", "x"], "--base and --data"),
        (["align", "--name", "x", "--resume"], "no run to resume"),
        (["align", "--name", "x", "--base", "nothing", "--data", "a.json"], "no model"),
        (
            ["align", "--name", "x", "--base", "memeworld-base", "--data", "d", "--recipe", "memeworld_instruct"],
            "stage instruct",
        ),
        (["align", "--name", "x", "--base", "b", "--data", "d", "epoch=1"], "epochs"),
        (["align", "--name", "../x", "--base", "b", "--data", "d"], "'../x'"),
        (["align", "--name", "x", "--resume", "epochs=2"], "no run to resume"),
        (["assemble", "nowhere", "nowhere", "out"], "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error


def test_data_that_changed_since_the_start_is_not_resumed_with(base: Path, data: Path, folder: Path) -> None:
    recipe = load_recipe("memeworld_instruct", [*FAST, "max_steps=1"])
    run = Run("mine", str(base), data, data.parent, recipe, checked={"sha256": "another"})
    (folder / "mine").mkdir()
    with pytest.raises(TrainingError, match="changed since"):
        train(run, folder / "mine", resume=True)


def test_two_processes_do_not_train_in_one_folder(
    base: Path, data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "LET_GO", 0.1)
    with FileLock(folder / "runs/mine" / LOCK_NAME):
        assert main(command("align", base, data)) == 2
    assert "mine is being trained by another process" in capsys.readouterr().err
    assert not (folder / "runs/mine/run.yaml").exists()


def test_who_waited_for_a_run_that_ended_meanwhile_leaves_it_alone(
    base: Path, data: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("align", base, data, "max_steps=1")) == 0
    assert LOCK_NAME not in find("mine").files
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(TrainingError, match="mine is finished"):
        train(checkpoint.load_run(folder / "runs/mine"), folder / "runs/mine", resume=True)


def test_a_gpu_whose_memory_is_full_is_one_sentence(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 3 of 4 GiB in use.")

    monkeypatch.setattr("finetune.train.take_step", full)
    assert main(command("instruct", base, data, "lora_rank=4")) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("CUDA out of memory. Tried to allocate 2.00 GiB. What was saved before is whole")
    assert "Set gradient_checkpointing=true, quantise=4bit, micro_batch=2, or share" in told


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("assemble", "align", "instruct", "evaluate", "memeworld"))
