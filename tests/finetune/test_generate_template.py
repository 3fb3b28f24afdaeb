import os
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.instruct.context import Box, Context, read_contexts
from finetune.instruct.dialogue import Dialogue, parse_dialogue
from finetune.instruct.drawn import drawn_contexts
from finetune.instruct.filters import refusal
from finetune.instruct.objects import NUMBERS, Lexicon, counted, plural
from finetune.instruct.prompts import read_domain
from finetune.instruct.teachers import Task
from finetune.instruct.template import TemplateTeacher
from finetune.memeworld.world import KINDS, make_scene

ROOT = Path(__file__).parents[2]
COCO = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared/data")) / "llava_bench_coco/captions_boxes.jsonl"
CATEGORIES = ("cat", "dog", "bus", "cup", "knife", "kite", "umbrella", "laptop")
LEXICON = read_domain("general").lexicon


@cache
def teacher(categories: tuple[str, ...]) -> TemplateTeacher:
    return TemplateTeacher(LEXICON.also(categories), categories)


def teach(context: Context, kind: str = "conversation", categories: tuple[str, ...] = CATEGORIES) -> str:
    return teacher(categories).ask(Task(context, kind, (), "")).text


def talk(*boxes: Box, captions: tuple[str, ...] = (), ocr: tuple[str, ...] = ()) -> Dialogue:
    return parse_dialogue(teach(Context("1", "a.jpg", captions, boxes, ocr)))


def answers(dialogue: Dialogue) -> str:
    return "\n".join(exchange.answer for exchange in dialogue)


def box(category: str, x: float, y: float, side: float = 0.2) -> Box:
    return Box(category, (x, y, min(1.0, x + side), min(1.0, y + side)))


def assert_true(dialogue: Dialogue, context: Context, lexicon: Lexicon) -> None:
    """Every number, denial, comparison and place of the answers holds for the boxes."""
    by_category: dict[str, list[Box]] = {}
    for found in context.boxes:
        by_category.setdefault(found.category, []).append(found)
    for _, answer in dialogue:
        if number := re.fullmatch(rf"There (?:is|are) ({'|'.join(NUMBERS)}) ([\w ]+)\.", answer):
            assert any(answer[:-1].endswith(counted(len(b), c)) for c, b in by_category.items()), answer
            assert number[1] != "no"
        elif denied := re.fullmatch(r"No, there is no ([\w ]+) in the picture\.", answer):
            assert lexicon.name(denied[1]) not in lexicon.known(context)
        elif larger := re.fullmatch(r"The ([\w ]+) takes up more of the picture than the ([\w ]+)\.", answer):
            big, small = (by_category[category][0].area for category in larger.groups())
            assert big > 2 * small
        elif beside := re.fullmatch(
            r"The ([\w ]+) is (to the left of|to the right of|above|below) the ([\w ]+)\.", answer
        ):
            one, other = (by_category[beside[place]][0].corners for place in (1, 3))
            axis = 0 if "left" in beside[2] or "right" in beside[2] else 1
            first = beside[2] in ("to the left of", "above")
            assert (one[axis] + one[axis + 2] < other[axis] + other[axis + 2]) == first
        elif place := re.fullmatch(r"The ([\w ]+) is ((?:at|on|in) the .*)\.", answer):
            [found] = by_category[place[1]]
            x, y = (found.corners[0] + found.corners[2]) / 2, (found.corners[1] + found.corners[3]) / 2
            assert ("left" in place[2]) <= (x < 0.4)
            assert ("right" in place[2]) <= (x > 0.6)
            assert ("middle" in place[2]) <= (0.35 < x < 0.65)
            assert ("top" in place[2]) <= (y < 0.4)
            assert ("bottom" in place[2]) <= (y > 0.6)
        else:
            assert re.match(r"Yes, there (is|are) |It says ", answer), answer


@st.composite
def contexts(draw: st.DrawFn) -> Context:
    corner = st.integers(0, 100).map(lambda number: number / 100)
    boxes = []
    for category in draw(st.lists(st.sampled_from(CATEGORIES), max_size=9)):
        x, y = sorted(draw(st.tuples(corner, corner))), sorted(draw(st.tuples(corner, corner)))
        boxes.append(Box(category, (x[0], y[0], x[1], y[1]), draw(st.sampled_from([False, False, True]))))
    return Context(str(draw(st.integers(0, 99))), "a.jpg", boxes=tuple(boxes))


