"""Which records cannot be learned from, and why."""

import re
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from finetune.data.records import Unread, image_names
from llava_app.conversation import IMAGE_MARK, Conversation, from_record
from llava_app.errors import DataError
from llava_app.images import Picture
from llava_app.prompts import encode, prepare, tokenise

CHARACTERS_PER_TOKEN = 4
WEB = ("http://", "https://")
BLANK = Picture(Image.new("RGB", (32, 32)), digest="blank")


@dataclass(frozen=True)
class Refusal:
    """Why a record is not learned from; `reason` is what refusals are counted by."""

    reason: str
    details: str


class Ruler:
    """Measures records without tokenising each: no text has more tokens than bytes."""

    def __init__(self, processor: ProcessorMixin, max_length: int) -> None:
        self.processor = processor
        self.max_length = max_length
        asked = encode(Conversation().ask("", (_fullest(processor),)), processor, open_answer=True)
        self.frame = len(asked.input_ids)
        self.image_tokens = self._seen(asked.input_ids)

    def length(self, record: dict[str, Any]) -> int:
        """About the number of tokens, pictures included: what examples are sorted by."""
        letters = sum(len(turn["value"]) for turn in record["conversations"])
        return letters // CHARACTERS_PER_TOKEN + len(image_names(record)) * self.image_tokens

    def tokens(self, record: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The record's token ids (S,) and the mask of what is learned (S,), as it is learned from but not cut."""
        images = len(image_names(record))
        conversation, sizes = from_record(record, [BLANK] * images), [self.image_tokens] * images
        return tokenise(conversation, self.processor, picture_tokens=sizes, open_answer=False)

    def too_long(self, record: dict[str, Any]) -> Refusal | None:
        """Refuses a record of which no answer, or not every picture, lies within `max_length` tokens."""
        values = [turn["value"] for turn in record["conversations"]]
        last = max((place for place, value in enumerate(values) if IMAGE_MARK in value), default=0)
        images = len(image_names(record))
        frames = self.frame * (last // 2 + 1)
        most = frames + images * self.image_tokens + len("".join(values[: last + 2]).encode())
        return None if most < self.max_length else self.cut_off(*self.tokens(record), images=images)

    def cut_off(self, ids: Tensor, supervised: Tensor, *, images: int) -> Refusal | None:
        """Refuses tokens of which cutting leaves no answer, or not every one of the pictures."""
        kept = slice(self.max_length)
        if supervised[kept].any() and self._seen(ids[kept]) == images * self.image_tokens:
            return None
        return Refusal(f"no answer within {self.max_length} tokens (max_length)", f"it has {len(ids)}")

    def _seen(self, ids: Tensor) -> int:
        return int((ids == self.processor.image_token_id).sum())


def _fullest(processor: ProcessorMixin) -> Picture:
    """A blank picture that takes as many tokens as any: with tiles, one that fills its grid."""
    grids = getattr(processor.image_processor, "image_grid_pinpoints", None) or [BLANK.image.size]
    blanks = [Picture(Image.new("RGB", (width, height)), f"blank {width} x {height}") for height, width in grids]
    return max(blanks, key=lambda blank: prepare(blank.image, processor).tokens)


def wrong_record(record: Any, stage: str) -> Refusal | None:
    """Refuses what is no LLaVA record, or none that the stage learns from."""
    if not isinstance(record, dict):
        return Refusal("not an object", repr(record)[:80])
    names = image_names(record)
    if not all(isinstance(name, str | bytes) for name in names):
        return Refusal("an image that is not a file name", repr(names)[:80])
    if web := [name for name in names if isinstance(name, str) and name.startswith(WEB)]:
        return Refusal("a picture at a web address; download it and name the file", web[0])
    if unread := _unread(record.get("conversations")):
        return Refusal(unread.reason, "")
    try:
        conversation = from_record(record, [BLANK] * len(names))
    except DataError as error:
        return Refusal(re.sub(r"\d+", "N", str(error)), str(error))
    if not all((turn.answer or "").strip() for turn in conversation.turns):
        return Refusal("an empty answer", "")
    if stage == "align" and not names:
        return Refusal("no picture; stage align learns from pictures only", "")
    return None


def _unread(turns: Any) -> Unread | None:
    turns = turns if isinstance(turns, list) else []
    values = (turn.get("value") for turn in turns if isinstance(turn, dict))
    return next((value for value in values if isinstance(value, Unread)), None)


def identifier(record: Any) -> str:
    """What a person finds a record by."""
    return str(record.get("id", "without id")) if isinstance(record, dict) else "not an object"
