import hashlib
import json
import shutil
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import ProcessorMixin

import finetune.data
from finetune.data import Checked, Examples, check, read_records
from finetune.data.pictures import open_picture
from finetune.recipe import Recipe, load_recipe
from llava_app.checkpoints import read_card
from llava_app.errors import DataError
from llava_app.loading import load
from tests.finetune.conftest import record

RECIPE = load_recipe("memeworld_instruct")


@pytest.fixture(scope="module")
def processor(base: Path) -> ProcessorMixin:
    return load(read_card(base), "float32").processor


def write(folder: Path, *records: object) -> Path:
    path = folder / "mine.json"
    path.write_text(json.dumps(list(records)), encoding="utf-8")
    return path


def checked(
    file: Path, processor: ProcessorMixin, *, root: Path | None = None, recipe: Recipe = RECIPE, allow: float = 1.0
) -> Checked:
    return check(file, root or file.parent, processor, recipe=recipe, allow_refused=allow)


def test_good_records_all_become_examples(data: Path, processor: ProcessorMixin) -> None:
    result = checked(data, processor, allow=0)
    assert len(result.examples) == 20
    assert result.refused == {}
    assert result.sha256 == hashlib.sha256(data.read_bytes()).hexdigest()


def test_json_lines_are_read_like_a_json_list(data: Path, tmp_path: Path) -> None:
    records = read_records(data)
    lines = tmp_path / "records.jsonl"
    text = "\n\n".join(json.dumps(record | {"note": "a\u2028b"}, ensure_ascii=False) for record in records)
    lines.write_text(text, encoding="utf-8")
    assert [record["id"] for record in read_records(lines)] == [record["id"] for record in records]


WRONG = {
    "not an object": "words",
    'no "conversations"': {"id": "a"},
    'no text in "value"': {"id": "a", "conversations": [{"from": "human"}]},
    'must be from "human"': {"id": "a", "conversations": [{"from": "gpt", "value": "Hello."}]},
    "has no answer": {"id": "a", "conversations": [{"from": "human", "value": "Hello?"}]},
    "hold N <image> but there are N pictures": record("a", ["<image> and <image>", "Two."], ["0.png"]),
    "an empty answer": record("a", ["Hello?", "  "]),
    "an image that is not a file name": {**record("a", ["Hello?", "Yes."]), "image": 7},
    "a picture that cannot be opened": record("a", ["Who?", "Nobody."], ["absent.png"]),
}


@pytest.mark.parametrize(("reason", "wrong"), WRONG.items(), ids=WRONG)
def test_a_wrong_record_is_refused_and_counted_by_its_reason(
    reason: str, wrong: object, data: Path, tmp_path: Path, processor: ProcessorMixin
) -> None:
    good = record("good", ["Which colour?", "Red."], ["0.png"])
    result = checked(write(tmp_path, wrong, good, wrong), processor, root=data.parent)
    assert [example.record["id"] for example in result.examples] == ["good"]
    (told, count), *others = result.refused.items()
    assert (reason in told, count, others) == (True, 2, [])


def test_a_file_that_is_no_picture_is_refused(data: Path, tmp_path: Path, processor: ProcessorMixin) -> None:
    (tmp_path / "text.png").write_text("words", encoding="utf-8")
    file = write(tmp_path, record("a", ["What?", "Text."], ["text.png"]), record("b", ["Hello?", "Hello."]))
    result = checked(file, processor)
    assert list(result.refused) == ["a picture that cannot be opened"]
    assert "text.png" in result.describe()


def test_more_refused_than_allowed_stops_and_says_how_to_allow_it(tmp_path: Path, processor: ProcessorMixin) -> None:
    good, wrong = record("good", ["Hello?", "Hello."]), record("empty", ["Hello?", ""])
    file = write(tmp_path, *[good] * 97, *[wrong] * 3)
    with pytest.raises(DataError, match=r"3 of 100 .* more than 1\.0%.*--allow-refused 0\.03"):
        checked(file, processor, allow=0.01)
    assert len(checked(file, processor, allow=0.03).examples) == 97


def test_nothing_left_to_learn_from_is_an_error_even_when_refusals_are_allowed(
    tmp_path: Path, processor: ProcessorMixin
) -> None:
    with pytest.raises(DataError, match="Nothing to learn from"):
        checked(write(tmp_path, record("a", ["Hello?", ""])), processor)


def test_alignment_refuses_texts_without_a_picture(data: Path, processor: ProcessorMixin) -> None:
    result = checked(data, processor, recipe=load_recipe("memeworld_align"))
    assert len(result.examples) == 16
    assert list(result.refused.values()) == [4]


