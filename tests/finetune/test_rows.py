"""What a plan takes the data for, beside what training reads of it."""

import json
from pathlib import Path

import pytest
from PIL import Image

from finetune.__main__ import main
from finetune.collate import StepCollator
from finetune.data import Examples, check
from finetune.data.mixture import open_data
from finetune.flops import Row, sizes
from finetune.recipe import load_recipe
from finetune.rows import measured
from llava_app.checkpoints import find
from llava_app.errors import DataError
from llava_app.loading import processor_of
from llava_app.outlook import config_of
from llava_app.ui.training import PEAK
from tests.finetune.conftest import record

CARD = find("memeworld")  # its tokens are not bytes
SIZE = sizes(config_of(CARD))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two pictures, one and none; a dialogue that is longer than all others."""
    Image.new("RGB", (20, 30), "red").save(tmp_path / "red.png")
    records = [
        record("two", ["Which colours do these have?", "Both are red."], ["red.png", "red.png"]),
        record("one", ["What is it?", "A red picture."], ["red.png"]),
        record("none", ["Say a colour.", "Red.", "And another one?", "Blue, I should say."]),
        record("long", ["Tell me of it.", "It is a red picture. " * 30], ["red.png"]),
    ]
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@pytest.mark.parametrize("packing", [True, False])
def test_rows_are_those_that_training_reads(mixed: Path, packing: bool) -> None:
    recipe, processor = load_recipe("memeworld_instruct", ["micro_batch=4", f"packing={packing}"]), processor_of(CARD)
    rows = measured(open_data(mixed), SIZE, recipe, processor)
    examples = Examples(check(mixed, None, processor, recipe=recipe).examples, processor, max_length=512)
    encoded = [examples[place] for place in range(4)]
    (batch,) = StepCollator(processor.tokenizer.pad_token_id, processor.image_token_id, 4, packing)(encoded)
    assert rows.usual == Row(4, batch.input_ids.numel(), 4, batch.supervised)
    assert rows.tokens == batch.tokens / 4
    assert batch.supervised < 0.6 * batch.tokens
    assert rows.examples == 4


def test_at_worst_the_longest_come_together(mixed: Path) -> None:
    recipe, processor = load_recipe("memeworld_instruct", ["micro_batch=1"]), processor_of(CARD)
    rows = measured(open_data(mixed), SIZE, recipe, processor)
    encoded = Examples(check(mixed, None, processor, recipe=recipe).examples, processor, max_length=512)[3]
    assert rows.worst == Row(1, len(encoded.input_ids), 2, int(encoded.supervised.sum()))
    assert rows.usual.tokens < rows.worst.tokens


def test_without_a_tokenizer_pictures_and_template_count_all_the_same(mixed: Path) -> None:
    recipe = load_recipe("memeworld_instruct", ["micro_batch=1"])
    exact, rough = (measured(open_data(mixed), SIZE, recipe, tool) for tool in (processor_of(CARD), None))
    assert rough.tokens == pytest.approx(exact.tokens, rel=0.2)
    assert rough.worst.pictures == exact.worst.pictures == 2
    assert rough.usual.supervised == pytest.approx(exact.usual.supervised, rel=0.3)


def test_what_no_stage_can_learn_from_is_not_planned(tmp_path: Path) -> None:
    data = tmp_path / "text.json"
    data.write_text(json.dumps([record("text", ["Say a colour.", "Red."])]), encoding="utf-8")
    with pytest.raises(DataError, match="Stage align can learn from none"):
        measured(open_data(data), SIZE, load_recipe("memeworld_align"), None)


def test_whether_it_fits_follows_from_the_longest_examples(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", "llava15_7b_qlora_12gb", "micro_batch=4", "--device", "rtx4070"]
    assert main(plan) == 0
    allowed = capsys.readouterr().out
    assert "does not fit into the 12 GB of NVIDIA RTX 4070, though what is usual does" in allowed
    assert main([*plan, "--data", str(mixed)]) == 0
    told = capsys.readouterr().out
    assert "fits into the 12 GB" in told
    assert "4 of 4 records, by their letters" in told
    peaks = [float(found[1]) for found in map(PEAK.search, (allowed, told)) if found]
    assert peaks[1] < 12 < peaks[0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--examples", "665298"), "665,298 examples, 1 epochs: 119.8 hours on one, 15.0 hours on eight"),
        (
            ("--examples", "665298", "max_steps=10"),
            "665,298 examples, 1 epochs, at most 10 steps of 128: 14 minutes on one, 2 minutes on eight",
        ),
        (("max_steps=2",), "at most 2 steps of 128: 3 minutes on one, 21 seconds on eight"),
        (("--examples", "9", "epochs=2", "max_steps=99"), "at most 99 steps of 128: 12 seconds on one"),
    ],
)
def test_the_time_is_that_of_the_steps_that_will_be_taken(
    options: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "llava15_7b_instruct", "--device", "l40", *options]) == 0
    assert told in capsys.readouterr().out


def test_examples_longer_than_the_model_was_made_for_are_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "memeworld_instruct", "--base", "memeworld", "max_length=4096"]) == 2
    assert "max_length is 4096, and the model was made for 1024 tokens" in capsys.readouterr().err
