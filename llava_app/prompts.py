"""The one renderer: a conversation → the text, the token ids, and the mask of the answers."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from PIL import Image
from transformers import LlavaOnevisionProcessor, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from llava_app.conversation import Conversation
from llava_app.errors import ModelError
from llava_app.images import Picture
from llava_app.video import Clip

TEMPLATES: dict[str, tuple[str, ...]] = {  # name → what ends an answer beside the tokenizer's end token
    "plain": ("\n",),
    "vicuna_v1": (),
    "llava_v0": ("###",),
    "llava_v1": (),
    "mistral_instruct": (),
    "llava_llama_2": (),
    "chatml_direct": ("<|im_end|>",),
    "qwen": ("<|im_end|>",),
    "mpt": ("<|im_end|>",),
    "llama_3": ("<|eot_id|>",),
}
LONGEST = 8  # long side over short side, beyond which only the middle is shown to a model that crops
_FOLDER = Path(__file__).parent / "templates"
_rendering = Lock()  # transformers keeps the mask of the text being rendered in the template that all threads share


@dataclass(frozen=True)
class Encoded:
    """One conversation as a model takes it: S tokens and I pictures, without a batch axis."""

    input_ids: torch.Tensor  # (S,) int64; a picture is as many image tokens as the model makes features of it
    supervised: torch.Tensor  # (S,) bool; true on the answers and their end token
    pixel_values: torch.Tensor | None  # (T, 3, H, W) float32, all pictures' tiles in order; None without pictures
    shapes: dict[str, torch.Tensor] = field(default_factory=dict)  # what models with tiles take beside the pixels


@dataclass(frozen=True)
class Prepared:
    """One picture as the vision tower takes it."""

    pixel_values: torch.Tensor  # (T, 3, H, W) float32: one tile, or an overview and tiles
    tokens: int  # how many image tokens its features take in a prompt
    # What `get_image_features` of a model with tiles takes beside the pixels: image_sizes (1, 2) int64, height before
    # width; OneVision also batch_num_images (1,), which is 1 for a picture in tiles.
    shapes: dict[str, torch.Tensor]
    is_clip: bool = False  # the tiles are frames, for `get_video_features`


@dataclass(frozen=True)
class Rendered:
    """A prompt as text."""

    text: str
    answers: list[tuple[int, int]]  # where in the text answers and their end tokens stand, [begin, end)


def template_text(name: str) -> str:
    """The Jinja text of one of `TEMPLATES`. ModelError when there is none of that name."""
    if name not in TEMPLATES:
        raise ModelError(f"There is no template {name!r}; choose one of {', '.join(TEMPLATES)}.")
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def end_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    """The tokens that end an answer in the template `name`: the end token, and those that spell one of its endings."""
    ends = [tokenizer.eos_token_id]
    for text in TEMPLATES.get(name, ()):  # a model's own template says no more than its end token
        spelled = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.decode(spelled[-1:]) == text:  # behind a token for no space at all, which Llama's tokenizer puts
            ends.append(spelled[-1])
    return list(dict.fromkeys(ends))


def messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation as chat templates read it: roles, and contents with a turn's pictures before its text."""
    return _messages(conversation, spell=str)


def render(conversation: Conversation, template: str, *, open_answer: bool) -> Rendered:
    """The prompt: `<image>` for every picture, Llama's `</s>` as the end token, no begin token.

    `template` is Jinja text. With `open_answer` the last turn is open and the prompt ends where its answer starts or
    goes on; without, every turn is answered. ValueError when the conversation is not so.
    """
    _check_turns(conversation, open_answer)
    return _render(messages(conversation), template, open_answer=open_answer, special={"eos_token": "</s>"})