def test_a_record_without_an_answer_within_max_length_is_refused(tmp_path: Path, processor: ProcessorMixin) -> None:
    short, long = record("short", ["Hi?", "Hi."]), record("long", ["Why? " * 200, "Because."])
    result = checked(write(tmp_path, short, long), processor)
    assert [example.record["id"] for example in result.examples] == ["short"]
    assert list(result.refused) == ["no answer within 512 tokens (max_length)"]


def test_a_record_whose_later_picture_would_be_cut_off_is_refused(
    data: Path, tmp_path: Path, processor: ProcessorMixin
) -> None:
    late = record("late", ["Hi?", "Hi. " * 150, "<image>\nAnd this?", "Red."]) | {"image": "0.png"}
    assert list(checked(write(tmp_path, late, record("a", ["Hi?", "Hi."])), processor, root=data.parent).refused)


def test_long_dialogues_are_cut_to_max_length(tmp_path: Path, processor: ProcessorMixin) -> None:
    file = write(tmp_path, record("long", ["Hi?", "Hello there. " * 100]))
    examples = Examples(checked(file, processor).examples, processor, max_length=RECIPE.max_length)
    assert len(examples[0].input_ids) == len(examples[0].supervised) == RECIPE.max_length
    assert examples[0].supervised.any()


def test_examples_open_their_pictures_when_asked_for(data: Path, processor: ProcessorMixin) -> None:
    examples = Examples(checked(data, processor).examples, processor, max_length=512)
    encoded = examples[0]
    assert encoded.pixel_values is not None
    assert encoded.pixel_values.shape == (1, 3, 28, 28)
    assert int((encoded.input_ids == processor.image_token_id).sum()) == 4
    assert examples[19].pixel_values is None


def test_longer_records_have_greater_lengths(data: Path, processor: ProcessorMixin) -> None:
    result = checked(data, processor)
    examples = Examples(result.examples, processor, max_length=512)
    lengths = [(example.length, len(examples[place].input_ids)) for place, example in enumerate(result.examples[:16])]
    assert max(lengths)[1] == max(length for _, length in lengths)


