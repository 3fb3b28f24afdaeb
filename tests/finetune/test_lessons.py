"""The further lessons of the built-in world, from drawing to the measured model, a few steps of each."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from finetune.__main__ import main
from finetune.evaluate.results import read_lines
from finetune.memeworld import cli
from llava_app.checkpoints import read_card

LESSONS = {
    "anyres": {"tiles": ["-small-print"], "squeezed": ["-small-print"]},
    "several": {"several": ["-pairs", "-clips", ""]},
}


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_leaves_models_and_their_measurements(
    lesson: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_finetune", _in_this_process)
    cli.main([lesson, "--smoke"])
    for name, asked in LESSONS[lesson].items():
        card = read_card(Path("runs") / f"memeworld-smoke-{name}")
        assert (card.stage, card.image_mode) == ("instruct", "anyres" if name == "tiles" else "pad")
        for asking in asked:
            folder = Path("evaluations") / card.name / f"memeworld-heldout{asking}"
            assert len(read_lines(folder / "results.jsonl")) == 4


def _in_this_process(*arguments: str | Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(list(map(str, arguments))) == 0