def encode(conversation: Conversation, processor: ProcessorMixin, *, open_answer: bool) -> Encoded:
    """Render with the processor's chat template, tokenise, and prepare the pictures: what a training step takes.

    `open_answer` and ValueError as in `render`.
    """
    conversation = conversation.spread()
    together = seen_together(conversation, processor)
    prepared = [prepare(picture.image, processor, together=together) for picture in conversation.pictures]
    lengths = [picture.tokens for picture in prepared]
    ids, supervised = tokenise(conversation, processor, picture_tokens=lengths, open_answer=open_answer)
    if not prepared:
        return Encoded(ids, supervised, None)
    shapes = {name: torch.cat([picture.shapes[name] for picture in prepared]) for name in prepared[0].shapes}
    if "batch_num_images" in shapes:
        shapes["batch_num_images"] = torch.tensor([len(prepared)])
    return Encoded(ids, supervised, torch.cat([picture.pixel_values for picture in prepared]), shapes)


def seen_together(conversation: Conversation, processor: ProcessorMixin) -> bool:
    """Whether each picture is one tile: OneVision was trained so where a conversation has several."""
    return len(conversation.pictures) > 1 and isinstance(processor, LlavaOnevisionProcessor)


def prepare(image: Image.Image, processor: ProcessorMixin, *, together: bool = False) -> Prepared:
    """A picture, scaled, padded, cropped or cut into tiles as the processor says. `together`: see `seen_together`."""
    image = _bounded(image, processor)
    seen = processor.image_processor([[image, image]] if together else [image], return_tensors="pt")
    tokens = processor.replace_image_token(seen, 0).count(processor.image_token)
    pixels = seen.pop("pixel_values")
    shapes = {name: torch.as_tensor(value)[:1] for name, value in seen.items()}
    return Prepared(pixels[0] if pixels.ndim == 5 else pixels[:1], tokens, shapes)


def prepare_clip(clip: Clip, processor: LlavaOnevisionProcessor) -> Prepared:
    """The frames of a clip as OneVision takes them: each squeezed into one tile, a quarter of its features kept.

    Their features stand where a prompt has image tokens; the model sees no token there, so none of its own is needed.
    """
    size = processor.image_processor.size
    square = (size["width"], size["height"])
    seen = [prepare(frame.image.resize(square, Image.Resampling.BICUBIC), processor) for frame in clip.frames]
    pooled = math.ceil(math.isqrt(processor.num_image_tokens) / 2) ** 2
    frames = torch.stack([frame.pixel_values[0] for frame in seen])
    return Prepared(frames, len(clip.frames) * pooled + 1, {}, is_clip=True)  # and one feature that ends it


def prepare_shown(picture: Picture, processor: ProcessorMixin, *, together: bool) -> Prepared:
    """A picture of a conversation, or a clip for a model that knows clips."""
    if isinstance(picture, Clip):
        return prepare_clip(picture, processor)
    return prepare(picture.image, processor, together=together)


def knows_clips(processor: ProcessorMixin) -> bool:
    """Whether the model was trained on clips; any other is shown their frames as pictures."""
    return isinstance(processor, LlavaOnevisionProcessor)


