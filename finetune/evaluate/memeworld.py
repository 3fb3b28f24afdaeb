"""The memeworld suite: exact match on questions about drawn pictures that training never showed."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from finetune.memeworld import talk
from finetune.memeworld.draw import draw
from finetune.memeworld.world import Scene, make_scene
from llava_app.conversation import Conversation
from llava_app.engine import Engine, Sampling
from llava_app.images import Picture, open_image

GREEDY = Sampling(temperature=0, max_new_tokens=96)
AT_ONCE = 8  # questions that an engine answers together
SWAP = 7  # with pictures swapped, question i is asked about picture i + SWAP


@dataclass(frozen=True)
class Question:
    """One question of the suite: what is asked, and every answer that counts as right."""

    kind: str
    conversation: Conversation
    right: frozenset[str]


@dataclass(frozen=True)
class Result:
    """One answered question."""

    question: Question
    answer: str

    @property
    def is_right(self) -> bool:
        return self.answer in self.question.right


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


def suite(split: str, index: int, shown: Picture) -> Question:
    """A question phrased as in training."""
    exchange = talk.suite_question(split, index, make_scene(split, index))
    return Question(exchange.kind, Conversation().ask(exchange.question, [shown]), frozenset([exchange.answer]))


def unseen(split: str, index: int, shown: Picture) -> Question:
    """A question in a phrasing that training never produced; any answer that says what was asked for is right."""
    scene = make_scene(split, index)
    exchange = talk.unseen_question(index, scene)
    right = {exchange.answer} | {accept(scene) for accept in ALSO_RIGHT.get(exchange.kind, ())}
    return Question(exchange.kind, Conversation().ask(exchange.question, [shown]), frozenset(right))


def captions(split: str, index: int, shown: Picture) -> Question:
    """No question: the caption that stage 1 learns. The things and the place must be right, then the text as well."""
    return Question("caption", Conversation().ask("", [shown]), frozenset([talk.caption(make_scene(split, index))]))


def described(split: str, index: int, shown: Picture) -> Question:
    """The suite's question without a picture, its scene told in words: for a language model that has no eyes yet."""
    scene = make_scene(split, index)
    exchange = talk.suite_question(split, index, scene)
    told = f"{talk.description(scene)}\n{exchange.question}"
    return Question(exchange.kind, Conversation().ask(told), frozenset([exchange.answer]))


# What else says the same in substance: no joke is no joke in whichever words, a description names what is there.
ALSO_RIGHT: dict[str, tuple[Callable[[Scene], str], ...]] = {
    "what": (talk.description, talk.caption),
    "describe": (talk.caption,),
    "funny": (talk.joke_answer,),
}
ASKING: dict[str, Callable[[str, int, Picture], Question]] = {
    "suite": suite,
    "unseen": unseen,
    "captions": captions,
    "described": described,
}


def ask_all(engine: Engine, *, asking: str, split: str, limit: int, swap_pictures: bool = False) -> Iterator[Result]:
    """Ask `limit` questions of a split, greedily, one conversation each, several at once."""

    def ask(index: int) -> Result:
        shown = picture_of(split, index + SWAP if swap_pictures else index)
        question = ASKING[asking](split, index, shown)
        answer = "".join(piece.text for piece in engine.answer(question.conversation, GREEDY))
        return Result(question, answer.strip())

    with ThreadPoolExecutor(AT_ONCE) as people:
        yield from people.map(ask, range(limit))


def score(results: list[Result]) -> Score:
    """The share of right answers, by kind and over all."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for result in results:
        by_kind[result.question.kind].append(result.is_right)
    return Score(
        accuracy=sum(result.is_right for result in results) / len(results),
        count=len(results),
        by_kind={kind: sum(hits) / len(hits) for kind, hits in sorted(by_kind.items())},
    )
