"""Questions → a model's answers, through the same engine as the page, several at once, none asked twice."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from finetune.evaluate.ledger import Ledger, key_of
from finetune.evaluate.results import Answer, Question
from llava_app.checkpoints import Card
from llava_app.conversation import Conversation
from llava_app.engine import Engine, Sampling
from llava_app.errors import BusyError, ContextError, ImageError

AT_ONCE = 8  # questions that an engine answers together


def ask_all(
    engine: Engine, questions: Sequence[Question], sampling: Sampling, *, ledger: Ledger | None = None, model: str = ""
) -> Iterator[Answer]:
    """The answers in the order of the questions, each one conversation of one turn.

    What `ledger` holds an answer to is not asked again: the same `model`, sampling, text and picture. A question that
    is too long for the model, or whose picture cannot be opened, has a problem instead of an answer.
    """

    def ask(question: Question) -> Answer:
        try:
            conversation = Conversation().ask(question.text, question.pictures())
            return Answer(question, _answer(engine, conversation, sampling, ledger=ledger, model=model))
        except (ContextError, ImageError) as error:
            return Answer(question, problem=str(error))

    with ThreadPoolExecutor(AT_ONCE) as people:
        yield from people.map(ask, questions)


def identity(card: Card, precision: str) -> str:
    """What tells a model from others: the hashes of its files or, from the Hub, its id; and its precision."""
    return key_of(card.files or [card.source, card.base_revision], precision)


def _answer(
    engine: Engine, conversation: Conversation, sampling: Sampling, *, ledger: Ledger | None, model: str
) -> str:
    turn = conversation.turns[-1]
    key = key_of(model, asdict(sampling), turn.question, [picture.digest for picture in turn.images])
    known = ledger.get(key) if ledger else None
    if known:
        return known["text"]
    pieces = list(engine.answer(conversation, sampling))
    if pieces[-1].finish == "stopped":
        raise BusyError("The model was closed before it had answered. Run the same command again to go on.")
    text = "".join(piece.text for piece in pieces).strip()
    if ledger:
        ledger.add(key, {"question": turn.question, "text": text, "finish": pieces[-1].finish})
    return text
