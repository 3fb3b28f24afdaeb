"""The examples that a run does not learn from: how well it does on them, in numbers and in words."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, ProcessorMixin

from finetune.collate import StepCollator
from finetune.data import Examples
from finetune.data.pictures import open_picture
from finetune.supervision import SupervisedLoss
from llava_app.conversation import Conversation, from_record
from llava_app.errors import ImageError
from llava_app.images import Picture
from llava_app.prompts import encode

LEAST_SHARE = 20  # at most one example of so many is held out
QUESTIONS = 3
ANSWER_TOKENS = 48
UNREADABLE = "(its picture cannot be read any more)"


@dataclass(frozen=True)
class Answer:
    """What the model says to the first question of a held-out example."""

    question: str
    answer: str
    wanted: str


@dataclass(frozen=True)
class Evaluation:
    """One line of the log."""

    step: int
    held_out_loss: float  # per supervised token
    answers: list[Answer]


def split(originals: np.ndarray, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """The examples 0…N-1 to learn from, and those held out: `held_out` of them, or one record in LEAST_SHARE.

    `originals` (N,) says which record, 0…R-1, each example is: of a held-out one no copy is learned from, and one is
    measured. Those held out come in the order in which the seed drew them.
    """
    count = int(originals.max(initial=-1)) + 1
    kept = min(held_out, count // LEAST_SHARE)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:kept].numpy()
    first = np.unique(originals, return_index=True)[1]
    return np.flatnonzero(~np.isin(originals, drawn)).tolist(), first[drawn].tolist()


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # few shapes, seen once: compiling them would take longer
def losses(
    model: SupervisedLoss, examples: Examples, collator: StepCollator, *, places: Sequence[int]
) -> tuple[float, int]:
    """The summed loss of the readable examples at `places`, and over how many tokens."""
    total, tokens = 0.0, 0
    for batch in collator(examples.readable(places)):
        total += float(model(batch.to(model.llava.device)))
        tokens += batch.supervised
    return total, tokens


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def answers(llava: LlavaForConditionalGeneration, examples: Examples, places: Sequence[int]) -> list[Answer]:
    """Greedy answers to the first questions of the examples at `places`."""
    return [_answer(llava, examples, place) for place in places[:QUESTIONS]]


def _answer(llava: LlavaForConditionalGeneration, examples: Examples, place: int) -> Answer:
    example = examples.examples[place]
    try:
        pictures = [open_picture(place) for place in example.images]
    except ImageError:
        return Answer(example.record["conversations"][0]["value"], UNREADABLE, "")
    first = from_record(example.record, pictures).turns[0]
    written = greedy(llava, examples.processor, first.question, first.images, tokens=ANSWER_TOKENS)
    text = examples.processor.tokenizer.decode(written, skip_special_tokens=True)
    return Answer(first.question, text.strip(), first.answer or "")


@torch.no_grad()
def greedy(
    llava: LlavaForConditionalGeneration,
    processor: ProcessorMixin,
    question: str,
    images: Sequence[Picture],
    *,
    tokens: int,
) -> list[int]:
    """The likeliest answer to a first question, token by token, at most so many."""
    encoded = encode(Conversation().ask(question, images), processor, open_answer=True)
    ids = encoded.input_ids[None].to(llava.device)
    seen = encoded.shapes if encoded.pixel_values is None else {"pixel_values": encoded.pixel_values, **encoded.shapes}
    written = llava.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **{name: value.to(llava.device) for name, value in seen.items()},
        max_new_tokens=tokens,
        do_sample=False,
    )
    return written[0, ids.shape[1] :].tolist()
