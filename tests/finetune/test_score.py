"""Scores of answers and reviews made elsewhere: python -m finetune score."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.__main__ import main
from finetune.evaluate.results import read_lines
from finetune.evaluate.reviews import Pair, pair_of, read_scores, relative_score, tally
from finetune.evaluate.scienceqa import Problem, prompt, read_choice, table

DATA = Path(os.environ.get("LLAVA_DATA", Path(__file__).parents[3] / "shared" / "data"))
scienceqa_data = pytest.mark.skipif(not (DATA / "scienceqa").is_dir(), reason=f"no ScienceQA data in {DATA}")


def problem(**changes: object) -> Problem:
    values: dict[str, object] = {
        "identifier": "1",
        "question": "Which is hot?",
        "choices": ("ice", "fire", "snow"),
        "answer": 1,
        "hint": "",
        "image": None,
        "subject": "natural science",
        "grade": 3,
        "split": "test",
    }
    return Problem(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B", 1),
        (" B\n", 1),
        ("C. snow", 2),
        ("LECTURE: heat. The answer is B.", 1),
        ("The answer is A. No: The answer is B.", None),
        ("The answer is D.", None),
        ("D", None),
        ("The answer is Apple.", None),
        ("b", None),
        ("B.", None),
        ("BC", None),
        ("", None),
        ("fire", None),
        ("Because. The answer is B", None),
    ],
)
def test_an_answer_is_read_as_the_paper_reads_it(text: str, choice: int | None) -> None:
    assert read_choice(text, 3) == choice


@given(st.text(), st.integers(2, 5))
def test_whatever_is_read_is_one_of_the_choices(text: str, choices: int) -> None:
    assert read_choice(text, choices) in {None, *range(choices)}


@scienceqa_data
def test_every_published_choice_is_read_from_the_published_outputs(tmp_path: Path) -> None:
    folder, out = DATA / "scienceqa", tmp_path / "choices.jsonl"
    files = ["--problems", str(folder / "problems.json"), "--answers", str(folder / "predictions.jsonl")]
    assert main(["score", "scienceqa", *files, "--choices-out", str(out)]) == 0
    published, read = read_lines(folder / "predictions.jsonl"), read_lines(out)
    assert len(read) == 4241
    assert {row["question_id"]: row["choice"] for row in read} == {
        row["question_id"]: row["published_choice"] for row in published
    }


@scienceqa_data
def test_the_columns_of_the_real_problems(capsys: pytest.CaptureFixture[str]) -> None:
    folder = DATA / "scienceqa"
    files = ["--problems", str(folder / "problems.json"), "--answers", str(folder / "predictions.jsonl")]
    main(["score", "scienceqa", *files, "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    published = {row["question_id"]: row["published_choice"] for row in read_lines(folder / "predictions.jsonl")}
    problems = json.loads((folder / "problems.json").read_text(encoding="utf-8"))
    with_image = [published[name] == values["answer"] for name, values in problems.items() if values["image"]]
    assert found["count"] == len(problems)
    assert found["correct"] == sum(published[name] == values["answer"] for name, values in problems.items())
    assert found["columns"]["IMG"] == pytest.approx(100 * sum(with_image) / len(with_image))
    assert found["answers_without_a_problem"] == 4241 - len(problems)


def test_a_problem_counts_in_the_columns_of_its_subject_context_and_grade() -> None:
    assert problem().columns() == ["NAT", "NO", "G1-6", "Avg"]
    both = problem(hint="x", image="image.png", grade=7, subject="language science")
    assert both.columns() == ["LAN", "TXT", "IMG", "G7-12", "Avg"]


def test_a_column_without_problems_has_no_score() -> None:
    found = table({"1": True}, {"1": problem()})
    assert found["NAT"] == 100
    assert found["IMG"] is None


def test_prompts_are_those_of_the_papers() -> None:
    hinted = problem(hint="It glows.")
    assert prompt(problem(), "lepa") == "Which is hot?\nContext: N/A\nOptions: (A) ice (B) fire (C) snow"
    assert prompt(hinted, "lepa") == "Which is hot?\nContext: It glows.\nOptions: (A) ice (B) fire (C) snow"
    assert prompt(hinted, "letter") == (
        "Context: It glows.\nWhich is hot?\nA. ice\nB. fire\nC. snow\n"
        "Answer with the option's letter from the given choices directly."
    )


def write(folder: Path, name: str, *rows: object) -> str:
    path = folder / name
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def test_answers_are_joined_by_id_and_none_is_made_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = {"question": "?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": None}
    stored |= {"subject": "social science", "grade": "grade9", "split": "test"}
    problems = write(tmp_path, "problems.json", {"1": stored, "2": stored | {"answer": 1}, "3": stored})
    rows = [{"question_id": name, "text": text} for name, text in (("2", "B"), ("9", "A"), ("1", "B"), ("1", "A. a"))]
    answers = write(tmp_path, "answers.jsonl", *rows)
    main(["score", "scienceqa", "--problems", problems, "--answers", answers, "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["accuracy"], found["count"], found["missing_answers"]) == (100, 2, 1)
    assert (found["answers_without_a_problem"], found["repeated_answers"]) == (1, 1)


def test_problems_that_are_none_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = write(tmp_path, "problems.json", {"7": {"question": "?"}})
    answers = write(tmp_path, "answers.jsonl", {"question_id": "7", "text": "A"})
    assert main(["score", "scienceqa", "--problems", problems, "--answers", answers]) == 2
    assert "problem 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "scores"),
    [
        ("8 7", (8, 7)),
        ("8, 7", (8, 7)),
        ("8/10 7/10", (8, 7)),
        ("\n  8.5 7 \nBecause of 3 things.", (8.5, 7)),
        ("**8 7**", (8, 7)),
        ("(8, 7)", (8, 7)),
        ("Scores: 8/10, 7/10.", (8, 7)),
        ("Assistant 1: 8, Assistant 2: 7", (8, 7)),
        ("Scores for Assistant 1 and 2: 8 and 7", (8, 7)),
        ("8 7. Assistant 1 was better in 3 ways.", (8, 7)),
        ("10 10", (10, 10)),
        ("8", None),
        ("8/10", None),
        ("8/7", None),
        ("8 7 6", None),
        ("85 90", None),
        ("-1 -1", None),
        ("In 2 images I saw 3 cats.", None),
        ("I cannot rate this.\n8 7", None),
        ("", None),
    ],
)
def test_two_scores_are_read_from_the_first_line_or_none(words: str, scores: tuple[float, float] | None) -> None:
    assert read_scores(words) == scores


@given(st.integers(0, 100), st.integers(0, 100), st.sampled_from([" ", ", ", "/10 "]))
def test_every_pair_on_the_scale_is_read(first: int, second: int, between: str) -> None:
    assert read_scores(f"{first / 10}{between}{second / 10}\nwhy") == (first / 10, second / 10)


@given(st.text())
def test_scores_never_leave_the_scale(words: str) -> None:
    found = read_scores(words)
    assert found is None or all(0 <= score <= 10 for score in found)


def test_the_relative_score_is_a_ratio_of_means() -> None:
    assert relative_score([Pair(8, 4), Pair(6, 9)]) == pytest.approx(92.857, abs=0.001)
    assert relative_score([]) is None


def test_swapped_words_name_the_candidate_first() -> None:
    assert pair_of("9 6", swapped=True) == Pair(reference=6, candidate=9)


def test_what_does_not_parse_is_left_out_and_counted() -> None:
    rows = [
        {"text": "8 4", "category": "conv"},
        {"content": "6 9", "category": "detail"},
        {"text": "no idea", "category": "conv"},
        {"tuple": [1, 1]},
        None,
    ]
    found = tally(rows)
    assert found.relative_score == pytest.approx(92.857, abs=0.001)
    assert found.by_category == {"conv": 50, "detail": 150}
    assert (found.rows_read, found.rows_left_out) == (5, 3)
    assert sum(found.left_out.values()) == 3


def test_reviews_of_several_files_are_scored_together_and_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write(tmp_path, "a.jsonl", {"text": "8 4"}, "{broken")
    second = write(tmp_path, "b.jsonl", {"text": "6 9"})
    assert main(["score", "reviews", first, second, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["relative_score"] == pytest.approx(92.857, abs=0.001)
    assert (found["rows_read"], found["rows_left_out"]) == (3, 1)
    assert found["files"][first]["relative_score"] == 50


def test_reviews_of_which_none_can_be_read_make_no_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "reviews", write(tmp_path, "a.jsonl", {"text": "nonsense"}), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["relative_score"] is None


def test_a_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "reviews", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
