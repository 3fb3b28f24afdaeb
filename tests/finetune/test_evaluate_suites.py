"""What each suite asks and how it marks, without a model."""

import json
import os
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.evaluate import llava_bench, pope, scienceqa, textvqa, vibes
from finetune.evaluate.ensembles import ensembles
from finetune.evaluate.judge import Judge
from finetune.evaluate.results import Answer, Question, Result, Suite, scores
from finetune.evaluate.reviews import read_rows, tally
from llava_app.errors import DataError
from tests.openai_server import Reply, Status, openai_server

DATA = Path(os.environ.get("LLAVA_DATA", Path(__file__).parents[3] / "shared" / "data"))
coco_data = pytest.mark.skipif(not (DATA / "llava_bench_coco").is_dir(), reason=f"no LLaVA-Bench data in {DATA}")
NOW = 0.01


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")


def judge(url: str) -> Judge:
    return Judge("scripted", url, retries=0, at_once=1, timeout=5.0)


def draw(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8), "red").save(folder / name)
    return folder


def write(file: Path, *rows: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def answered(suite: Suite, texts: Mapping[str, str]) -> list[Result]:
    answers = [Answer(question, texts[question.identifier]) for question in suite.questions]
    return suite.mark(answers)


# POPE


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no.", False),
        ("There is not one, sorry.", False),
        ("Yes. There is no doubt.", True),
        ("A snowboard", True),
        ("Nothing", True),
        ("NO", True),
        ("", True),
    ],
)
def test_pope_reads_an_answer_as_its_authors_do(text: str, yes: bool) -> None:
    assert pope.says_yes(text) == yes


def test_pope_measures_are_those_of_the_confusion_matrix(tmp_path: Path) -> None:
    labels = ["yes", "yes", "yes", "no", "no"]
    for split in pope.SPLITS:
        rows = [
            {"question_id": number, "image": "a.jpg", "text": "Is there a cat?", "label": label}
            for number, label in enumerate(labels)
        ]
        write(tmp_path / f"coco_pope_{split}.json", *rows)
    suite = pope.suite(tmp_path, draw(tmp_path / "images", "a.jpg"))
    said = ["Yes", "Yes", "No", "Yes", "No"]  # 2 hits, 1 miss, 1 false alarm, 1 right rejection
    results = answered(suite, {question.identifier: said[i % 5] for i, question in enumerate(suite.questions)})
    found = suite.tables(results)["POPE, popular"]
    assert suite.questions[0].text == "Is there a cat?\nAnswer the question using a single word or phrase."
    assert found["accuracy"] == 60
    assert found["precision"] == pytest.approx(200 / 3)
    assert found["recall"] == pytest.approx(200 / 3)
    assert found["F1"] == pytest.approx(200 / 3)
    assert found["yes"] == 60
    assert scores(suite, results, model="m", seed=0).score == 60


def test_pope_has_no_precision_where_nothing_was_answered_yes() -> None:
    no = Result(Question("1", "random", "?", right=("yes",)), "No", 0.0)
    assert pope.measures([no])["precision"] is None
    assert pope.measures([no])["F1"] == 0


# TextVQA


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Coca-Cola", "coca cola"),
        ("two dogs", "2 dogs"),
        ("dont walk", "don't walk"),
        ("$4.50.", "$4.50"),
        ("1,000", "1000"),
        ("Yes!", "yes"),
        ("joe's", "joe 's"),
        ("a - b", "b"),
        ("None", "0"),
    ],
)
def test_textvqa_normalises_as_the_official_evaluator(text: str, normal: str) -> None:
    assert textvqa.normalised(text) == normal


