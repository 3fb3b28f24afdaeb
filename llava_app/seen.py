"""What a model takes in: a picture exactly as the vision tower gets it, and how a conversation fills the context."""

from dataclasses import dataclass, replace
from functools import lru_cache

from PIL import Image
from transformers import ProcessorMixin
from transformers.image_processing_utils import select_best_resolution

from llava_app.conversation import Conversation
from llava_app.engine.clips import show_clips, thinned
from llava_app.images import Picture, as_seen
from llava_app.prompts import Prepared, knows_clips, prepare, prepare_shown, seen_together, tokenise
from llava_app.video import Clip


@dataclass(frozen=True)
class Seen:
    """A picture or clip as the vision tower gets it."""

    tiles: tuple[Image.Image, ...]  # one square, or an overview and its tiles, row by row, or the frames of a clip
    tokens: int  # that it takes of the context
    columns: int = 0  # of the tiles after the overview; 0 where there are none
    times: tuple[float, ...] = ()  # of a clip's frames, in seconds
    as_clip: bool = False  # whether the model was trained on clips; otherwise frames come to it as pictures


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


def seen(picture: Picture, conversation: Conversation, processor: ProcessorMixin, *, limit: int) -> Seen:
    """A picture of the conversation after scaling, padding, cropping or tiling, with its colours back from what the
    tower gets; a clip as its frames, as many as the context of `limit` tokens has room for."""
    shown, _ = show_clips(conversation, processor, limit=limit)
    together = seen_together(shown, processor)
    part = thinned(picture, conversation, processor, limit=limit)
    as_clip = isinstance(part, Clip) and knows_clips(processor)
    stills = (part,) if as_clip else part.stills
    prepared = [prepare_shown(still, processor, together=together) for still in stills]
    return Seen(
        tuple(tile for one in prepared for tile in _pictures(one, processor)),
        sum(one.tokens for one in prepared),
        0 if isinstance(part, Clip) else _columns(picture.image.size, prepared[0], processor),
        part.times if isinstance(part, Clip) else (),
        as_clip,
    )


def use(conversation: Conversation, processor: ProcessorMixin, *, limit: int) -> Use:
    """How an answered conversation of at least one turn fills a context of `limit` tokens."""
    shown, _ = show_clips(conversation, processor, limit=limit)
    together = seen_together(shown, processor)
    tokens = [_tokens(picture, processor, together=together) for picture in shown.pictures]

    def count(of: Conversation) -> int:
        return len(tokenise(of, processor, picture_tokens=tokens, open_answer=False)[0])

    total, without = count(shown), count(replace(shown, system=""))
    return Use(total - without, without - sum(tokens), sum(tokens), limit)


def _pictures(prepared: Prepared, processor: ProcessorMixin) -> list[Image.Image]:
    settings = processor.image_processor
    return as_seen(prepared.pixel_values.numpy(), settings.image_mean, settings.image_std)


def _columns(size: tuple[int, int], prepared: Prepared, processor: ProcessorMixin) -> int:
    """Of the grid of tiles that a picture of this size (width, height) was fitted into."""
    tiles, *_, side = prepared.pixel_values.shape
    if tiles == 1:
        return 0
    _, wide = select_best_resolution(size[::-1], processor.image_processor.image_grid_pinpoints)
    return wide // side


def _tokens(picture: Picture, processor: ProcessorMixin, *, together: bool) -> int:
    if not isinstance(picture, Clip):
        return _of_size(picture.image.size, processor, together=together)
    return prepare_shown(picture, processor, together=together).tokens


@lru_cache(maxsize=256)
def _of_size(size: tuple[int, int], processor: ProcessorMixin, *, together: bool) -> int:
    """Of a picture of this size, whatever it shows."""
    return prepare(Image.new("RGB", size), processor, together=together).tokens
