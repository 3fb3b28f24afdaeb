"""The whole way: contexts in, records out that training accepts; with every fault a teacher can have."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import LlavaProcessor

from finetune.__main__ import main
from finetune.data import check
from finetune.instruct import generation
from finetune.instruct.ledger import read_ledger, spent
from finetune.recipe import load_recipe
from tests.finetune.test_generate_template import COCO, ROOT
from tests.openai_server import Broken, Cut, Long, Reply, Slow, Status, openai_server

TALK = "Question: What is there?\nAnswer: There is a cat.\n\nQuestion: Is there a dog?\nAnswer: No, there is no dog."


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Six pictures of a cat, each with a caption of its own."""
    file = tmp_path / "rows.jsonl"
    boxes = [{"category": "cat", "bbox": [0.1, 0.1, 0.5, 0.9]}]
    told = [
        {"id": f"n{n}", "image": f"{n}.png", "captions": [f"A cat, number n{n}."], "instances": boxes} for n in range(6)
    ]
    file.write_text("\n".join(map(json.dumps, told)), encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def quick_and_keyless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setattr(generation, "LONGEST_PAUSE", 0.01)


def about(request: dict[str, Any]) -> str:
    """The picture that a request is about."""
    return re.findall(r"number (n\d)", request["messages"][-1]["content"])[-1]


def reply(request: dict[str, Any]) -> str:
    """A good dialogue that no other picture has."""
    return TALK.replace("a cat.", f"a cat in picture {about(request)}.")


def generate(url: str, out: Path, *arguments: str | Path, kinds: str = "conversation") -> int:
    os.environ["OPENAI_BASE_URL"] = url
    new = ["--kinds", kinds, "--teacher", "scripted"] if arguments and arguments[0] else []
    return main(["generate", "--out", str(out), *map(str, filter(None, arguments)), *new])


def read(out: Path, name: str) -> Any:
    return json.loads((out / f"{name}.json").read_text(encoding="utf-8"))


def test_a_teacher_writes_the_three_kinds(tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(request: dict[str, Any]) -> Reply:
        system = request["messages"][0]["content"]
        if "Describe the picture" in system:
            return f"A cat, {about(request)}, can be seen."
        return (
            reply(request) if "a conversation of" in system else f"Question: Why {about(request)}?\nAnswer: A cat is."
        )

    asked: list[dict[str, Any]] = []
    with openai_server(write, asked) as url:
        assert generate(url, tmp_path / "out", rows, kinds="conversation,detail,reasoning") == 0
    records, report = read(tmp_path / "out", "records"), read(tmp_path / "out", "report")
    assert len(asked) == len(records) == 18
    assert report["kept"] == {"conversation": 6, "detail": 6, "reasoning": 6}
    assert report["tokens"]["answer"] == sum(len(str(write(request)).split()) for request in asked)
    first = records[0]
    assert first["id"] == "n0/conversation"
    assert first["image"] == "0.png"
    assert first["conversations"][0] == {"from": "human", "value": "<image>\nWhat is there?"}
    assert first["provenance"].keys() == {"kind", "teacher", "prompt", "context", "review"}
    assert first["provenance"]["teacher"] == "scripted"
    assert "kept 18 of 18" in capsys.readouterr().out


@pytest.mark.parametrize("fault", [Status(429, retry_after=0.01), Status(500), Slow(2), Cut(), Broken(), Broken("{}")])
def test_a_fault_is_asked_again(tmp_path: Path, rows: Path, fault: Reply) -> None:
    asked: list[dict[str, Any]] = []
    with openai_server([fault, fault, TALK], asked) as url:
        assert generate(url, tmp_path / "out", rows, "--limit", "1", "--timeout", "0.3") == 0
    assert len(asked) == 3
    assert read(tmp_path / "out", "report")["kept"] == {"conversation": 1}
    lines = read_ledger(tmp_path / "out/ledger.jsonl")
    assert [line["event"] for line in lines] == ["asked", "failed", "asked", "failed", "asked", "replied"]
    billed = not isinstance(fault, Status)  # what was cut off may have been worked on
    assert [line["answer_tokens"] for line in lines if line["event"] == "failed"] == [1024 * billed] * 2


def test_who_never_answers_leaves_the_question_missing(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []
    with openai_server(lambda request: Status(500) if about(request) == "n2" else reply(request), asked) as url:
        assert generate(url, tmp_path / "out", rows) == 1
        assert read(tmp_path / "out", "report")["missing"] == 1
        assert sorted(map(about, asked)).count("n2") == generation.ATTEMPTS
        assert "missing 1" in capsys.readouterr().out
    with openai_server(reply, asked := []) as url:
        assert generate(url, tmp_path / "out") == 0
    assert list(map(about, asked)) == ["n2"]
    assert read(tmp_path / "out", "report")["kept"] == {"conversation": 6}


@pytest.mark.parametrize("refused", [Status(401), Status(404, message="no such model")])
def test_a_teacher_that_cannot_be_used_ends_the_run(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str], refused: Status
) -> None:
    asked: list[dict[str, Any]] = []
    with openai_server([refused], asked) as url:
        assert generate(url, tmp_path / "out", rows, "--at-once", "1") == 1
    assert len(asked) == 1
    assert "missing 6: not answered yet" in (shown := capsys.readouterr().out)
    assert "Check OPENAI_API_KEY" in shown
    assert spent(read_ledger(tmp_path / "out/ledger.jsonl")).tokens == 0


def test_a_teacher_that_uses_more_than_it_may_is_not_trusted_again(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []
    with openai_server(reply, asked) as url:
        assert generate(url, tmp_path / "out", rows, "--at-once", "1", "--max-tokens", "5") == 1
    assert len(asked) == 1
    assert "more tokens than it was allowed" in capsys.readouterr().out


def test_prompts_that_were_changed_since_are_noticed(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    domain = tmp_path / "mine"
    domain.mkdir()
    (domain / "conversation.md").write_text("Talk.", encoding="utf-8")
    with openai_server(reply) as url:
        assert generate(url, tmp_path / "out", rows, "--domain", domain) == 0
        (domain / "conversation.md").write_text("Talk more.", encoding="utf-8")
        assert generate(url, tmp_path / "out") == 2
    assert "begun with prompts" in capsys.readouterr().err


def test_a_teacher_that_is_gone_is_not_asked_for_ever(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generation, "MOST_IN_VAIN", 2)
    asked: list[dict[str, Any]] = []
    with openai_server([Status(400)], asked) as url:
        assert generate(url, tmp_path / "out", rows, "--at-once", "1") == 1
    assert len(asked) == 2  # a 400 is not worth asking again
    assert "2 questions in a row got no answer (status 400)" in capsys.readouterr().out


def test_nobody_waits_a_day_for_a_teacher(tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[dict[str, Any]] = []
    with openai_server([Status(429, retry_after=86_400)], asked) as url:
        assert generate(url, tmp_path / "out", rows, "--limit", "2", "--json") == 1
    assert len(asked) == 2
    report = json.loads(capsys.readouterr().out.splitlines()[-2])
    assert report["problem"] == "status 429, which asks to wait 86,400 seconds"


def test_a_missing_key_is_explained(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert generate("http://127.0.0.1:9/v1", tmp_path / "out", rows) == 2
    assert "Set OPENAI_API_KEY" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget", [["--budget-tokens", "6000"], ["--budget-money", "0.0065", "--prices", "1", "2"]])
def test_the_budget_is_never_passed_and_more_goes_on(tmp_path: Path, rows: Path, budget: list[str]) -> None:
    asked: list[dict[str, Any]] = []
    with openai_server(reply, asked) as url:
        assert generate(url, tmp_path / "out", rows, *budget) == 1
        first = len(asked)
        assert 0 < first < 6
        used = spent(read_ledger(tmp_path / "out/ledger.jsonl"))
        assert used.tokens <= 6_000
        assert used.prompt + 2 * used.answer <= 6_500
        assert generate(url, tmp_path / "out", *budget) == 1  # nothing more fits, so nothing is asked
        assert len(asked) == first
        assert generate(url, tmp_path / "out") == 0
    assert sorted(map(about, asked)) == [f"n{n}" for n in range(6)]


def test_the_ledger_holds_the_promise_before_the_question_is_asked(tmp_path: Path, rows: Path) -> None:
    reserved = []

    def look(request: dict[str, Any]) -> Reply:
        lines = read_ledger(tmp_path / "out/ledger.jsonl")
        reserved.append(f"{about(request)}/conversation" in {line["key"] for line in lines if line["event"] == "asked"})
        return reply(request)

    with openai_server(look) as url:
        generate(url, tmp_path / "out", rows)
    assert reserved == [True] * 6


def test_ctrl_c_keeps_what_was_answered_and_nothing_is_asked_twice(tmp_path: Path, rows: Path) -> None:
    def interrupt(request: dict[str, Any]) -> Reply:
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return reply(request)

    asked: list[dict[str, Any]] = []
    with openai_server(interrupt, asked) as url:
        assert generate(url, tmp_path / "out", rows, "--at-once", "2") == 130
        assert 3 <= len(asked) < 6
        assert sum(read(tmp_path / "out", "report")["kept"].values()) == len(asked)
        assert generate(url, tmp_path / "out", rows, "--at-once", "2") == 0  # the same command again
    assert sorted(map(about, asked)) == [f"n{n}" for n in range(6)]
    assert read(tmp_path / "out", "report")["kept"] == {"conversation": 6}


def test_a_killed_run_loses_only_what_was_under_way(tmp_path: Path, rows: Path) -> None:
    asked: list[dict[str, Any]] = []
    killed: list[subprocess.Popen[bytes]] = []

    def kill(request: dict[str, Any]) -> Reply:
        if len(asked) == 4:
            killed[0].kill()
        return reply(request)

    with openai_server(kill, asked) as url:
        command = [sys.executable, "-m", "finetune", "generate", str(rows), "--out", str(tmp_path / "out")]
        command += ["--kinds", "conversation", "--teacher", "scripted", "--at-once", "1", "--json"]
        environment = os.environ | {"OPENAI_BASE_URL": url}
        killed.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE))
        output, _ = killed[0].communicate()
        assert killed[0].returncode == -signal.SIGKILL
        assert [json.loads(line)["done"] for line in output.splitlines()[1:]] == [1, 2, 3]
        before = spent(read_ledger(tmp_path / "out/ledger.jsonl"))
        assert before.answer > 1024  # the fourth may have been billed, so it counts in full
        assert generate(url, tmp_path / "out") == 0
    assert list(map(about, asked[:4])) == ["n0", "n1", "n2", "n3"]
    assert sorted(map(about, asked[4:])) == ["n3", "n4", "n5"]
    assert read(tmp_path / "out", "report")["kept"] == {"conversation": 6}


def test_other_settings_are_refused_for_the_same_folder(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with openai_server(reply) as url:
        generate(url, tmp_path / "out", rows)
        assert generate(url, tmp_path / "out", rows, "--max-tokens", "99") == 2
        assert "begun with max_tokens 1024, not 99" in capsys.readouterr().err
    assert main(["generate", "--out", str(tmp_path / "none")]) == 2
    assert "holds no generation" in capsys.readouterr().err


def test_what_is_refused_is_counted_and_kept_apart(tmp_path: Path, rows: Path) -> None:
    said: dict[str, Reply] = {
        "n0": TALK,
        "n1": TALK,
        "n2": TALK.replace("a cat", "a bird"),
        "n3": Long(TALK),
        "n4": "I'm sorry.",
        "n5": TALK.replace("There is a cat", "The caption says a cat"),
    }
    with openai_server(lambda request: said[about(request)]) as url:
        assert generate(url, tmp_path / "out", rows) == 0
    report, refused = read(tmp_path / "out", "report"), read(tmp_path / "out", "refused")
    assert report["kept"] == {"conversation": 1}
    assert {reason: found["count"] for reason, found in report["refused"].items()} == {
        "duplicate": 1,
        "speaks of what is not in the context": 1,
        "cut off at the token limit": 1,
        "empty": 1,
        "speaks of captions or boxes": 1,
    }
    assert {item["id"]: item["details"] for item in refused}["n2/conversation"] == "bird"


def test_a_review_goes_before_the_filters(tmp_path: Path, rows: Path) -> None:
    out = tmp_path / "out"
    with openai_server(reply) as url:
        generate(url, out, rows, "--limit", "3")
    reviews = [
        {"key": "n0/conversation", "verdict": "reject"},
        {"key": "n1/conversation", "verdict": "edit", "dialogue": [["What?", "A tabby."]]},
        {"key": "n2/conversation", "verdict": "reject"},
        {"key": "n2/conversation", "verdict": "accept"},
    ]
    (out / "reviews.jsonl").write_text("".join(json.dumps(line) + "\n" for line in reviews), encoding="utf-8")
    assert main(["generate", "--out", str(out), "--export"]) == 0
    records, report = read(out, "records"), read(out, "report")
    assert [record["id"] for record in records] == ["n1/conversation", "n2/conversation"]
    assert [turn["value"] for turn in records[0]["conversations"]] == ["<image>\nWhat?", "A tabby."]
    assert report["refused"] == {"rejected in review": {"count": 1, "first": "n0/conversation"}}
    assert report["reviewed"] == {"reject": 1, "edit": 1, "accept": 1}


def test_a_dry_run_prints_the_exact_prompts_and_asks_nothing(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []
    with openai_server(reply, asked) as url:
        assert generate(url, tmp_path / "out", rows, "--dry-run", "--limit", "2", "--prices", "1000", "0") == 0
        shown = capsys.readouterr().out
        assert asked == []
        assert not (tmp_path / "out").exists()
        generate(url, tmp_path / "out", rows, "--limit", "2")
    for request in asked:
        for message in request["messages"]:
            assert f"· {message['role']} ===\n{message['content']}\n" in shown
    assert re.search(r"2 questions: about [\d,]+ tokens .* in money at most\.", shown)


def test_the_template_teacher_makes_data_that_training_accepts(
    tmp_path: Path, processor: LlavaProcessor, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["generate", "--memeworld", "40", "--out", str(out), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"estimate": "80 questions for the template teacher, which costs nothing."}
    assert [line["done"] for line in lines[1:-1]] == list(range(1, 81))
    assert sum(lines[-1]["kept"].values()) >= 75
    recipe = load_recipe("memeworld_instruct", [])
    checked = check(out / "records.json", out, processor, recipe=recipe, allow_refused=0)
    assert len(checked.examples) == sum(lines[-1]["kept"].values())


@pytest.mark.skipif(not COCO.exists(), reason="no captions_boxes.jsonl (set SHARED_DATA to the folder above it)")
def test_real_pictures_make_data_that_training_accepts(tmp_path: Path, processor: LlavaProcessor) -> None:
    out = tmp_path / "out"
    assert main(["generate", str(COCO), "--out", str(out)]) == 0
    records = read(out, "records")
    assert len(records) == 154
    for name in {record["image"] for record in records}:
        Image.new("RGB", (32, 32)).save(out / name)
    recipe = load_recipe("memeworld_instruct", [])
    assert len(check(out / "records.json", out, processor, recipe=recipe, allow_refused=0).examples) == 154


def test_the_template_teacher_does_not_claim_to_reason(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(rows), "--out", str(tmp_path / "out"), "--kinds", "reasoning"]) == 2
    assert "cannot write reasoning" in capsys.readouterr().err


def test_a_local_model_is_a_teacher_too(tmp_path: Path, rows: Path, language: Path) -> None:
    domain = tmp_path / "short"
    domain.mkdir()
    (domain / "conversation.md").write_text("Talk.", encoding="utf-8")
    out = tmp_path / "out"
    arguments = ["--teacher", str(language), "--domain", str(domain), "--max-tokens", "8", "--limit", "2"]
    assert main(["generate", str(rows), "--out", str(out), *arguments]) == 0
    lines = [line for line in read_ledger(out / "ledger.jsonl") if line["event"] == "replied"]
    assert [line["teacher"] for line in lines] == [language.name] * 2
    assert all(0 < line["answer_tokens"] <= 8 for line in lines)
    assert lines[0]["prompt_tokens"] == len("Talk.\n\nA cat, number n0.\n\ncat: [0.100, 0.100, 0.500, 0.900]\n\n")


def test_a_prompt_too_long_for_a_local_model_is_not_asked(tmp_path: Path, rows: Path, language: Path) -> None:
    arguments = ["--teacher", str(language), "--kinds", "detail", "--limit", "1"]
    assert main(["generate", str(rows), "--out", str(tmp_path / "out"), *arguments]) == 1
    [_asked, failed] = read_ledger(tmp_path / "out/ledger.jsonl")
    assert "exceed the model's 512" in failed["reason"]
