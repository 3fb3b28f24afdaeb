import io
import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava_app import archive
from llava_app.archive import markdown, pack, unpack
from llava_app.conversation import Conversation
from llava_app.errors import BusyError, ContextError, DataError, ImageError
from llava_app.images import Picture
from llava_app.limits import PUBLIC
from llava_app.ui.markdown import as_typed, as_written

AS_SHOWN = {"typed": as_typed, "written": as_written}

RECORD = {
    "id": "1",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
}


def png(picture: Picture) -> bytes:
    file = io.BytesIO()
    picture.image.save(file, "PNG")
    return file.getvalue()


def zipped(folder: Path, files: dict[str, bytes | str]) -> Path:
    path = folder / "import.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


def test_a_conversation_comes_back_from_its_zip_file(tmp_path: Path, pictures: list[Picture]) -> None:
    talk = Conversation(system="Be brief.").ask("What <image>?", pictures[:2]).answer("Ä cat.", "length")
    talk = talk.ask("And this?", pictures[2:]).answer("A dog.")
    (tmp_path / "talk.zip").write_bytes(pack(talk, **AS_SHOWN))
    back = unpack(tmp_path / "talk.zip")
    assert back.system == talk.system
    assert [(t.question, t.answer) for t in back.turns] == [("What <image>?", "Ä cat."), ("And this?", "A dog.")]
    assert [p.image.tobytes() for p in back.pictures] == [p.image.tobytes() for p in talk.pictures]


def test_the_zip_file_can_be_read_by_people(pictures: list[Picture]) -> None:
    talk = Conversation().ask("What?", pictures[:1]).answer("A cat.")
    shown = markdown(talk, ["pictures/1.png"], **AS_SHOWN)
    assert shown == "**Question:** What?\n\n![](pictures/1.png)\n\n**Answer:** A cat.\n"
    names = zipfile.ZipFile(io.BytesIO(pack(talk, **AS_SHOWN))).namelist()
    assert names == ["conversation.json", "conversation.md", "pictures/1.png"]


def test_what_people_read_shows_no_picture_but_those_in_the_zip_file(pictures: list[Picture]) -> None:
    spy = "![a](http://elsewhere.example/a.png) <img src=http://elsewhere.example/b.png>"
    talk = Conversation(system=spy).ask(spy, pictures[:1]).answer(spy)
    read = markdown(talk, ["pictures/1.png"], **AS_SHOWN)
    assert re.findall(r"(?<!\\)!\[[^\n]*?\]\((.*?)\)", read) == ["pictures/1.png"]
    assert "<" not in read


def test_a_record_made_by_hand_is_taken(tmp_path: Path, pictures: list[Picture]) -> None:
    path = zipped(tmp_path, {"conversation.json": json.dumps(RECORD), "a.png": png(pictures[0])})
    assert unpack(path).turns[0].answer == "A cat."


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"image": "../a.png"}, "“../a.png”, which lies outside of the zip file"),
        ({"image": "/etc/passwd"}, "“/etc/passwd”, which lies outside"),
        ({"image": "b/..\\a.png"}, "which lies outside"),
        ({"image": "b.png"}, "holds no b.png"),
        ({"image": ["a.png"] * 51}, "names 51 pictures; the limit is 50"),
        ({"image": ["a.png", "a.png"]}, "hold 1 <image> but there are 2 pictures"),
        ({"conversations": []}, 'no "conversations"'),
    ],
)
def test_a_record_that_is_not_right_is_refused_by_name(
    tmp_path: Path, pictures: list[Picture], changed: dict[str, Any], told: str
) -> None:
    path = zipped(tmp_path, {"conversation.json": json.dumps(RECORD | changed), "a.png": png(pictures[0])})
    with pytest.raises(DataError, match=told):
        unpack(path)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "holds no conversation.json"),
        ({"conversation.json": "{"}, "is not JSON"),
        ({"conversation.json": "[" * 100_000}, "is not JSON"),
        ({"conversation.json": "[1, 2]"}, "must hold one LLaVA record"),
        ({"conversation.json": " " * 5_000_001}, "has 5 MB; the limit is 5 MB"),
        ({f"{number}.png": b"" for number in range(201)}, "holds 201 files; the limit is 200"),
    ],
)
def test_a_zip_file_that_is_not_right_is_refused_by_name(tmp_path: Path, files: dict[str, str], told: str) -> None:
    with pytest.raises(DataError, match=told):
        unpack(zipped(tmp_path, files))


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_TOTAL", 1_000_000)
    path = zipped(tmp_path, {"conversation.json": json.dumps(RECORD), "a.png": bytes(2_000_000)})
    assert path.stat().st_size < 10_000
    with pytest.raises(DataError, match="unpacks to 2 MB; the limit is 1 MB"):
        unpack(path)


def test_a_link_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "link.zip"
    with zipfile.ZipFile(path, "w") as file:
        link = zipfile.ZipInfo("a.png")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "/etc/passwd")
        file.writestr("conversation.json", json.dumps(RECORD))
    with pytest.raises(DataError, match=r"a\.png in the zip file is a link"):
        unpack(path)


@pytest.mark.parametrize("content", [b"no zip", b"PK\x03\x04 cut"])
def test_what_is_no_zip_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(DataError, match="no zip file that can be read"):
        unpack(tmp_path / "x.zip")


def test_a_picture_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"a\.png"):
        unpack(zipped(tmp_path, {"conversation.json": json.dumps(RECORD), "a.png": b"Dear diary"}))


def test_the_limits_of_the_page_hold_for_a_zip_file(tmp_path: Path) -> None:
    many = zipped(tmp_path, {"conversation.json": json.dumps(RECORD | {"image": ["a.png"] * 17})})
    with pytest.raises(DataError, match="names 17 pictures; the limit is 16"):
        unpack(many, PUBLIC)
    said = [{"from": "human", "value": "x" * 4_001}, {"from": "gpt", "value": "Yes."}]
    long = zipped(tmp_path, {"conversation.json": json.dumps({"id": "1", "conversations": said})})
    with pytest.raises(ContextError, match="The question has 4,001 characters; the limit is 4,000"):
        unpack(long, PUBLIC)
    assert unpack(long)


def test_a_picture_in_a_zip_file_is_not_read_while_the_memory_is_full(tmp_path: Path) -> None:
    path = zipped(tmp_path, {"conversation.json": json.dumps(RECORD), "a.png": b"Dear diary"})
    with pytest.raises(BusyError, match="of memory, which is the limit"):
        unpack(path, replace(PUBLIC, picture_bytes=0))
