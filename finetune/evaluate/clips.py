"""The memeworld suite about clips: exact match on clips that training never showed, opened as an upload is."""

from functools import partial

from finetune.evaluate.memeworld import SWAP
from finetune.evaluate.results import Question
from finetune.memeworld.clips import make_clip
from llava_app.video import Clip, open_clip


def questions(*, split: str, limit: int, swap_pictures: bool = False) -> list[Question]:
    """The first `limit` questions of a split, each about its own clip or, swapped, about another one."""
    offset = SWAP if swap_pictures else 0
    return [_question(split, index, shown=index + offset) for index in range(limit)]


def _question(split: str, index: int, *, shown: int) -> Question:
    clip = make_clip(split, index)
    way = clip.answer.removesuffix(".").split()[-1]
    return Question(f"{split}-clip-{index}", way, clip.question, (partial(_clip, split, shown),), (clip.answer,))


def _clip(split: str, index: int) -> Clip:
    return open_clip(make_clip(split, index).gif(), f"{split}-{index}.gif")
