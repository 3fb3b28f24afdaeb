import json
from pathlib import Path

import pytest

from finetune.instruct.context import Box, Context, read_contexts, write_contexts
from finetune.instruct.dialogue import KINDS
from finetune.instruct.drawn import draw_pictures, drawn_contexts
from finetune.instruct.objects import Lexicon, plural, read_lexicon
from finetune.instruct.prompts import PROMPTS, read_domain
from finetune.memeworld.draw import boxes, label
from finetune.memeworld.world import make_scene
from llava_app.errors import DataError

CAT = Context("7", "cat.jpg", ("A cat sleeps.", "A grey cat."), (Box("cat", (0.1, 0.25, 0.5, 1.0)),))


def written(tmp_path: Path, *rows: object) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def test_the_text_is_captions_then_a_line_per_box() -> None:
    assert CAT.text() == "A cat sleeps.\nA grey cat.\n\ncat: [0.100, 0.250, 0.500, 1.000]"


def test_further_context_follows() -> None:
    told = Context("1", "a.jpg", ("A sign.",), ocr=("STOP",), tags=("street", "day"), metadata="Oslo, 1999")
    assert told.text() == "A sign.\n\nText in the picture:\nSTOP\n\nTags: street, day\n\nMetadata: Oslo, 1999"


def test_contexts_are_read_as_they_were_written(tmp_path: Path) -> None:
    told = [CAT, Context("8", "b.jpg", boxes=(Box("dog", (0.0, 0.0, 1.0, 1.0), crowd=True),), ocr=("ÄÖ",), tags=("x",))]
    write_contexts(tmp_path / "c.jsonl", told)
    assert read_contexts([tmp_path / "c.jsonl"]) == told


def test_a_further_field_can_be_the_metadata(tmp_path: Path) -> None:
    file = written(tmp_path, {"image": "a.jpg", "captions": ["A."], "sensor": "Sentinel-2"})
    assert read_contexts([file], metadata="sensor")[0].metadata == "Sentinel-2"
    with pytest.raises(DataError, match=r"line 1: no 'scale'"):
        read_contexts([file], metadata="scale")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"captions": ["A."]}, "no 'image'"),
        ({"image": "a.jpg", "captions": "A."}, "captions is"),
        ({"image": "a.jpg", "instances": [{"category": "cat", "bbox": [10, 20, 30, 40]}]}, "between 0 and 1"),
        ({"image": "a.jpg", "instances": [{"category": "cat", "bbox": [0.5, 0.2, 0.3, 0.4]}]}, "between 0 and 1"),
        ({"image": "a.jpg", "instances": [{"category": "cat", "bbox": [0.5]}]}, "line 2"),
        ("text", "line 2"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, row: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_contexts([written(tmp_path, {"image": "b.jpg"}, row)])


def test_an_id_twice_and_no_picture_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="7 is there twice"):
        read_contexts([written(tmp_path, {"id": "7", "image": "a.jpg"}, {"id": "7", "image": "b.jpg"})])
    with pytest.raises(DataError, match="No picture"):
        read_contexts([written(tmp_path)])
    with pytest.raises(DataError, match="cannot be read"):
        read_contexts([tmp_path / "none.jsonl"])


def test_coco_captions_and_instances_are_joined(tmp_path: Path) -> None:
    images = [
        {"id": 7, "file_name": "7.jpg", "width": 200, "height": 100},
        {"id": 8, "file_name": "8.jpg", "width": 10, "height": 10},
        {"id": 9, "file_name": "9.jpg", "width": 10, "height": 10},
    ]
    captions = {"images": images, "annotations": [{"image_id": 7, "caption": "A cat\n sleeps. "}]}
    found = [
        {"image_id": 7, "category_id": 3, "bbox": [20, 25, 80, 75], "iscrowd": 0},
        {"image_id": 8, "category_id": 3, "bbox": [0, 0, 10.01, 5], "iscrowd": 1},
    ]
    instances = {"images": images, "annotations": found, "categories": [{"id": 3, "name": "cat"}]}
    files = [tmp_path / "captions_val2017.json", tmp_path / "instances_val2017.json"]
    for file, content in zip(files, (captions, instances), strict=True):
        file.write_text(json.dumps(content), encoding="utf-8")
    assert read_contexts(files) == [
        Context("7", "7.jpg", ("A cat sleeps.",), (Box("cat", (0.1, 0.25, 0.5, 1.0)),)),
        Context("8", "8.jpg", (), (Box("cat", (0.0, 0.0, 1.0, 0.5), crowd=True),)),
    ]
    assert read_contexts(files[:1]) == [Context("7", "7.jpg", ("A cat sleeps.",))]
    (tmp_path / "other.json").write_text('{"a": 1}', encoding="utf-8")
    with pytest.raises(DataError, match="no COCO annotation file"):
        read_contexts([tmp_path / "other.json"])


