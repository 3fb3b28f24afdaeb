import json
import re
import zipfile
from datetime import datetime
from pathlib import Path

import pytest
from PIL import Image

from finetune.__main__ import main
from finetune.check import LEARNED, PLAINLY, Answers, show
from finetune.data.records import read_records
from llava_app.checkpoints import read_card
from llava_app.conversation import from_record
from llava_app.images import open_image
from llava_app.loading import processor_of
from llava_app.prompts import encode, template_text
from tests.finetune.conftest import record


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Six good records, one of them twice more, and four that are wrong in different ways."""
    Image.new("RGB", (20, 30), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    good = [record(f"good {n}", [f"Which colour, {n}?", "Red."], ["red.png"]) for n in range(5)]
    good.append(record("long", ["Tell me.", "A long answer. " * 60]))
    wrong = [
        record("broken", ["What?", "Red."], ["broken.png"]),
        record("marks", ["What <image>?", "Red."], ["red.png"]),
        record("empty", ["What?", ""], ["red.png"]),
        {"id": "roles", "conversations": [{"from": "gpt", "value": "Hi."}, {"from": "human", "value": "Hi?"}]},
    ]
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps([*good, *wrong, good[0] | {"id": "again"}, good[0] | {"id": "once more"}]), "utf-8")
    return path


def test_a_report_says_what_is_wrong_and_both_files_are_written(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(mixed)]) == 0
    told = capsys.readouterr().out
    assert "12 records: 6 good, 6 refused" in told
    assert "refused 2: the same as an earlier record (first: again as good 0)" in told
    assert "pictures: 5 shown" in told
    assert "answers: 6, of which 2 are different (33%); most frequent: “Red.” 83.3%" in told
    clean = read_records(mixed.parent / "mixed.clean.jsonl")
    assert [each["id"] for each in clean] == ["good 0", "good 1", "good 2", "good 3", "good 4", "long"]
    refused = [json.loads(line) for line in (mixed.parent / "mixed.refused.jsonl").read_text("utf-8").splitlines()]
    assert [each["record"]["id"] for each in refused] == ["broken", "marks", "empty", "roles", "again", "once more"]
    assert "damaged" in refused[0]["details"]
    assert main(["check", str(mixed.parent / "mixed.clean.jsonl")]) == 0
    assert "6 records: 6 good, 0 refused" in capsys.readouterr().out


def test_the_folder_of_the_written_files_is_made(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(mixed), "--out", str(tmp_path / "new" / "folder")]) == 0
    assert len(read_records(tmp_path / "new" / "folder" / "mixed.clean.jsonl")) == 6
    assert main(["check", str(mixed), "--out", str(mixed)]) == 2
    assert re.search(
        r"Nothing can be written to .*mixed.json: .* Give another folder as --out", capsys.readouterr().err
    )


def test_lengths_with_a_base_are_those_of_training(mixed: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(mixed), "--base", str(base), "--max-length", "600"]) == 0
    told = capsys.readouterr().out
    processor = processor_of(read_card(base))
    pictures = [open_image(mixed.parent / "red.png")]
    seen, *_, long = read_records(mixed)[:6]
    longest = len(encode(from_record(long, []), processor, open_answer=False).input_ids)
    usual = len(encode(from_record(seen, pictures), processor, open_answer=False).input_ids)
    assert f"half have at most {usual:,}," in told
    assert f"the longest {longest:,}" in told
    assert "cut at 600: 1 examples (--max-length)" in told
    assert "cut at 2,048: 0 examples" in told


def test_a_record_of_which_cutting_leaves_no_answer_is_refused(
    mixed: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["check", str(mixed), "--base", str(base), "--max-length", "60"])
    assert "no answer within 60 tokens" in capsys.readouterr().out


def test_a_line_that_is_not_json_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"id": \n' + json.dumps(record("a", ["Hi?", "Hi."])), encoding="utf-8")
    assert main(["check", str(path)]) == 0
    assert "2 records: 1 good, 1 refused\n  refused 1: not JSON" in capsys.readouterr().out


def test_alignment_needs_pictures(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", str(mixed), "--stage", "align"])
    assert "refused 1: no picture; stage align" in capsys.readouterr().out


def test_examples_are_shown_with_what_is_learned_marked(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", str(mixed), "--show", "2"])
    told = capsys.readouterr().out
    assert "--- good 0, pictures: red.png" in told
    assert "USER: <image>\nWhich colour, 1? ASSISTANT:⟦ Red.</s>⟧" in told
    assert "good 2" not in told


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    example = record("a", ["Hi?", "Hello."])
    begin, end = LEARNED
    assert show(example, template_text("vicuna_v1")).endswith(f"ASSISTANT:{begin} Hello.</s>{end}")
    monkeypatch.setenv("NO_COLOR", "1")
    begin, end = PLAINLY
    assert show(example, template_text("vicuna_v1")).endswith(f"ASSISTANT:{begin} Hello.</s>{end}")


def test_data_cannot_write_to_the_terminal() -> None:
    shown = show(record("a\x1b[2J", ["Hi\x1b]0;title\x07?", "Hello."]), template_text("vicuna_v1"))
    assert "\x1b" not in shown
    assert "\x07" not in shown


def test_pictures_of_a_dataset_become_files_of_the_cleaned_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets", reason="reading Hugging Face datasets needs the package datasets")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    encoded = {"bytes": (tmp_path / "red.png").read_bytes(), "path": None}
    rows = datasets.Dataset.from_dict({"image": [encoded], "caption": ["Red."]})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "captions")
    assert main(["check", str(tmp_path / "captions"), "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["check", str(tmp_path / "captions.clean.jsonl"), "--stage", "align"]) == 0
    assert "1 records: 1 good, 0 refused" in capsys.readouterr().out


def test_columns_that_json_has_no_form_for_are_written_as_text_and_those_that_were_read_are_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets", reason="reading Hugging Face datasets needs the package datasets")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    encoded = {"bytes": (tmp_path / "red.png").read_bytes(), "path": None}
    messages = [{"role": "user", "content": "Alike?"}, {"role": "assistant", "content": "Yes."}]
    wrong = [{"role": "user", "content": "Alike?"}]
    when = [datetime(2020, 1, 1), datetime(2021, 1, 1)]
    columns = {"images": [[encoded] * 2] * 2, "messages": [messages, wrong], "when": when, "sound": [b"abc"] * 2}
    rows = datasets.Dataset.from_dict(columns).cast_column("images", datasets.List(datasets.Image()))
    rows.save_to_disk(tmp_path / "pairs")
    assert main(["check", str(tmp_path / "pairs"), "--out", str(tmp_path / "out")]) == 0
    (clean,) = [json.loads(line) for line in (tmp_path / "out/pairs.clean.jsonl").read_text("utf-8").splitlines()]
    assert sorted(clean) == ["conversations", "image", "sound", "when"]
    assert (clean["when"], clean["sound"]) == ("2020-01-01 00:00:00", "3 bytes")
    assert "2021-01-01" in (tmp_path / "out/pairs.refused.jsonl").read_text("utf-8")
    capsys.readouterr()
    assert main(["check", str(tmp_path / "out/pairs.clean.jsonl")]) == 0
    assert "1 records: 1 good, 0 refused\npictures: 2 shown" in capsys.readouterr().out


def test_the_file_of_good_records_can_be_trained_on_wherever_it_is_written(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    main(["check", str(mixed), "--out", str(out)])
    assert "archives" not in capsys.readouterr().out
    assert main(["check", str(out / "mixed.clean.jsonl")]) == 0
    assert "6 records: 6 good, 0 refused" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "red.zip", "w") as archive:
        archive.write(tmp_path / "red.png", "red.png")
    (tmp_path / "red.png").unlink()
    main(["check", str(mixed), "--out", str(out)])
    assert f"their pictures lie in archives: train with --images {tmp_path}\n" in capsys.readouterr().out
    assert main(["check", str(out / "mixed.clean.jsonl"), "--images", str(tmp_path)]) == 0
    assert "6 records: 6 good, 0 refused" in capsys.readouterr().out


def test_questions_with_words_between_their_pictures_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    records = []
    for question in (
        "<image>\n<image>\nAlike?",
        "Is <image> like <image> ?",
        "This is <image>. And <image>\n<image>\n?",
    ):
        record_of_it = record(question, [question, "Yes."]) | {"image": ["a.png"] * question.count("<image>")}
        records.append(record_of_it)
    (tmp_path / "pairs.json").write_text(json.dumps(records), encoding="utf-8")
    assert main(["check", str(tmp_path / "pairs.json")]) == 0
    assert "pictures: 7 shown; 2 questions have words between several <image>" in capsys.readouterr().out


def test_a_mixture_says_what_it_draws_and_every_part_has_files_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        records = [record(f"{name}{number}", ["Hi?", f"Hi {number}."]) for number in range(4)]
        (tmp_path / name / "records.json").write_text(json.dumps(records), encoding="utf-8")
    parts = "parts:\n- {data: x/records.json, weight: 1.5}\n- {data: y/records.json, count: 2}\n"
    (tmp_path / "mix.yaml").write_text(parts, encoding="utf-8")
    assert main(["check", str(tmp_path / "mix.yaml"), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "mix.yaml: 8 records are drawn for each epoch\n" in told
    assert f"  {tmp_path}/x/records.json: 6 drawn from 4 records, 75% of the mixture, weight 1.5\n" in told
    assert f"  {tmp_path}/y/records.json: 2 drawn from 4 records, 25% of the mixture, weight 0.5\n" in told
    clean = [read_records(tmp_path / "out" / f"records-{number}.clean.jsonl") for number in (1, 2)]
    assert [part[0]["id"] for part in clean] == ["x0", "y0"]


def test_a_dataset_in_the_folder_one_is_in_is_written_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pets"
    folder.mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "A cat."}', encoding="utf-8")
    monkeypatch.chdir(folder)
    assert main(["check", "."]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "metadata.jsonl"]
    assert main(["check", str(tmp_path / "pets.clean.jsonl"), "--stage", "align"]) == 0
    assert json.loads((tmp_path / "pets.clean.jsonl").read_text("utf-8"))["image"] == ["pets/a.png"]


@pytest.mark.parametrize("text", ["", "[]", json.dumps([record("a", ["What?", ""])])], ids=["nothing", "none", "wrong"])
def test_data_without_a_good_record_is_an_error(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.json").write_text(text, encoding="utf-8")
    assert main(["check", str(tmp_path / "data.json")]) == 2
    assert f"There is no good record in {tmp_path}/data.json" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--max-length", "--show"])
def test_numbers_below_what_makes_sense_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", "data.json", option, "-1"])
    assert f"argument {option}: -1 is too few; give at least" in capsys.readouterr().err


def test_answers_that_differ_are_counted_apart() -> None:
    answers = Answers()
    for answer in ("Yes", "No", "Yes", "Maybe", "Yes", "No"):
        answers.add(answer)
    assert answers.describe() == ("answers: 6, of which 3 are different (50%); most frequent: “Yes” 50.0%, “No” 33.3%")