def tokenise(
    conversation: Conversation, processor: ProcessorMixin, *, picture_tokens: Sequence[int], open_answer: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (S,) int64 and the mask of the answers and their end tokens (S,) bool.

    `picture_tokens`: how many image tokens each picture takes. The ids are those of `processor.apply_chat_template`,
    except that nothing typed becomes a special token: it is tokenised as the text it is. `open_answer` and ValueError
    as in `render`.
    """
    _check_turns(conversation, open_answer)
    tokenizer, mark = processor.tokenizer, _unused_character(conversation)
    tokens = _token_starts(tokenizer)
    typed = _messages(conversation, spell=lambda text: tokens.sub(lambda start: start[0] + mark, text))
    special = tokenizer.special_tokens_map
    rendered = _render(typed, processor.chat_template, open_answer=open_answer, special=special)
    ids, supervised = _tokens(rendered, tokenizer, mark=mark)
    repeats = torch.ones_like(ids)
    repeats[ids == processor.image_token_id] = torch.tensor(picture_tokens, dtype=torch.long)
    return ids.repeat_interleave(repeats), supervised.repeat_interleave(repeats)


def _check_turns(conversation: Conversation, open_answer: bool) -> None:
    if not conversation.turns:
        raise ValueError("the conversation has no turns; ask something first")
    if open_answer and not conversation.is_open:
        raise ValueError("the last turn has its answer already; open it with retry, or ask again")
    if conversation.is_open and not open_answer:
        raise ValueError("the last turn has no answer; answer it first, or render with open_answer=True")


def _messages(conversation: Conversation, *, spell: Callable[[str], str]) -> list[dict[str, Any]]:
    """Messages whose texts have gone through `spell`."""

    def message(role: str, text: str, images: int = 0) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": spell(text)}]}

    written = [] if conversation.system is None else [message("system", conversation.system)]
    for turn in conversation.turns:
        written.append(message("user", turn.question, len(turn.images)))
        if turn.answer is not None:
            written.append(message("assistant", turn.answer))
    return written


def _render(written: list[dict[str, Any]], template: str, *, open_answer: bool, special: Mapping[str, str]) -> Rendered:
    continued = open_answer and written[-1]["role"] == "assistant"
    with _rendering:
        texts, answers = render_jinja_template(
            [written],
            chat_template=template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=open_answer and not continued,
            **special,
        )
    rendered = Rendered(texts[0], answers[0])
    return _cut_after(written[-1]["content"][-1]["text"], rendered) if continued else rendered


def _cut_after(begun: str, rendered: Rendered) -> Rendered:
    """The prompt up to the end of the answer that has begun, without what the template writes after an answer."""
    begin, _ = rendered.answers[-1]
    end = rendered.text.index(begun, begin) + len(begun)
    return Rendered(rendered.text[:end], [*rendered.answers[:-1], (begin, end)])


def _token_starts(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the first character of every spelling of an added token in a text, also where two overlap.

    Added tokens of white space alone, which some tokenizers have, are ordinary text.
    """
    spellings = [token for token in tokenizer.added_tokens_encoder if not token.isspace()]
    return re.compile(f"(?=(?:{'|'.join(map(re.escape, spellings))})).", re.DOTALL)


def _unused_character(conversation: Conversation) -> str:
    """A character that occurs nowhere in the conversation, from the private-use area on."""
    turns = ((turn.question, turn.answer or "") for turn in conversation.turns)
    used = {conversation.system or ""}.union(*turns)
    return next(char for char in map(chr, range(0xE000, 0x110000)) if not any(char in text for text in used))


def _tokens(rendered: Rendered, tokenizer: PreTrainedTokenizerBase, *, mark: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (S,) and the mask of the answers (S,), without the tokens of `mark`, which only keeps typed tokens apart."""
    begun = tokenizer.bos_token is not None and rendered.text.startswith(tokenizer.bos_token)
    tokens = tokenizer(rendered.text, add_special_tokens=not begun, return_offsets_mapping=True)
    ids, spans = torch.tensor(tokens["input_ids"]), tokens["offset_mapping"]
    bounds = torch.tensor([bound for answer in rendered.answers for bound in answer], dtype=torch.long)
    ends = torch.tensor([end for _, end in spans])
    supervised = torch.searchsorted(bounds, ends) % 2 == 1  # odd: after the begin of an answer, up to its end
    if mark not in rendered.text:
        return ids, supervised
    kept = torch.tensor([rendered.text[begin:end] != mark for begin, end in spans])
    return ids[kept], supervised[kept]


def _bounded(image: Image.Image, processor: ProcessorMixin) -> Image.Image:
    """The middle of a very long picture, where the processor would cut the middle out.

    It scales the short side to the tower's before it cuts, and 2,048 x 1 pixels would become 231 megapixels.
    """
    (width, height), short = image.size, min(image.size)
    if processor.image_processor.do_pad or max(image.size) <= LONGEST * short:
        return image
    across, down = (max(0, side - LONGEST * short) // 2 for side in image.size)
    return image.crop((across, down, width - across, height - down))
