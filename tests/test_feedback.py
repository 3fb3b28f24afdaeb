import json
from pathlib import Path

import pytest
from transformers import ProcessorMixin

from finetune.data import check, read_records
from finetune.data.records import image_names
from finetune.recipe import load_recipe
from llava_app.conversation import Conversation, from_record
from llava_app.errors import DataError
from llava_app.feedback import Feedback, judged
from llava_app.images import Picture, open_image
from tests.disks import room_for


def lines(path: Path) -> list[dict]:
    return read_records(path) if path.exists() else []


@pytest.fixture
def talk(pictures: list[Picture]) -> Conversation:
    asked = Conversation().ask("What is it?", pictures[:1]).answer("A cat.", "length")
    return asked.ask("And these?", pictures[:2]).answer("Two dogs.")


def test_what_was_liked_and_corrected_is_what_stage_2_reads(tmp_path: Path, talk: Conversation) -> None:
    feedback = Feedback(tmp_path / "feedback")
    feedback.keep(talk, "up", model="Tiny")
    feedback.keep(judged(talk, 0, "A fish."), "corrected", model="Tiny", answer="A cat.")
    liked, corrected = lines(tmp_path / "feedback" / "records.jsonl")
    assert [m["value"] for m in liked["conversations"]] == [
        "<image>\nWhat is it?",
        "A cat.",
        "<image>\n<image>\nAnd these?",
        "Two dogs.",
    ]
    assert [m["value"] for m in corrected["conversations"]] == ["<image>\nWhat is it?", "A fish."]
    assert (corrected["feedback"]["vote"], corrected["feedback"]["answer"]) == ("corrected", "A cat.")
    for record in (liked, corrected):
        assert from_record(record, [open_image(tmp_path / "feedback" / name) for name in image_names(record)])
    assert len(list((tmp_path / "feedback" / "pictures").iterdir())) == 2  # each once


def test_training_accepts_every_record(tmp_path: Path, talk: Conversation, processor: ProcessorMixin) -> None:
    Feedback(tmp_path).keep(talk, "up", model="Tiny")
    checked = check(tmp_path / "records.jsonl", tmp_path, processor, recipe=load_recipe("memeworld_instruct"))
    assert (len(checked.examples), checked.refused) == (1, {})


def test_what_was_disliked_is_kept_apart(tmp_path: Path, talk: Conversation) -> None:
    Feedback(tmp_path).keep(talk, "down", model="Tiny")
    assert not (tmp_path / "records.jsonl").exists()
    assert lines(tmp_path / "disliked.jsonl")[0]["feedback"]["vote"] == "down"


def test_who_thinks_again_is_counted_once(tmp_path: Path, talk: Conversation) -> None:
    feedback = Feedback(tmp_path)
    other = feedback.keep(talk, "up", model="Tiny")
    first = feedback.keep(talk, "up", model="Tiny")
    second = feedback.keep(talk, "down", model="Tiny", replaces=first)
    assert [record["id"] for record in lines(tmp_path / "records.jsonl")] == [other]
    assert [record["id"] for record in lines(tmp_path / "disliked.jsonl")] == [second]


def test_every_line_is_whole_json(tmp_path: Path, talk: Conversation) -> None:
    feedback = Feedback(tmp_path)
    feedback.keep(talk, "up", model="Tiny", replaces=feedback.keep(talk, "up", model="Tiny"))
    odd = Conversation().ask("a\nb\u2028c <image>").answer('"quoted"\n')
    feedback.keep(odd, "up", model="Tiny")
    feedback.keep(talk, "down", model="Tiny", replaces=feedback.keep(talk, "up", model="Tiny"))
    _, line = (tmp_path / "records.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert from_record(json.loads(line)).turns[0].question == "a\nb\u2028c <image>"


def test_a_full_folder_takes_no_more_and_keeps_what_it_has(tmp_path: Path, talk: Conversation) -> None:
    Feedback(tmp_path).keep(talk, "up", model="Tiny")
    kept = (tmp_path / "records.jsonl").read_text(encoding="utf-8")
    with pytest.raises(DataError, match=r"holds 0\.0 GB; the limit is 1e-07"):
        Feedback(tmp_path, most_bytes=100).keep(talk, "down", model="Tiny")
    assert (tmp_path / "records.jsonl").read_text(encoding="utf-8") == kept
    assert not (tmp_path / "disliked.jsonl").exists()


def test_a_vote_for_which_the_disk_has_no_room_is_refused_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    feedback, path = Feedback(tmp_path), tmp_path / "records.jsonl"
    asked = [Conversation().ask(f"Which? {number}").answer("This one.") for number in range(3)]
    feedback.keep(asked[0], "up", model="Tiny")
    with room_for(path, 100), pytest.raises(DataError, match="disk of this page is full, so your vote was not kept"):
        feedback.keep(asked[1], "up", model="Tiny")
    feedback.keep(asked[2], "up", model="Tiny")
    assert [record["conversations"][0]["value"] for record in lines(path)] == ["Which? 0", "Which? 2"]


def test_a_change_of_mind_for_which_there_is_no_room_changes_nothing(tmp_path: Path) -> None:
    feedback, path = Feedback(tmp_path), tmp_path / "records.jsonl"
    talk = Conversation().ask("Which?").answer("This one.")
    for _ in range(9):
        first = feedback.keep(talk, "up", model="Tiny")
    before = path.read_bytes()
    feedback.keep(talk, "down", model="Tiny")
    with room_for(tmp_path / "disliked.jsonl", 1000), pytest.raises(DataError, match="disk"):
        feedback.keep(talk, "down", model="Tiny", replaces=first)
    assert (path.read_bytes(), len(lines(tmp_path / "disliked.jsonl"))) == (before, 1)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_record_that_a_crash_cut_short_spoils_no_other(tmp_path: Path) -> None:
    feedback, path = Feedback(tmp_path), tmp_path / "records.jsonl"
    talk = Conversation().ask("Wähle!").answer("This one.")
    feedback.keep(talk, "up", model="Tiny")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: whole.index("ä".encode()) + 1])  # in the middle of a letter
    second = feedback.keep(talk, "up", model="Tiny")
    third = feedback.keep(talk, "corrected", model="Tiny", replaces=second)
    one, cut, two = path.read_bytes().splitlines()
    assert (one + b"\n", cut) == (whole, whole[: len(cut)])
    assert json.loads(two)["id"] == third
