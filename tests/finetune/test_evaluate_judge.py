"""A judge that fails, dawdles or talks nonsense: nothing asked twice, nothing lost, nothing made up."""

from pathlib import Path
from typing import Any

import pytest

from finetune.evaluate.judge import FAILURES_IN_A_ROW, Judge, Messages, consult
from finetune.evaluate.ledger import Ledger
from llava_app.errors import DataError
from tests.openai_server import Broken, Cut, Reply, Slow, Status, openai_server

NOW = 0.01  # s that a fault asks to wait


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")


def judge(url: str, **changes: Any) -> Judge:
    return Judge("scripted", url, **({"timeout": 5.0, "retries": 2, "at_once": 1} | changes))


def questions(count: int) -> dict[str, Messages]:
    return {str(number): [{"role": "user", "content": f"question {number}"}] for number in range(count)}


def test_faults_that_pass_are_waited_out(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    with openai_server([Status(429, NOW), Status(500, NOW), "8 7"], asked) as url:
        found = consult(judge(url), questions(1), tmp_path / "reviews.jsonl")
    assert found.replies == {"0": "8 7"}
    assert not found.missing
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Status(500, NOW), "status 500"),
        (Status(400), "status 400"),
        (Slow(1.0), "in time"),
        (Cut(), "reached"),
        (Broken(), "not the protocol's"),
        (Broken('{"choices": []}'), "not the protocol's"),
    ],
)
def test_what_fails_is_missing_for_a_reason_and_asked_again_alone(tmp_path: Path, fault: Reply, reason: str) -> None:
    asked: list[dict[str, Any]] = []

    def reply(request: dict[str, Any]) -> Reply:
        return fault if "question 1" in request["messages"][0]["content"] else "8 7"

    file = tmp_path / "reviews.jsonl"
    with openai_server(reply, asked) as url:
        found = consult(judge(url, retries=0, timeout=0.3), questions(3), file)
        assert found.replies == {"0": "8 7", "2": "8 7"}
        assert reason in found.missing["1"]
        asked.clear()
        consult(judge(url, retries=0, timeout=0.3), questions(3), file)
    assert [request["messages"][0]["content"] for request in asked] == ["question 1"]


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    with openai_server(["8 7"], asked) as url:
        first = consult(judge(url), questions(3), tmp_path / "reviews.jsonl")
        second = consult(judge(url), questions(4), tmp_path / "reviews.jsonl")
    assert len(asked) == 4
    assert second.replies == first.replies | {"3": "8 7"}


def test_the_same_question_under_two_names_is_asked_once(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    message = [{"role": "user", "content": "the same"}]
    with openai_server(["8 7"], asked) as url:
        found = consult(judge(url, at_once=4), {"a": message, "b": message}, tmp_path / "reviews.jsonl")
    assert found.replies == {"a": "8 7", "b": "8 7"}
    assert len(asked) == 1


@pytest.mark.parametrize(
    "fault", [Status(401), Status(403), Status(404), Status(429, NOW, "You exceeded your current quota")]
)
def test_a_judge_that_will_never_answer_is_asked_no_more(tmp_path: Path, fault: Status) -> None:
    asked: list[dict[str, Any]] = []
    with openai_server([fault], asked) as url:
        found = consult(judge(url, retries=0), questions(10), tmp_path / "reviews.jsonl")
    assert len(asked) == 1
    assert len(found.missing) == 10
    assert sum("not asked" in reason for reason in found.missing.values()) == 9


def test_after_many_failures_in_a_row_the_rest_is_not_asked(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    with openai_server([Status(500, NOW)], asked) as url:
        found = consult(judge(url, retries=0), questions(12), tmp_path / "reviews.jsonl")
    assert len(asked) == FAILURES_IN_A_ROW
    assert len(found.missing) == 12


def test_quota_that_ends_in_the_middle_keeps_what_was_paid_for(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    with openai_server(["8 7", "7 7", Status(429, NOW, "insufficient_quota"), "9 9"], asked) as url:
        found = consult(judge(url, retries=0), questions(5), tmp_path / "reviews.jsonl")
        assert set(found.replies) == {"0", "1"}
        assert found.missing["2"] == "the judge's quota is used up"
        later = consult(judge(url, retries=0), questions(5), tmp_path / "reviews.jsonl")
    assert not later.missing
    assert later.replies["0"] == "8 7"
    assert len(asked) == 3 + 3


def test_without_a_key_it_is_said_where_to_put_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(DataError, match="OPENAI_API_KEY"):
        consult(judge("http://127.0.0.1:9/v1"), questions(1), tmp_path / "reviews.jsonl")


def test_a_torn_line_loses_itself_alone(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    ledger = Ledger(file)
    ledger.add("a", {"text": "first"})
    ledger.close()
    with file.open("ab") as torn:
        torn.write(b'{"key": "b", "te')
    after = Ledger(file)
    assert after.get("b") is None
    after.add("c", {"text": "third"})
    after.close()
    read = Ledger(file)
    read.close()
    assert [read.get(key) is not None for key in "abc"] == [True, False, True]
