"""How a model is shown the clips of a conversation."""

from dataclasses import replace

from transformers import ProcessorMixin

from llava_app.conversation import Conversation
from llava_app.images import Picture
from llava_app.prompts import knows_clips, prepare, prepare_clip
from llava_app.video import Clip

SHARE = 0.5  # of the context that all clips of a conversation take together, at most


def show_clips(conversation: Conversation, processor: ProcessorMixin, *, limit: int) -> tuple[Conversation, str | None]:
    """The conversation with as many frames of each clip as fit into a context of `limit` tokens, and what to say of it.

    Where the model knows only pictures the frames come as pictures. It is said when the last question brings a clip.
    """
    turns = [
        replace(turn, images=tuple(thinned(picture, conversation, processor, limit=limit) for picture in turn.images))
        for turn in conversation.turns
    ]
    fewer = replace(conversation, turns=tuple(turns))
    return fewer if knows_clips(processor) else fewer.spread(), _said(fewer, processor)


def thinned(picture: Picture, conversation: Conversation, processor: ProcessorMixin, *, limit: int) -> Picture:
    """A clip of the conversation with as many frames as fit; a picture as it is."""
    if not isinstance(picture, Clip):
        return picture
    tokens = int(SHARE * limit / sum(isinstance(other, Clip) for other in conversation.pictures))
    first = picture.thinned(1)
    if knows_clips(processor):
        per_frame = prepare_clip(first, processor).tokens
    else:
        per_frame = prepare(first.frames[0].image, processor).tokens
    return picture.thinned(max(1, tokens // per_frame))


def _said(conversation: Conversation, processor: ProcessorMixin) -> str | None:
    new = [picture for picture in conversation.turns[-1].images if isinstance(picture, Clip)]
    if not new:
        return None
    frames = sum(len(clip.frames) for clip in new)
    if knows_clips(processor):
        return f"The model sees {frames} frames of the clip."
    return f"The model was not trained on clips: it sees {frames} frames as separate pictures."
