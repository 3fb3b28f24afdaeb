import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.data import records
from finetune.data.records import as_record, image_names, open_records, read_records
from finetune.data.refusals import wrong_record
from llava_app.errors import DataError
from tests.finetune.conftest import record

TEXT = st.text('ab"\\\\[]{},: \n\u00e4\u0085\u20ac\U0001f600', max_size=6)
VALUES = TEXT | st.integers() | st.lists(TEXT, max_size=3)
ROWS = st.lists(st.dictionaries(TEXT, VALUES, max_size=3), max_size=5)


@settings(deadline=None, max_examples=60)
@given(ROWS, st.sampled_from([None, 2]), st.booleans(), st.integers(1, 60))
def test_records_are_what_json_says_however_the_file_is_cut_into_blocks(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], indent: int | None, ascii_only: bool, block: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), "utf-8", errors="surrogatepass")
    lines = path.with_suffix(".jsonl")
    lines.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "BLOCK", block + 16)
        assert [open_records(path).row(number) for number in range(len(rows))] == rows
    assert [open_records(lines).row(number) for number in range(len(rows))] == rows


def test_numbers_at_the_end_of_a_block_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "BLOCK", 5)
    path = tmp_path / "numbers.json"
    path.write_text("[123456789, 4]", encoding="utf-8")
    assert read_records(path) == [123456789, 4]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    for text in ("[{}]", "{}\n{}"):
        path = tmp_path / "bom.json"
        path.write_text(text, encoding="utf-8-sig")
        assert read_records(path)[0] == as_record({})


def test_a_list_that_is_cut_off_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_text('[\n{"a": 1},\n{"a": ', encoding="utf-8")
    with pytest.raises(DataError, match=r"cut\.json, line 3: not JSON"):
        open_records(path)


def test_a_folder_of_pictures_with_captions(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "text": "A cat."}, {"file_name": "b.png", "caption": "A dog."}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    first, second = open_records(tmp_path)
    turns = [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": "A cat."}]
    assert (first["image"], first["conversations"]) == (["a.png"], turns)
    assert second["conversations"][1]["value"] == "A dog."


def test_a_folder_of_pictures_with_dialogues(tmp_path: Path) -> None:
    row = {"file_name": "a.png", "conversations": record("a", ["What?", "A cat."], ["a.png"])["conversations"]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (read,) = open_records(tmp_path)
    assert (image_names(read), read["conversations"]) == (["a.png"], row["conversations"])


def test_messages_are_read_whether_their_contents_are_text_or_parts() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    expected = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    for content in (parts, "What?"):
        read = as_record({"images": ["a.png"], "messages": [{"role": "user", "content": content}, answer]})
        assert (read["image"], read["conversations"]) == (["a.png"], expected)


SHOWN = {  # how a part of a message names or holds a picture
    "OpenAI": ({"type": "image_url", "image_url": {"url": "a.png"}}, "a.png"),
    "a string": ({"type": "image_url", "image_url": "a.png"}, "a.png"),
    "a data URL": ({"type": "image_url", "image_url": {"url": "data:image/png;base64,YWJj"}}, b"abc"),
    "transformers": ({"type": "image", "path": "a.png"}, "a.png"),
    "a dataset": ({"type": "image", "image": {"bytes": b"abc", "path": None}, "text": None}, b"abc"),
}


@pytest.mark.parametrize(("part", "picture"), SHOWN.values(), ids=SHOWN)
def test_pictures_in_the_parts_of_messages_are_read(part: dict[str, Any], picture: str | bytes) -> None:
    content = [part, {"type": "text", "text": "What?", "image": None}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]
    read = as_record({"messages": messages})
    assert (read["image"], read["conversations"][0]["value"]) == ([picture], "<image>\nWhat?")
    assert wrong_record(read, "align") is None


REFUSED: dict[str, Any] = {  # reason: content of the question
    "of type 'input_audio'": [{"type": "input_audio", "input_audio": {}}, {"type": "text", "text": "What?"}],
    "of type 'text'": [{"type": "text", "text": None}],
    "a part of a message that is no object": ["What?"],
    "message N has no text": None,
    "a picture at a web address": [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}],
    "hold N <image> but there are N": [{"type": "image"}, {"type": "text", "text": "What?"}],
}


@pytest.mark.parametrize(("reason", "content"), REFUSED.items(), ids=REFUSED)
def test_a_message_that_is_not_understood_whole_is_refused(reason: str, content: Any) -> None:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]
    pictures = {"image": "a.png"} if content is None else {}
    refusal = wrong_record(as_record({**pictures, "messages": messages}), "instruct")
    assert refusal is not None
    assert reason in refusal.reason


def test_a_data_url_is_a_picture_of_any_layout() -> None:
    turns = record("a", ["What?", "A cat."], ["a.png"])["conversations"]
    held = [as_record({"image": url, "conversations": turns})["image"] for url in ("data:,YWJj", "data:,?")]
    assert held == [[b"abc"], [b"no base64"]]


def test_a_llava_record_stays_as_it_is() -> None:
    for kept in ({"conversations": []}, {"image": "a.png", "conversations": []}, "words", 7):
        assert as_record(kept) is kept


def test_a_folder_that_holds_no_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"without metadata\.jsonl and no Hugging Face dataset"):
        open_records(tmp_path)


def test_a_dataset_without_the_package_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state.json").write_text("{}", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package datasets"):
        open_records(tmp_path)


@pytest.mark.parametrize("saved", ["arrow", "splits", "parquet"])
def test_a_hugging_face_dataset_gives_its_pictures_as_they_were_encoded(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="reading Hugging Face datasets needs the package datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    encoded = (tmp_path / "red.png").read_bytes()
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red."}]
    rows = datasets.Dataset.from_dict({"images": [[{"bytes": encoded, "path": None}], []], "messages": [messages] * 2})
    rows = rows.cast_column("images", datasets.List(datasets.Image()))
    folder = tmp_path / "dataset"
    if saved == "parquet":
        folder.mkdir()
        rows.to_parquet(folder / "train-00000.parquet")
    else:
        (datasets.DatasetDict({"train": rows}) if saved == "splits" else rows).save_to_disk(folder)
    seen, text = open_records(folder)
    assert image_names(seen) == [encoded]
    assert [turn["value"] for turn in seen["conversations"]] == ["<image>\nWhat?", "Red."]
    assert (image_names(text), text["conversations"][0]["value"]) == ([], "What?")
