"""What the forward passes of a run take in: assumed of its recipe, or measured on some of its data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from transformers import ProcessorMixin

from finetune.collate import StepCollator
from finetune.data.mixture import Data
from finetune.data.records import image_names
from finetune.data.refusals import BLANK, CHARACTERS_PER_TOKEN, Ruler, wrong_record
from finetune.flops import Row, Sizes, model_flops
from finetune.recipe import INHERIT, Recipe
from llava_app.conversation import IMAGE_MARK, from_record
from llava_app.errors import DataError
from llava_app.prompts import Encoded, render, template_text

SAMPLE = 1_000  # records that are measured
GUESSED_IMAGE = -1  # the image token where there is no tokenizer


@dataclass(frozen=True)
class Rows:
    """The forward passes of a run on one device."""

    usual: Row
    worst: Row
    tokens: float  # of one example, on average
    flops: float  # of forward and backward pass over one example, on average
    examples: int  # in all; 0 where nobody knows
    source: str  # of these figures, for a person


def assumed(size: Sizes, recipe: Recipe, *, text: int, examples: int) -> Rows:
    """Where an example has one picture, in as many tiles as it can have, and `text` tokens of text, all learned.

    At worst, each is as long as the recipe allows.
    """
    micro = recipe.micro_batch
    text = max(1, min(text, recipe.max_length - size.picture_tokens))
    most = max(text, recipe.max_length - size.picture_tokens)
    example = Row(1, size.picture_tokens + text, size.tiles, text)
    worst = Row(micro, micro * (size.picture_tokens + most), micro * size.tiles, micro * most)
    source = f"one picture and {text} tokens of text in an example; at worst {size.picture_tokens + most:,} in all"
    flops = model_flops(size, recipe, example)
    return Rows(_times(example, micro), worst, example.tokens, flops, examples, source)


def measured(data: Data, size: Sizes, recipe: Recipe, processor: ProcessorMixin | None) -> Rows:
    """As the records are, of which SAMPLE are looked at, spread over all.

    Token by token with the `processor` of the run; without one, letters of the template's text are counted. At worst,
    the longest come together. Raises DataError where the stage can learn from none of them.
    """
    image_id, image_tokens, measure = _exact(processor, recipe) if processor else _rough(size, recipe)
    stride = max(1, len(data) // SAMPLE)
    looked = [data.read(index)[0] for index in range(0, len(data), stride)]
    encoded = [found for record in looked if wrong_record(record, recipe.stage) is None and (found := measure(record))]
    if not encoded:
        raise DataError(f"Stage {recipe.stage} can learn from none of the records. See python -m finetune check.")

    def row(ids: torch.Tensor, examples: int, supervised: int) -> Row:
        pictures = int((ids == image_id).sum()) // image_tokens
        return Row(examples, ids.numel(), pictures * size.tiles, supervised)

    each = [row(example.input_ids, 1, int(example.supervised[1:].sum())) for example in encoded]
    micro = min(recipe.micro_batch, len(data))
    batches = StepCollator(0, image_id, micro, recipe.packing)(_in_order(encoded, recipe))
    full = [batch for batch in batches if len(batch.lengths) == micro] or batches
    usual = _mean([row(batch.input_ids, len(batch.lengths), batch.supervised) for batch in full])
    source = f"{len(encoded):,} of {len(data):,} records, {'tokenised' if processor else 'by their letters'}"
    return Rows(
        usual,
        _worst(each, micro, -(-micro // stride)),
        fmean(example.tokens for example in each),
        fmean(model_flops(size, recipe, example) for example in each),
        round(len(data) * len(encoded) / len(looked)),
        source,
    )


Measure = Callable[[dict[str, Any]], Encoded | None]  # a record's tokens, cut as for training; None where it is refused


def _exact(processor: ProcessorMixin, recipe: Recipe) -> tuple[int, int, Measure]:
    """The image token, how many of them a picture takes, and how records are measured."""
    ruler = Ruler(processor, recipe.max_length)

    def measure(record: dict[str, Any]) -> Encoded | None:
        ids, supervised = ruler.tokens(record)
        if ruler.cut_off(ids, supervised, images=len(image_names(record))):
            return None
        return Encoded(ids[: recipe.max_length], supervised[: recipe.max_length], None)

    return processor.image_token_id, ruler.image_tokens, measure


def _rough(size: Sizes, recipe: Recipe) -> tuple[int, int, Measure]:
    """As `_exact`: every CHARACTERS_PER_TOKENth letter stands for a token, beside those of pictures."""
    template = template_text("vicuna_v1" if recipe.template == INHERIT else recipe.template)

    def measure(record: dict[str, Any]) -> Encoded | None:
        images = len(image_names(record))
        rendered = render(from_record(record, [BLANK] * images), template, open_answer=False)
        text, spans = rendered.text, rendered.answers
        ids = [ord(letter) for letter in text[::CHARACTERS_PER_TOKEN]]
        taught = [
            any(begin <= place < end for begin, end in spans) for place in range(0, len(text), CHARACTERS_PER_TOKEN)
        ]
        at = max(0, text.find(IMAGE_MARK)) // CHARACTERS_PER_TOKEN
        seen = images * size.picture_tokens
        ids[at:at], taught[at:at] = [GUESSED_IMAGE] * seen, [False] * seen
        cut = slice(recipe.max_length)
        return Encoded(torch.tensor(ids[cut]), torch.tensor(taught[cut]), None)

    return GUESSED_IMAGE, size.picture_tokens, measure


def _in_order(encoded: Sequence[Encoded], recipe: Recipe) -> Sequence[Encoded]:
    """As they come into batches: padded ones are of similar length."""
    return encoded if recipe.packing else sorted(encoded, key=lambda example: len(example.input_ids))


def _times(row: Row, count: float) -> Row:
    return Row(*(round(number * count) for number in (row.examples, row.tokens, row.pictures, row.supervised)))


def _mean(rows: Sequence[Row]) -> Row:
    figures = ((row.examples, row.tokens, row.pictures, row.supervised) for row in rows)
    return Row(*(round(fmean(column)) for column in zip(*figures, strict=True)))


def _worst(each: Sequence[Row], micro: int, longest: int) -> Row:
    """`micro` examples that are, in each respect, like so many of the `longest` that were looked at."""

    def most(figures: list[int]) -> int:
        return round(micro * fmean(sorted(figures)[-longest:]))

    return Row(
        micro,
        most([row.tokens for row in each]),
        most([row.pictures for row in each]),
        most([row.supervised for row in each]),
    )
