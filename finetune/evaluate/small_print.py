"""The memeworld suite about small print: what does the text say, and what is the joke, on larger pictures."""

import random
from functools import partial
from itertools import count, islice

from finetune.evaluate.memeworld import SWAP, as_upload
from finetune.evaluate.results import Question
from finetune.memeworld.small_print import draw_small_print
from finetune.memeworld.talk import ask
from finetune.memeworld.world import make_scene
from llava_app.images import Picture

KINDS = ("text", "joke")  # in turn; the joke needs what is drawn as well


def questions(*, split: str, limit: int, swap_pictures: bool = False) -> list[Question]:
    """The first `limit` questions about pictures with text, each about its own or, swapped, about another one."""
    offset = SWAP if swap_pictures else 0
    written = list(islice((index for index in count() if make_scene(split, index).claim), limit + offset))
    return [_question(split, written[place], place, shown=written[place + offset]) for place in range(limit)]


def _question(split: str, index: int, place: int, *, shown: int) -> Question:
    asked = ask(random.Random(f"small print/{split}/{index}"), make_scene(split, index), KINDS[place % len(KINDS)])
    shows = (partial(_picture, split, shown),)
    return Question(f"{split}-small-print-{index}", asked.kind, asked.question, shows, (asked.answer,))


def _picture(split: str, index: int) -> Picture:
    return as_upload(draw_small_print(make_scene(split, index), index), f"{split}-{index}.png")
