"""What a model takes in: a picture exactly as the vision tower gets it, and how a conversation fills the context."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from PIL import Image
from transformers import ProcessorMixin

from llava_app.conversation import Conversation
from llava_app.prompts import prepare, tokenise


@dataclass(frozen=True)
class Seen:
    """A picture as the vision tower gets it."""

    tiles: tuple[Image.Image, ...]  # one square, or an overview and its tiles
    tokens: int  # that it takes of the context


@dataclass(frozen=True)
class Use:
    """Tokens of the context that a conversation takes."""

    system: int
    text: int  # questions, answers, and the words of the template between them
    pictures: int
    limit: int

    @property
    def free(self) -> int:
        """What is left for further questions and answers; 0 when the conversation is longer than the context."""
        return max(0, self.limit - self.system - self.text - self.pictures)


def seen(image: Image.Image, processor: ProcessorMixin) -> Seen:
    """The picture after scaling, padding, cropping or tiling, with its colours back from what the tower gets."""
    prepared = prepare(image, processor)
    pixels = prepared.pixel_values
    mean, std = (torch.tensor(getattr(processor.image_processor, name)) for name in ("image_mean", "image_std"))
    colours = pixels.reshape(-1, *pixels.shape[-3:]) * std[:, None, None] + mean[:, None, None]
    bytes_THWC = (colours.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return Seen(tuple(Image.fromarray(tile.numpy()) for tile in bytes_THWC), prepared.tokens)


def use(conversation: Conversation, processor: ProcessorMixin, *, limit: int) -> Use:
    """How an answered conversation of at least one turn fills a context of `limit` tokens."""
    tokens = [_tokens(picture.image.size, processor) for picture in conversation.pictures]

    def count(of: Conversation) -> int:
        return len(tokenise(of, processor, picture_tokens=tokens, open_answer=False)[0])

    total, without = count(conversation), count(replace(conversation, system=""))
    return Use(total - without, without - sum(tokens), sum(tokens), limit)


@lru_cache(maxsize=256)
def _tokens(size: tuple[int, int], processor: ProcessorMixin) -> int:
    """Of a picture of this size, whatever it shows."""
    return prepare(Image.new("RGB", size), processor).tokens
