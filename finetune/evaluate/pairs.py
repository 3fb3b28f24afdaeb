"""The memeworld suite about two pictures: exact match on pairs that training never showed."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from finetune.evaluate.memeworld import AT_ONCE, GREEDY, SWAP, Question, Result, as_upload
from finetune.memeworld.pairs import make_pair
from llava_app.conversation import Conversation
from llava_app.engine import Engine


def pair_question(split: str, index: int, *, shown: int) -> Question:
    """The question with number `index`, asked about the pictures of pair `shown`."""
    pair = make_pair(split, index)
    drawn = make_pair(split, shown).pictures()
    pictures = [as_upload(picture, f"{split}-{shown}-{place}.png") for place, picture in enumerate(drawn, start=1)]
    return Question(pair.kind, Conversation().ask(pair.question, pictures), frozenset([pair.answer]))


def ask_pairs(engine: Engine, *, split: str, limit: int, swap_pictures: bool = False) -> Iterator[Result]:
    """Ask `limit` questions of a split, greedily, one conversation each, several at once."""

    def ask(index: int) -> Result:
        question = pair_question(split, index, shown=index + 2 * SWAP if swap_pictures else index)
        answer = "".join(piece.text for piece in engine.answer(question.conversation, GREEDY))
        return Result(question, answer.strip())

    with ThreadPoolExecutor(AT_ONCE) as people:
        yield from people.map(ask, range(limit))
