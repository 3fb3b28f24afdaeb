import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from finetune.data import pictures
from finetune.data.pictures import Member, find_pictures, open_picture
from llava_app.errors import DataError, ImageError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """pictures/plain.png, pictures/coco/train.zip (train/a.png stored, b.png deflated), pictures/shard.tar (c.png)."""
    folder = tmp_path / "pictures"
    (folder / "coco").mkdir(parents=True)
    for name, colour in (("plain", "red"), ("a", "green"), ("b", "blue"), ("c", "yellow")):
        Image.new("RGB", (9, 5), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "plain.png").rename(folder / "plain.png")
    with zipfile.ZipFile(folder / "coco" / "train.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "train/a.png")
        archive.write(tmp_path / "b.png", "train/b.png", compress_type=zipfile.ZIP_DEFLATED)
    with tarfile.open(folder / "shard.tar", "w") as shard:
        shard.add(tmp_path / "c.png", "./c.png")
    return folder


def colour(root: Path, name: str) -> object:
    return open_picture(find_pictures(root).place(name)).image.getpixel((0, 0))


def test_pictures_in_archives_are_read_as_if_unpacked_where_the_archives_lie(root: Path) -> None:
    before = sorted(root.rglob("*"))
    assert colour(root, "plain.png") == (255, 0, 0)
    assert colour(root, "coco/train/a.png") == (0, 128, 0)
    assert colour(root, "coco/train/b.png") == (0, 0, 255)
    assert colour(root, "c.png") == (255, 255, 0)
    assert sorted(root.rglob("*")) == before


def test_an_archive_alone_can_be_the_root(root: Path) -> None:
    assert colour(root / "coco" / "train.zip", "train/b.png") == (0, 0, 255)
    assert colour(root / "shard.tar", "c.png") == (255, 255, 0)


def test_encoded_bytes_are_their_own_place(root: Path) -> None:
    data = (root / "plain.png").read_bytes()
    assert find_pictures(root).place(data) is data
    assert open_picture(data).image.size == (9, 5)


def test_a_name_that_no_archive_has_is_a_missing_file(root: Path) -> None:
    with pytest.raises(ImageError, match=r"There is no file absent\.png"):
        open_picture(find_pictures(root).place("coco/train/absent.png"))


def test_an_archive_that_is_gone_or_cut_short_is_an_image_error(root: Path) -> None:
    place = find_pictures(root).place("coco/train/b.png")
    assert isinstance(place, Member)
    whole = (root / "coco" / "train.zip").read_bytes()
    (root / "coco" / "train.zip").write_bytes(whole[: place.offset + 50])
    with pytest.raises(ImageError, match=r"b\.png"):
        open_picture(place)
    (root / "coco" / "train.zip").unlink()
    with pytest.raises(ImageError, match=r"b\.png in train\.zip cannot be read"):
        open_picture(place)


@pytest.mark.parametrize("name", ["words.zip", "words.tar"])
def test_a_file_that_is_no_archive_is_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"words" * 200)
    with pytest.raises(DataError, match=f"{name} is no archive or is damaged"):
        find_pictures(tmp_path / name)


def test_an_archive_without_files_is_an_error(tmp_path: Path) -> None:
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    with pytest.raises(DataError, match=r"no file in .*empty\.zip"):
        find_pictures(tmp_path / "empty.zip")


def test_an_archive_of_a_folder_that_cannot_be_read_is_told_and_passed_over(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "words.zip").write_bytes(b"words" * 200)
    zipfile.ZipFile(root / "empty.zip", "w").close()
    assert colour(root, "c.png") == (255, 255, 0)
    (told,) = caplog.messages
    assert "words.zip is no archive or is damaged" in told


def test_archives_are_looked_into_only_for_a_name_that_is_no_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    members = pictures._members
    monkeypatch.setattr(pictures, "_members", lambda archive: opened.append(archive) or members(archive))
    found = find_pictures(root)
    assert found.place("plain.png") == root / "plain.png"
    assert opened == []
    found.place("c.png")
    found.place("coco/train/a.png")
    assert opened == [root / "coco" / "train.zip", root / "shard.tar"]


def test_a_tar_that_is_compressed_as_a_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="compressed as a whole"):
        find_pictures(tmp_path / "shard.tar.gz")


def test_a_zip_packed_in_another_way_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "odd.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.png", b"words")
    with pytest.raises(DataError, match="not deflated"):
        find_pictures(tmp_path / "odd.zip")
