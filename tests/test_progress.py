import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_app.progress import POINTS, last_lines, read_progress, smooth, thin

LOSSES = st.lists(st.floats(0, 1e4), min_size=1, max_size=60)


@given(LOSSES)
def test_smoothing_begins_with_the_first_value_and_stays_within_what_was_seen(losses: list[float]) -> None:
    smoothed = smooth(losses)
    assert smoothed[0] == pytest.approx(losses[0])
    for count, value in enumerate(smoothed, 1):
        assert min(losses[:count]) - 1e-6 <= value <= max(losses[:count]) + 1e-6


@given(st.integers(0, 5_000))
def test_a_thinned_curve_keeps_its_order_and_its_end(count: int) -> None:
    points = list(range(count))
    thinned = thin(points)
    assert thinned == sorted(thinned)
    assert thinned[-1:] == points[-1:]
    assert min(count, POINTS // 2) <= len(thinned) <= POINTS


def write(run: Path, *lines: dict[str, object], rest: str = "") -> None:
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)


def test_the_time_left_goes_by_the_steps_and_survives_a_resume(tmp_path: Path) -> None:
    steps = [{"step": step, "loss": 1.0, "elapsed": elapsed} for step, elapsed in enumerate((2, 4, 6, 3, 5), 1)]
    write(tmp_path, {"step": 0, "held_out_loss": 2.0, "answers": []}, *steps, rest='{"step": 6, "lo')
    (tmp_path / "log.txt").write_text(
        "instruct: 1%| | 1/100 [00:02<03:20, 2.00s/step]\rinstruct: 5/25 [00:05, 2.0s/step]"
    )
    progress = read_progress(tmp_path, tmp_path / "log.txt")
    assert (progress.step, progress.total) == (5, 25)
    assert progress.seconds_left == 40.0
    assert len(progress.evaluations) == 1


def test_before_it_runs_there_is_no_progress(tmp_path: Path) -> None:
    progress = read_progress(tmp_path, tmp_path / "log.txt")
    assert (progress.step, progress.total, progress.seconds_left) == (0, None, None)
    assert last_lines(tmp_path / "log.txt") == ""


def test_the_end_of_a_log_is_as_a_terminal_shows_it(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("".join(f"line {n}\n" for n in range(5000)) + "1/3\r2/3\r3/3\nin /srv/a/b.png\n")
    assert last_lines(tmp_path / "log.txt").splitlines()[-3:] == ["line 4999", "3/3", "in b.png"]
