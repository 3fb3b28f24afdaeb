"""The memeworld suite: exact match on questions about drawn pictures that training never showed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

from PIL import Image

from finetune.evaluate.asking import ask_all as answers
from finetune.evaluate.results import Question, Result, Show, Suite, by_category, each
from finetune.memeworld import talk
from finetune.memeworld.draw import draw
from finetune.memeworld.world import Scene, make_scene
from llava_app.engine import Engine, Sampling
from llava_app.images import Picture, open_image

GREEDY = Sampling(temperature=0, max_new_tokens=96)
SWAP = 7  # with pictures swapped, question i is asked about picture i + SWAP
REFUSALS = (talk.NO_PERSON, talk.NO_MIND, talk.NO_PICTURE, talk.NOT_MINE)


@dataclass(frozen=True)
class Score:
    """Shares of right answers, over all questions and by kind."""

    accuracy: float
    count: int
    by_kind: dict[str, float]


def picture_of(split: str, index: int) -> Picture:
    """The picture with this number in a split."""
    return as_upload(draw(make_scene(split, index), index), f"{split}-{index}.png")


def as_upload(image: Image.Image, name: str) -> Picture:
    """A picture by way of a file's bytes, as an upload comes."""
    file = BytesIO()
    image.save(file, "PNG")
    return open_image(file.getvalue(), name)


Shows = tuple[Show, ...]
Asking = Callable[[str, int, Shows], Question]


def suite_question(split: str, index: int, shows: Shows) -> Question:
    """A question phrased as in training."""
    exchange = talk.suite_question(split, index, make_scene(split, index))
    return Question(_name(split, index), exchange.kind, exchange.question, shows, (exchange.answer,))


def unseen(split: str, index: int, shows: Shows) -> Question:
    """A question in a phrasing that training never produced; any answer that says what was asked for is right."""
    scene = make_scene(split, index)
    exchange = talk.unseen_question(index, scene)
    right = {exchange.answer: None} | {accept(scene): None for accept in ALSO_RIGHT.get(exchange.kind, ())}
    return Question(_name(split, index), exchange.kind, exchange.question, shows, tuple(right))


def captions(split: str, index: int, shows: Shows) -> Question:
    """No question: the caption that stage 1 learns. The things and the place must be right, then the text as well."""
    return Question(_name(split, index), "caption", "", shows, (talk.caption(make_scene(split, index)),))


def described(split: str, index: int, _: Shows) -> Question:
    """The suite's question without a picture, its scene told in words: for a language model that has no eyes yet."""
    scene = make_scene(split, index)
    exchange = talk.suite_question(split, index, scene)
    told = f"{talk.description(scene)}\n{exchange.question}"
    return Question(_name(split, index), exchange.kind, told, right=(exchange.answer,))


def unshown(split: str, index: int, _: Shows) -> Question:
    """The suite's question with nothing to look at: right is to say so, or to refuse what is always refused."""
    exchange = talk.suite_question(split, index, make_scene(split, index))
    right = (talk.NO_PICTURE, exchange.answer) if exchange.kind == "refusal" else (talk.NO_PICTURE,)
    return Question(_name(split, index), exchange.kind, exchange.question, right=right)


# What else says the same in substance: no joke is no joke in whichever words, a description names what is there.
ALSO_RIGHT: dict[str, tuple[Callable[[Scene], str], ...]] = {
    "what": (talk.description, talk.caption),
    "describe": (talk.caption,),
    "funny": (talk.joke_answer,),
}
ASKING: dict[str, Asking] = {
    "suite": suite_question,
    "unseen": unseen,
    "captions": captions,
    "described": described,
    "unshown": unshown,
}


def questions(*, asking: str, split: str, limit: int, swap_pictures: bool = False) -> list[Question]:
    """The first `limit` questions of a split, each about its own picture or, swapped, about another one."""
    offset = SWAP if swap_pictures else 0
    return [ASKING[asking](split, index, (partial(picture_of, split, index + offset),)) for index in range(limit)]


def suite(name: str, asked: list[Question]) -> Suite:
    """Exact match with what training would have answered."""
    return Suite(name, "right", asked, mark, GREEDY, calibration)


def ask_all(engine: Engine, *, asking: str, split: str, limit: int, swap_pictures: bool = False) -> Iterator[Result]:
    """Ask the questions, greedily, one conversation each, several at once."""
    asked = questions(asking=asking, split=split, limit=limit, swap_pictures=swap_pictures)
    for answer in answers(engine, asked, GREEDY):
        yield from mark([answer])


mark = each(lambda question, text: text in question.right)


def calibration(results: list[Result]) -> dict[str, dict[str, Any]]:
    """How often it refuses, and how often it says that something is not there: where it should and where it should not.

    A refusal is one of the four sentences that training taught for that; a denial begins with “No”, and is looked at
    where “yes” or “no” is right.
    """
    denials = [result for result in results if set(map(_first_word, result.question.right)) <= {"Yes", "No"}]
    return {
        "Refusals": _rates(results, "refused", lambda text: text in REFUSALS),
        "Denials": _rates(denials, "said no", lambda text: _first_word(text) == "No"),
    }


def _rates(results: list[Result], name: str, does: Callable[[str], bool]) -> dict[str, Any]:
    """Per cent of the answers that do what every right answer does, and of those that do what no right answer does."""
    counted = [result for result in results if result.points is not None]
    due = [does(result.answer) for result in counted if all(map(does, result.question.right))]
    undue = [does(result.answer) for result in counted if not any(map(does, result.question.right))]
    return {
        f"{name} where it should": 100 * sum(due) / len(due) if due else None,
        "of questions": len(due),
        f"{name} where it should not": 100 * sum(undue) / len(undue) if undue else None,
        "of other questions": len(undue),
    }


def _first_word(text: str) -> str:
    return text.partition(",")[0].strip()


def score(results: list[Result]) -> Score:
    """The share of right answers, by kind and over all."""
    hits = [result.points == 1 for result in results]
    kinds = by_category(results)
    return Score(
        accuracy=sum(hits) / len(hits),
        count=len(hits),
        by_kind={kind: sum(result.points == 1 for result in some) / len(some) for kind, some in kinds.items()},
    )


def _name(split: str, index: int) -> str:
    return f"{split}-{index}"
