"""The memeworld suite about two pictures: exact match on pairs that training never showed."""

from functools import partial

from finetune.evaluate.memeworld import SWAP, as_upload
from finetune.evaluate.results import Question
from finetune.memeworld.pairs import make_pair
from llava_app.images import Picture


def questions(*, split: str, limit: int, swap_pictures: bool = False) -> list[Question]:
    """The first `limit` questions of a split, each about its own two pictures or, swapped, about those of another."""
    offset = 2 * SWAP if swap_pictures else 0
    return [_question(split, index, shown=index + offset) for index in range(limit)]


def _question(split: str, index: int, *, shown: int) -> Question:
    pair = make_pair(split, index)
    shows = tuple(partial(_picture, split, shown, place) for place in range(2))
    return Question(f"{split}-pair-{index}", pair.kind, pair.question, shows, (pair.answer,))


def _picture(split: str, index: int, place: int) -> Picture:
    return as_upload(make_pair(split, index).pictures()[place], f"{split}-{index}-{place + 1}.png")