def test_drawn_boxes_lie_where_the_labels_say() -> None:
    for index in range(40):
        scene = make_scene("train", index)
        kinds = label(scene, index).kind.reshape(8, 8)
        for x1, y1, x2, y2 in boxes(scene, index):
            assert 0 <= x1 < x2 <= 1
            assert 0 <= y1 < y2 <= 1
            assert kinds[int((y1 + y2) * 4), int((x1 + x2) * 4)] > 0


def test_a_drawn_context_names_its_things_and_its_text(tmp_path: Path) -> None:
    contexts = drawn_contexts(5)
    draw_pictures(tmp_path, 5)
    scenes = [make_scene("train", index) for index in range(5)]
    assert [len(context.boxes) for context in contexts] == [len(scene.things) for scene in scenes]
    assert [context.ocr for context in contexts] == [tuple(filter(None, scene.lines())) for scene in scenes]
    assert all((tmp_path / context.image).exists() for context in contexts)


@pytest.mark.parametrize("name", sorted(path.name for path in PROMPTS.iterdir()))
def test_every_shipped_domain_is_whole(name: str) -> None:
    domain = read_domain(name)
    assert {"conversation", "detail"} <= set(domain.openings)
    for kind in domain.openings:
        messages = domain.messages(kind, CAT)
        assert [message["role"] for message in messages[:2]] == ["system", "user"]
        assert messages[-1] == {"role": "user", "content": CAT.text()}
        assert len(domain.version(kind)) == 12
    assert domain.detail_question(CAT) in domain.detail_questions
    assert domain.lexicon.words


def test_a_domain_of_ones_own_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no domain"):
        read_domain(str(tmp_path))
    (tmp_path / "conversation.md").write_text("Talk about leaves.", encoding="utf-8")
    domain = read_domain(str(tmp_path))
    assert [message["content"] for message in domain.messages("conversation", CAT)] == [
        "Talk about leaves.",
        CAT.text(),
    ]
    with pytest.raises(DataError, match=r"no detail\.md"):
        domain.messages("detail", CAT)
    before = domain.version("conversation")
    (tmp_path / "conversation.examples.md").write_text("### Context\nA.\n### Reply\nB.\n", encoding="utf-8")
    domain = read_domain(str(tmp_path))
    assert [message["role"] for message in domain.messages("conversation", CAT)] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert domain.version("conversation") != before
    (tmp_path / "conversation.examples.md").write_text("### Context\nA.\n", encoding="utf-8")
    with pytest.raises(DataError, match="in turn"):
        read_domain(str(tmp_path))


def test_the_worked_examples_pass_our_own_filters() -> None:
    from finetune.instruct.export import read_dialogue
    from finetune.instruct.filters import refusal

    for name in sorted(path.name for path in PROMPTS.iterdir()):
        domain = read_domain(name)
        for kind in KINDS:
            examples = domain.openings.get(kind, [])[1:]
            for told, reply in zip(examples[::2], examples[1::2], strict=True):
                known = domain.lexicon.things(told["content"])
                dialogue = read_dialogue(reply["content"], kind, "Describe it.")
                assert refusal(dialogue, kind, "stop", known=known, lexicon=domain.lexicon) is None, reply


def test_the_longest_word_counts() -> None:
    lexicon = read_domain("general").lexicon
    assert lexicon.things("A hot dog and two teddy bears on an orange couch") == {"hot dog", "teddy bear", "couch"}
    assert lexicon.things("Women with oranges") == {"person", "orange"}
    assert [mention.plural for mention in lexicon.mentions("a man, two men, people, a bus, buses")] == [
        False, True, True, False, True,
    ]  # fmt: skip


def test_boxes_may_name_what_no_file_lists(tmp_path: Path) -> None:
    lexicon = read_lexicon(tmp_path / "none.txt")
    assert lexicon == Lexicon({}, {})
    assert lexicon.things("a rocket") == set()
    assert lexicon.also(["Rocket"]).things("Two rockets") == {"rocket"}


def test_plurals() -> None:
    known = {
        "bus": "buses",
        "baby": "babies",
        "toy": "toys",
        "wine glass": "wine glasses",
        "bench": "benches",
        "box": "boxes",
    }
    for singular, many in known.items():
        assert plural(singular) == many
