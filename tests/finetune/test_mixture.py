import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.data.mixture import digest, open_data
from llava_app.errors import DataError
from tests.finetune.conftest import record


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten records in one/a.json and four in two/b.jsonl."""
    for name, letter, count in (("one/a.json", "a", 10), ("two/b.jsonl", "b", 4)):
        path = tmp_path / name
        path.parent.mkdir()
        records = [record(f"{letter}{number}", ["Hi?", "Hi."], ["0.png"]) for number in range(count)]
        path.write_text(json.dumps(records) if path.suffix == ".json" else "\n".join(map(json.dumps, records)))
    return tmp_path


def mixture(folder: Path, *parts: dict[str, Any], **more: Any) -> Path:
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump({"parts": list(parts), **more}), encoding="utf-8")
    return path


def drawn(path: Path) -> Counter[str]:
    data = open_data(path)
    return Counter(data.read(index)[0]["id"] for index in range(len(data)))


def test_parts_come_once_unless_something_else_is_said(folder: Path) -> None:
    ids = drawn(mixture(folder, {"data": "one/a.json"}, {"data": "two/b.jsonl"}))
    assert ids == Counter([f"a{n}" for n in range(10)] + [f"b{n}" for n in range(4)])


def test_a_weight_says_how_often_each_record_comes(folder: Path) -> None:
    ids = drawn(mixture(folder, {"data": "one/a.json", "weight": 0.5}, {"data": "two/b.jsonl", "weight": 2.5}))
    assert sum(count for name, count in ids.items() if name[0] == "a") == 5
    assert sorted(count for name, count in ids.items() if name[0] == "b") == [2, 2, 3, 3]


def test_a_count_says_how_many_records_are_drawn(folder: Path) -> None:
    ids = drawn(mixture(folder, {"data": "one/a.json", "count": 3}, {"data": "two/b.jsonl", "count": 9}))
    assert [sum(count for name, count in ids.items() if name[0] == letter) for letter in "ab"] == [3, 9]


def test_the_seed_says_which_and_nothing_else_does(folder: Path) -> None:
    parts = [{"data": "one/a.json", "count": 4}]
    draws = [drawn(mixture(folder, *parts, seed=seed)) for seed in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1]
    assert len({tuple(sorted(draw)) for draw in draws}) > 1
    assert drawn(mixture(folder, parts[0] | {"seed": 1})) == draws[2]


def test_pictures_are_beside_each_part_or_where_it_says(folder: Path) -> None:
    data = open_data(mixture(folder, {"data": "one/a.json"}, {"data": "two/b.jsonl", "images": "pictures"}))
    places = {part.places(found)[0] for found, part in (data.read(index) for index in range(len(data)))}
    assert places == {folder / "one" / "0.png", folder / "pictures" / "0.png"}


def test_the_digest_changes_with_a_part(folder: Path) -> None:
    path = mixture(folder, {"data": "one/a.json"}, {"data": "two/b.jsonl"})
    before = digest(path)
    assert digest(path) == before
    (folder / "two" / "b.jsonl").write_text("{}", encoding="utf-8")
    assert digest(path) != before


@pytest.mark.parametrize("saved", ["arrow", "parquet"])
def test_the_digest_of_a_dataset_is_that_of_its_tables(saved: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="reading Hugging Face datasets needs the package datasets")
    digests = []
    for answer in ("Yes.", "No!!"):
        folder = tmp_path / "talk"
        shutil.rmtree(folder, ignore_errors=True)
        rows = datasets.Dataset.from_dict({"text": [answer]})
        if saved == "arrow":
            rows.save_to_disk(folder)
        else:
            folder.mkdir()
            rows.to_parquet(folder / "train.parquet")
        digests.append(digest(folder))
        (folder / "notes.jsonl").write_text("{}", encoding="utf-8")
        assert digest(folder) == digests[-1]
    assert digests[0] != digests[1]


WRONG = {
    "is no mixture": {"weights": 1},
    "part 1": {"parts": [{"weight": 2}]},
    "part 2": {"parts": [{"data": "one/a.json"}, {"data": "two/b.jsonl", "weight": 1, "count": 1}]},
    "'wieght'": {"parts": [{"data": "one/a.json", "wieght": 1}]},
    "above 0": {"parts": [{"data": "one/a.json", "count": 0}]},
    "whole number": {"parts": [{"data": "one/a.json", "count": 1.5}]},
    "above 0.": {"parts": [{"data": "one/a.json", "weight": float("inf")}]},
    "mixture.yaml: seed is 'a'; it must be a whole": {"parts": [{"data": "one/a.json"}], "seed": "a"},
    "mixture.yaml: seed is -1": {"parts": [{"data": "one/a.json"}], "seed": -1},
    "part 1: seed is 'hello'": {"parts": [{"data": "one/a.json", "seed": "hello"}]},
    "part 1: other.yaml is a mixture, and a part cannot be one": {"parts": [{"data": "other.yaml"}]},
    "cannot be read": {"parts": [{"data": "one/absent.json"}]},
}


@pytest.mark.parametrize(("told", "wrong"), WRONG.items(), ids=WRONG)
def test_a_wrong_mixture_is_an_error_that_says_what_is_wrong(told: str, wrong: dict[str, Any], folder: Path) -> None:
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump(wrong), encoding="utf-8")
    with pytest.raises(DataError, match=told):
        open_data(path)
