"""Intervals, the paired test, the comparison of models, and the pages that show them."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.__main__ import main
from finetune.evaluate import intervals
from finetune.evaluate.report import headline, markdown, page
from finetune.evaluate.results import Question, Result, Scores, Suite, each, scores, write_results, write_scores

HITS = st.lists(st.sampled_from([(0.0, 1.0), (1.0, 1.0)]), min_size=1, max_size=30)


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "DRAWS", 2000)


@settings(max_examples=30)
@given(HITS)
def test_an_interval_holds_the_score_and_stays_within_the_scale(pairs: list[tuple[float, float]]) -> None:
    found = intervals.interval(pairs, seed=0)
    assert found
    assert 0 <= found[0] <= intervals.ratio(pairs) <= found[1] <= 100  # type: ignore[operator]


def test_an_interval_is_that_of_theory() -> None:
    low, high = intervals.interval([(1.0, 1.0)] * 300 + [(0.0, 1.0)] * 100, seed=0) or (0, 0)
    error = 1.96 * (0.75 * 0.25 / 400) ** 0.5 * 100
    assert low == pytest.approx(75 - error, abs=0.6)
    assert high == pytest.approx(75 + error, abs=0.6)


def test_the_same_seed_draws_the_same() -> None:
    pairs = [(number**0.5, 7.0) for number in range(40)]
    assert intervals.interval(pairs, seed=3) == intervals.interval(pairs, seed=3)
    assert intervals.interval(pairs, seed=3) != intervals.interval(pairs, seed=4)


def test_what_could_not_be_had_has_no_interval() -> None:
    assert intervals.interval([(0.0, 0.0)], seed=0) is None
    assert intervals.ratio([]) is None


def test_the_paired_test_tells_a_difference_from_none() -> None:
    better, worse = [(1.0, 1.0)] * 40, [(0.0, 1.0)] * 20 + [(1.0, 1.0)] * 20
    assert intervals.paired_p(better, worse, seed=0) < 0.01
    assert intervals.paired_p(better, better, seed=0) == 1
    mixed = [(float(number % 2), 1.0) for number in range(40)]
    assert intervals.paired_p(mixed, mixed[1:] + mixed[:1], seed=0) > 0.5


def test_the_paired_test_is_exact_for_few_questions() -> None:
    """All of six questions differ one way: 2 of the 64 exchanges are as extreme."""
    p = intervals.paired_p([(1.0, 1.0)] * 6, [(0.0, 1.0)] * 6, seed=0)
    assert p == pytest.approx(2 / 64, abs=0.015)


def test_holm_adjusts_for_several_comparisons() -> None:
    assert intervals.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert intervals.holm([0.9, 0.8]) == [1.0, 1.0]
    assert intervals.holm([]) == []


def evaluated(folder: Path, points: list[float | None], *, judge: str | None = None) -> list[Result]:
    results = [
        Result(Question(str(n), f"kind {n % 3}", f"Q{n}?"), f"A{n} <b>", value, why="gone" * (value is None))
        for n, value in enumerate(points)
    ]
    tables = {"Judge": {"model": judge}} if judge else {}
    suite = Suite("toy", "right", [], each(lambda *_: True), tables=lambda _: tables)
    folder.mkdir(parents=True)
    write_results(folder, results)
    write_scores(folder / "scores.json", scores(suite, results, model=folder.parent.name, seed=0))
    return results


def test_models_are_compared_on_the_questions_that_all_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluated(tmp_path / "evaluations" / "good" / "toy", [1.0] * 30 + [None])
    evaluated(tmp_path / "evaluations" / "bad" / "toy", [0.0] * 20 + [1.0] * 11)
    evaluated(tmp_path / "evaluations" / "twin" / "toy", [1.0] * 31)
    assert main(["compare", "good", "bad", "twin", "--json", "--html", "c.html"]) == 0
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    good, bad, twin = found["rows"]
    assert (found["count"], found["left_out"]) == (30, 1)
    assert (good["score"], good["difference"], good["p"]) == (100, None, None)
    assert bad["difference"] == pytest.approx(-200 / 3)
    assert bad["difference_interval"][1] < -40
    assert bad["p"] < 0.01
    assert (twin["difference"], twin["p"]) == (0, 1)
    text = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 2
    assert "http" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")


def test_scores_of_different_judges_do_not_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluated(tmp_path / "evaluations" / "a" / "toy", [1.0], judge="one")
    evaluated(tmp_path / "evaluations" / "b" / "toy", [1.0], judge="another")
    assert main(["compare", "a", "b"]) == 2
    assert "judged in different ways" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "words"), [(["a", "a"], "named twice"), (["a", "b"], "share no evaluated suite"), (["c"], "no model")]
)
def test_what_cannot_be_compared_is_said(
    names: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluated(tmp_path / "evaluations" / "a" / "toy", [1.0])
    other = tmp_path / "evaluations" / "b" / "other"
    evaluated(other, [1.0])
    (other / "scores.json").write_text((other / "scores.json").read_text().replace('"toy"', '"other"'))
    assert main(["compare", *names]) == 2
    assert words in capsys.readouterr().err


def found_scores(results: list[Result]) -> Scores:
    suite = Suite(
        "llava-bench-wild", "right", [], each(lambda *_: True), tables=lambda _: {"T|": {"a": None, "b": 1.25}}
    )
    return scores(suite, results, model="<model>", seed=0)


def test_a_report_shows_everything_and_escapes_it(tmp_path: Path) -> None:
    results = evaluated(tmp_path / "x", [1.0, 0.0, None, 1.0, 1.0, 0.0])
    found = found_scores(results)
    html, text = page(found, results), markdown(found, results)
    assert "A1 <b>" not in html
    assert "A1 &lt;b&gt;" in html
    assert "&lt;model&gt;" in html
    assert html.count("<svg") == 2  # the radar and the bars beside published models
    assert "LLaVA-1.5-7B" in html
    assert "1 missing: gone" in html
    assert "A2 <b>" in text
    assert "1 missing: gone" in headline(found)
    assert "60.0 % right" in headline(found)


def test_a_category_without_marks_has_no_score_and_no_spoke(tmp_path: Path) -> None:
    results = evaluated(tmp_path / "x", [1.0, 0.0, None])
    found = found_scores(results)
    assert found.by_category == {"kind 0": 100, "kind 1": 0, "kind 2": None}
    assert "kind 2</text>" not in page(found, results)
    assert "| kind 2 | – |" in markdown(found, results)


def test_without_marks_a_report_says_that_there_is_no_score(tmp_path: Path) -> None:
    results = evaluated(tmp_path / "x", [None, None])
    found = found_scores(results)
    assert "no score" in headline(found)
    assert "<svg" not in page(found, results)


def test_scores_of_other_suites_stay(tmp_path: Path) -> None:
    results = evaluated(tmp_path / "x", [1.0])
    write_scores(tmp_path / "x" / "scores.json", found_scores(results))
    assert set(json.loads((tmp_path / "x" / "scores.json").read_text(encoding="utf-8"))) == {"toy", "llava-bench-wild"}