@pytest.mark.parametrize(("agree", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_textvqa_soft_accuracy_leaves_one_person_out(agree: int, accuracy: float) -> None:
    people = ["Stop"] * agree + [f"other {number}" for number in range(10 - agree)]
    assert textvqa.soft_accuracy("stop!", people) == pytest.approx(accuracy)


def test_textvqa_wants_ten_people(tmp_path: Path) -> None:
    row = {"question_id": 1, "image_id": "a", "question": "what?", "answers": ["x"] * 9}
    with pytest.raises(DataError, match="10 answers"):
        textvqa.suite(write(tmp_path / "val.json", {"data": [row]}), draw(tmp_path, "a.jpg"))


def test_a_picture_that_is_not_there_stops_a_suite_before_the_model_is_loaded(tmp_path: Path) -> None:
    row = {"question_id": 1, "image_id": "gone", "question": "what?", "answers": ["x"] * 10}
    with pytest.raises(DataError, match=r"gone\.jpg"):
        textvqa.suite(write(tmp_path / "val.json", {"data": [row]}), tmp_path)


# Vibes


def test_every_vibe_passes_on_its_truth_and_fails_on_that_of_its_control() -> None:
    truths = {vibe.picture: vibe.truth for vibe in vibes.VIBES if vibe.category == "caption"}
    for vibe in vibes.VIBES:
        if vibe.other:
            assert vibe.holds(vibe.truth), vibe.question
            assert not vibe.holds(truths.get(vibe.other, "")), vibe.question


def test_there_are_ten_vibes_of_four_kinds() -> None:
    kinds = [vibe.category for vibe in vibes.VIBES]
    assert {kind: kinds.count(kind) for kind in kinds} == {"caption": 3, "vqa": 3, "reasoning": 2, "refusal": 2}


def test_a_blind_model_is_caught(tmp_path: Path) -> None:
    suite = vibes.suite(reviews=tmp_path / "r.jsonl")
    everything = " ".join(vibe.truth for vibe in vibes.VIBES) + " I cannot tell. Three, one."
    results = answered(suite, {question.identifier: everything for question in suite.questions})
    card = suite.tables(results)["Scorecard"]
    assert card["does it see?"].startswith("FAIL: 0")
    assert card["refusal"].startswith("pass: 2")
    assert len(results) == 10
    assert "another picture" in results[0].why


def test_a_model_that_sees_passes(tmp_path: Path) -> None:
    suite = vibes.suite(reviews=tmp_path / "r.jsonl")
    told = {name: vibe.truth if vibe.other else "I cannot tell." for name, vibe in vibes.NAMED.items()}
    results = answered(suite, told | {q.identifier: "Nothing." for q in suite.questions if q.identifier not in told})
    assert scores(suite, results, model="m", seed=0).score == 100
    assert all(text.startswith("pass") for text in suite.tables(results)["Scorecard"].values())


def test_a_judge_of_vibes_stands_beside_the_rules(tmp_path: Path) -> None:
    def reply(request: dict[str, Any]) -> Reply:
        content = request["messages"][0]["content"]
        return Status(400) if "Who drew" in content else "Hm." if "joke" in content else "Yes, it is."

    with openai_server(reply) as url:
        suite = vibes.suite(judge(url), reviews=tmp_path / "r.jsonl")
        results = answered(suite, {question.identifier: "?" for question in suite.questions})
        found = suite.tables(results)["By the judge scripted"]
    assert found["caption-1"] == "yes"
    assert found["reasoning-7"] == "unreadable"
    assert found["refusal-10"] == "status 400 from the judge"
    assert len(found) == 10


# LLaVA-Bench


def bench_files(folder: Path) -> Path:
    questions = [
        {"question_id": n, "image": "a.jpg", "text": f"Question {n}?", "category": category}
        for n, category in enumerate(("conv", "detail", "complex"))
    ]
    box = {"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}
    write(folder / "questions.jsonl", *questions)
    write(folder / "captions_boxes.jsonl", {"image": "a.jpg", "captions": ["A cat.", "One cat."], "instances": [box]})
    references = [{"question_id": n, "text": f"Reference {n}."} for n in (2, 0, 1)]  # another order: joined by id
    write(folder / "reference_answers.jsonl", *references)
    draw(folder / "images", "a.jpg")
    return folder


def bench(folder: Path, url: str, *, both_orders: bool = False) -> tuple[Suite, list[Result]]:
    read = llava_bench.read_bench("llava-bench-coco", bench_files(folder))
    suite = llava_bench.suite(read, folder / "images", judge(url), folder=folder, both_orders=both_orders)
    return suite, answered(suite, {question.identifier: "Mine." for question in suite.questions})


def test_the_judge_reads_context_question_reference_candidate_and_rule(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    with openai_server(["8 7\nwhy"], asked) as url:
        bench(tmp_path, url)
    system, user = (message["content"] for message in asked[0]["messages"])
    assert system.startswith("You are a helpful and precise assistant for checking")
    assert user.startswith(
        "[Context]\nA cat.\nOne cat.\n\ncat: [0.1, 0.2, 0.3, 0.4]\n\n[Question]\nQuestion 0?\n\n"
        "[Assistant 1]\nReference 0.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nMine.\n\n[End of Assistant 2]\n\n[System]\n"
    )
    assert "represented as (x1, y1, x2, y2)" in user


def test_the_relative_score_is_over_questions_and_by_category(tmp_path: Path) -> None:
    with openai_server(["8 4", "6 9", "no idea"]) as url:
        suite, results = bench(tmp_path, url)
    found = scores(suite, results, model="m", seed=0)
    assert found.score == pytest.approx(92.857, abs=0.001)
    assert found.by_category == {"conv": 50, "detail": 150, "complex": None}
    assert found.count == 2
    assert sum(found.missing.values()) == 1


def test_a_judge_that_prefers_the_first_place_is_evened_out_by_both_orders(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    with openai_server(["8 4"], asked) as url:
        suite, results = bench(tmp_path, url, both_orders=True)
    assert scores(suite, results, model="m", seed=0).score == 100
    assert len(asked) == 6


def test_the_reviews_that_are_kept_come_to_the_same_score(tmp_path: Path) -> None:
    with openai_server(["8 4", "6 9", "7 7", "5 6", "9 9", "8 1"]) as url:
        suite, results = bench(tmp_path, url, both_orders=True)
    found = tally(read_rows(tmp_path / "reviews.jsonl"))
    expected = scores(suite, results, model="m", seed=0)
    assert found.relative_score == pytest.approx(expected.score)
    assert found.by_category == pytest.approx(expected.by_category)


def test_a_question_without_both_reviews_is_missing(tmp_path: Path) -> None:
    def reply(request: dict[str, Any]) -> Reply:
        content = request["messages"][1]["content"]
        return Status(400) if "Question 1" in content and "[Assistant 1]\nMine." in content else "8 4"

    with openai_server(reply) as url:
        suite, results = bench(tmp_path, url, both_orders=True)
    found = scores(suite, results, model="m", seed=0)
    assert (found.count, found.missing) == (2, {"status 400 from the judge": 1})


def test_where_the_judge_never_answers_there_is_no_score(tmp_path: Path) -> None:
    with openai_server([Status(401)]) as url:
        suite, results = bench(tmp_path, url)
    found = scores(suite, results, model="m", seed=0)
    assert (found.score, found.interval, found.count, sum(found.missing.values())) == (None, None, 0, 3)


def test_files_that_do_not_join_are_refused(tmp_path: Path) -> None:
    write(bench_files(tmp_path) / "reference_answers.jsonl", {"question_id": 0, "text": "Only one."})
    with pytest.raises(DataError, match="2 questions without"):
        llava_bench.read_bench("llava-bench-coco", tmp_path)


def test_the_curated_description_is_what_the_judge_sees_in_the_wild(tmp_path: Path) -> None:
    folder = bench_files(tmp_path)
    (folder / "captions_boxes.jsonl").rename(folder / "unused")
    write(folder / "context.jsonl", {"id": "001", "image": "a.jpg", "caption": "A long description."})
    read = llava_bench.read_bench("llava-bench-wild", folder)
    message = read.ask_judge(Question("0", "conv", "What?"), "Mine.", swapped=False)[1]["content"]
    assert message.startswith("[Context]\nA long description.\n\n[Question]\nWhat?")
    assert "represented with a few sentences describing the image. \n" in message
    assert "(x1, y1, x2, y2)" not in message


@coco_data
def test_the_real_files_join() -> None:
    read = llava_bench.read_bench("llava-bench-coco", DATA / "llava_bench_coco")
    assert len(read.questions) == 90
    assert {row["category"] for row in read.questions} == set(llava_bench.CATEGORIES)
    assert re.search(r"\n\nsuitcase: \[\d", read.contexts["0"])


# ScienceQA


STORED = {
    "question": "Which is hot?",
    "choices": ["ice", "fire", "snow"],
    "answer": 1,
    "hint": "",
    "image": None,
    "subject": "natural science",
    "grade": "grade3",
    "split": "test",
}


def problems(folder: Path, count: int, **changes: object) -> dict[str, scienceqa.Problem]:
    stored = {str(number): STORED | changes | {"question": f"Which {number}?"} for number in range(count)}
    folder.mkdir(exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(stored), encoding="utf-8")
    return scienceqa.read_problems(folder / "problems.json")


def test_only_test_problems_are_asked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the split"):
        scienceqa.suite(problems(tmp_path, 2, split="train"), tmp_path, kind="lepa")


def test_pictures_lie_where_the_official_download_puts_them(tmp_path: Path) -> None:
    draw(tmp_path / "images" / "test" / "0", "image.png")
    suite = scienceqa.suite(problems(tmp_path, 1, image="image.png"), tmp_path / "images", kind="letter")
    assert [picture.image.size for picture in suite.questions[0].pictures()] == [(8, 8)]


def test_the_ensembles_are_those_of_the_paper(tmp_path: Path) -> None:
    """Right is B. By problem: GPT-4 right and LLaVA wrong; GPT-4 silent; both agree; GPT-4 wrong and corrects itself;
    they differ and the last word cannot be read; nobody answers; the endpoint fails."""
    alone = ["The answer is B.", "I need the picture.", "The answer is B.", "The answer is A.", "The answer is C.",
             "I need the picture.", Status(400)]  # fmt: skip
    ours = ["The answer is A.", "B", "B", "B", "B", "?", "B"]
    again = {"Which 0?": "The answer is B.", "Which 3?": "The answer is B.", "Which 4?": "Both may be."}
    asked: list[str] = []

    def reply(request: dict[str, Any]) -> Reply:
        content = request["messages"][1]["content"]
        name = content.split("\n")[0]
        asked.append(name)
        return again[name] if "Two answers to this question differ" in content else alone[int(name[6])]

    found = problems(tmp_path, 7)
    with openai_server(reply) as url:
        tables = ensembles(found, {str(n): text for n, text in enumerate(ours)}, judge(url), folder=tmp_path, seed=1)
    complement, judged = tables["scripted, complement"], tables["scripted, judge"]
    lucky = random.Random("1/5").randrange(3) == 1
    assert (complement["guessed"], complement["missing"]) == (1, 1)
    assert complement["Avg"] == pytest.approx(100 * (3 + lucky) / 6)  # 0, 1, 2
    assert judged["Avg"] == pytest.approx(100 * (5 + lucky) / 6)  # 0, 1, 2, 3, 4
    assert judged["asked again"] == 3
    assert len(asked) == 7 + 3


def test_guesses_follow_from_the_seed(tmp_path: Path) -> None:
    found = problems(tmp_path, 30)
    with openai_server(["I cannot see it."]) as url:
        tables = [
            ensembles(found, dict.fromkeys(found, "?"), judge(url), folder=tmp_path, seed=seed) for seed in (1, 1, 2)
        ]
    averages = [table["scripted, complement"]["Avg"] for table in tables]
    assert averages[0] == averages[1]
    assert tables[0]["scripted, complement"]["guessed"] == 30
    assert 0 < averages[0] < 100