@pytest.mark.parametrize("text", ["[{", '{"id": 1}\n{"id": ', "words"])
def test_a_file_that_is_not_json_is_an_error_with_its_place(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"broken\.json.*(line \d|column \d)"):
        read_records(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        read_records(tmp_path / "none.json")


def test_every_picture_is_opened_once(
    data: Path, tmp_path: Path, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    monkeypatch.setattr(finetune.data, "open_picture", lambda place: opened.append(place) or open_picture(place))
    file = write(tmp_path, *[record(str(n), ["Which colour?", "Red."], ["0.png"]) for n in range(5)])
    result = check(file, data.parent, processor, recipe=replace(RECIPE, max_length=300))
    assert (len(result.examples), len(opened)) == (5, 1)


def test_of_many_pictures_a_share_is_opened_and_that_is_said(
    data: Path, tmp_path: Path, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune.data, "MOST_OPENED", 4)
    file = write(tmp_path, *[record(str(n), ["Which colour?", "Red."], [f"{n}.png"]) for n in range(16)])
    result = checked(file, processor, root=data.parent)
    assert (len(result.examples), result.opened) == (16, 4)
    assert "the pictures of 4 examples were opened" in result.describe()
    with pytest.raises(DataError, match=r"4 of 16 records .*--allow-refused 1\.0"):
        checked(file, processor, root=tmp_path, allow=0.9)


def test_a_line_that_is_not_json_is_refused_with_its_place(tmp_path: Path, processor: ProcessorMixin) -> None:
    path = tmp_path / "lines.jsonl"
    good = json.dumps(record("a", ["Hi?", "Hi."]))
    path.write_text(f"{good}\n\n{{broken\n{good}", encoding="utf-8")
    result = checked(path, processor)
    assert len(result.examples) == 2
    assert result.refused == {"not JSON": 1}
    assert "line 3" in result.first["not JSON"]


def test_examples_can_be_cut_and_chosen(data: Path, processor: ProcessorMixin) -> None:
    examples = checked(data, processor).examples
    chosen = examples[np.array([3, 17])]
    assert [example.record["id"] for example in chosen] == ["seen 3", "text 1"]
    assert [example.record["id"] for example in examples[18:]] == ["text 2", "text 3"]
    assert chosen.pictured.tolist() == [True, False]
    assert examples[-1].record["id"] == "text 3"


class Unreadable:
    """Twenty examples whose pictures are taken away one by one, as a disk that fails."""

    def __init__(
        self, data: Path, folder: Path, processor: ProcessorMixin, *, allowed: float, held_out: tuple[int, ...] = ()
    ) -> None:
        self.folder = folder
        for place in range(20):
            shutil.copy(data.parent / "0.png", folder / f"{place}.png")
        records = [record(str(n), ["Which colour?", f"Red {n}."], [f"{n}.png"]) for n in range(20)]
        result = checked(write(folder, *records, record("text", ["Hi?", "Hi."])), processor)
        learned = [number for number in range(21) if number not in held_out]
        self.examples = Examples(result.examples, processor, max_length=512, allowed=allowed, learned=learned)

    def lose(self, *numbers: int) -> None:
        for number in numbers:
            (self.folder / f"{number}.png").unlink()

    def answer(self, number: int) -> str:
        encoded = self.examples[number]
        return self.examples.processor.tokenizer.decode(encoded.input_ids[encoded.supervised])


def test_a_picture_that_cannot_be_read_is_skipped_and_counted_once(
    data: Path, tmp_path: Path, processor: ProcessorMixin, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Unreadable(data, tmp_path, processor, allowed=0.2)
    broken.lose(3, 4, 19)
    assert [broken.answer(number) for number in (2, 3, 3, 4)] == [f" Red {n}.</s>" for n in (2, 5, 5, 5)]
    assert broken.answer(19) == " Red 0.</s>"  # not the text, which is of another kind
    assert broken.examples.skipped == 3
    assert caplog.text.count("Skipped") == 3


def test_a_held_out_example_never_stands_in_for_another(data: Path, tmp_path: Path, processor: ProcessorMixin) -> None:
    broken = Unreadable(data, tmp_path, processor, allowed=0.2, held_out=(4, 5))
    broken.lose(3, 5)
    assert broken.answer(3) == " Red 6.</s>"
    assert [len(broken.examples.readable(places)) for places in ((4,), (4, 5), (5,))] == [1, 1, 0]  # nor it another one
    assert broken.examples.skipped == 2


def test_a_run_that_goes_on_has_the_examples_it_had(data: Path, tmp_path: Path, processor: ProcessorMixin) -> None:
    broken = Unreadable(data, tmp_path, processor, allowed=0.2)
    file = tmp_path / "mine.json"
    broken.lose(3)
    first = checked(file, processor)
    assert (first.unopened, len(first.examples)) == ([3], 20)
    shutil.copy(data.parent / "0.png", tmp_path / "3.png")
    broken.lose(5)
    again = check(file, tmp_path, processor, recipe=RECIPE, allow_refused=1.0, unopened=first.unopened)
    assert again.summary() == first.summary()
    assert [one.record["id"] for one in again.examples] == [one.record["id"] for one in first.examples]
    assert check(
        write(tmp_path, record("a", ["Hi?", "Hi."])), tmp_path, processor, recipe=RECIPE, unopened=[3]
    ).examples


def test_too_many_pictures_that_cannot_be_read_stop_the_run(
    data: Path, tmp_path: Path, processor: ProcessorMixin
) -> None:
    broken = Unreadable(data, tmp_path, processor, allowed=0.1)
    broken.lose(0, 1, 2)
    with pytest.raises(DataError, match=r"3 of 21 examples cannot be read, more than 10\.0%"):
        broken.answer(0)


def test_what_the_loaders_processes_skip_is_counted_and_stops_without_a_trace(
    data: Path, tmp_path: Path, processor: ProcessorMixin
) -> None:
    broken = Unreadable(data, tmp_path, processor, allowed=0.1)
    broken.lose(0, 5)
    loader = DataLoader(broken.examples, batch_size=7, collate_fn=list, num_workers=1)
    assert sum(len(step) for step in broken.examples.watch(loader)) == 21
    assert broken.examples.skipped == 2
    broken.lose(9)
    with pytest.raises(DataError) as caught:
        list(broken.examples.watch(loader))
    assert str(caught.value).startswith("The pictures of 3 of 21 examples cannot be read")
    assert "Traceback" not in str(caught.value)
    assert not active_children()  # else the program would never end


def test_what_other_processes_skip_counts_too_but_once(data: Path, tmp_path: Path, processor: ProcessorMixin) -> None:
    broken = Unreadable(data, tmp_path, processor, allowed=0.1)
    broken.lose(0, 5)
    broken.answer(0)
    two = Two(theirs={0, 5})
    broken.examples.unite(3, two)
    assert broken.examples.skipped == 2
    broken.examples.unite(4, two)  # both know all
    assert two.asked == 1
    two.theirs.add(9)
    with pytest.raises(DataError, match="3 of 21 examples cannot be read"):
        broken.examples.unite(5, two)


class Two:
    """Of two processes, this one, and what the other one skipped."""

    num_processes = 2
    device = torch.device("cpu")

    def __init__(self, theirs: set[int]) -> None:
        self.theirs = theirs
        self.asked = 0

    def reduce(self, mine: torch.Tensor, how: str) -> torch.Tensor:
        self.asked += 1
        return mine + torch.tensor([number in self.theirs for number in range(len(mine))])