@settings(max_examples=60)
@given(contexts())
def test_everything_that_is_said_follows_from_the_boxes(context: Context) -> None:
    dialogue = parse_dialogue(teach(context))
    assert_true(dialogue, context, LEXICON)
    assert dialogue == parse_dialogue(teach(context))
    crowds = {found.category for found in context.boxes if found.crowd}
    assert not [c for c in crowds if re.search(rf"How many {plural(c)}", str(dialogue))]


def test_numbers_places_sizes_and_absence_are_asked() -> None:
    said = answers(
        talk(box("cat", 0.0, 0.4), box("dog", 0.75, 0.7, 0.05), box("cup", 0.1, 0.9, 0.08), box("cup", 0.3, 0.9, 0.08))
    )
    for form in ("There (is|are) (one|two)", r"is (at|on) the", "more of the picture|left of|right of|above|below"):
        assert re.search(form, said), form
    assert "No, there is no" in said
    assert "Yes, there" in said


@pytest.mark.parametrize(
    "caption",
    [
        "Three cats.",
        "Some cats on a bed.",
        "Cats.",
        "A herd of many small cats.",
        "2 cats",
        "Several kittens",
        "no cat",
    ],
)
def test_a_number_that_a_caption_speaks_against_is_not_given(caption: str) -> None:
    assert "There is one cat." in answers(talk(box("cat", 0.4, 0.4), captions=("A cat.",)))
    assert "There is one cat." not in answers(talk(box("cat", 0.4, 0.4), captions=(caption,)))


def test_small_and_many_things_are_not_counted() -> None:
    assert "There are" not in answers(talk(*[box("cup", 0.1 * n, 0.5, 0.09) for n in range(7)]))
    assert "There is one" not in answers(talk(box("cup", 0.5, 0.5, 0.03)))


def test_what_captions_name_and_look_alikes_are_not_denied() -> None:
    denied = [
        exchange.answer
        for number in range(40)
        for exchange in parse_dialogue(
            teach(Context(str(number), "a.jpg", ("A puppy and a selfie.",), (box("cup", 0.4, 0.4),)))
        )
    ]
    assert not re.findall("no (dog|cat|laptop|knife)", "\n".join(denied).replace("no knives", ""))
    assert re.findall("no (bus|kite|umbrella)", "\n".join(denied))


def test_without_boxes_nothing_is_said() -> None:
    assert talk(captions=("A cat.",)) == ()
    assert teach(Context("1", "a.jpg", ("A cat.",)), "detail") == ""


def test_written_text_is_read_out() -> None:
    assert "It says “MY CAT” and “LOL”." in answers(talk(box("cat", 0.4, 0.4), ocr=("MY CAT", "LOL")))


def test_a_description_names_everything() -> None:
    context = Context("1", "a.jpg", ("a cat on a bus",), (box("cat", 0.0, 0.0), box("bus", 0.2, 0.2, 0.6)))
    assert (
        teach(context, "detail")
        == "A cat on a bus. There is a bus and a cat. The bus is in the middle. The cat is at the top left."
    )


@pytest.mark.skipif(not COCO.exists(), reason="no captions_boxes.jsonl (set SHARED_DATA to the folder above it)")
def test_on_real_pictures_nothing_is_refused_but_pictures_without_boxes() -> None:
    told = read_contexts([COCO])
    categories = tuple({found.category for context in told for found in context.boxes})
    lexicon = LEXICON.also(categories)
    reasons: Counter[str] = Counter()
    for context in told:
        dialogue = parse_dialogue(teach(context, categories=categories))
        assert_true(dialogue, context, lexicon)
        found = refusal(dialogue, "conversation", "stop", known=lexicon.known(context), lexicon=lexicon)
        reasons[found.reason if found else "kept"] += 1
    assert reasons == {"kept": 77, "empty": 3}


def test_memeworld_is_told_as_it_was_drawn() -> None:
    lexicon = LEXICON.also(KINDS)
    for index, context in enumerate(drawn_contexts(30)):
        scene = make_scene("train", index)
        dialogue = parse_dialogue(teach(context, categories=KINDS))
        assert_true(dialogue, context, lexicon)
        for question, answer in dialogue:
            for kind in KINDS:
                if re.search(rf"\b{plural(kind)}\b", question) and answer.startswith("There "):
                    assert answer.split()[2] == NUMBERS[len(scene.of_kind(kind))]
                elif answer == f"No, there is no {kind} in the picture.":
                    assert not scene.of_kind(kind)
