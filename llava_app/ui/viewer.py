"""A picture opened large, as the model sees it, and a part of it as a further picture; and how full the context is."""

import html
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder

from llava_app.images import Picture, framed
from llava_app.ui.display import Talk, data_url
from llava_app.ui.models import Models

if TYPE_CHECKING:  # it imports torch, which the page does only when somebody wants to see this
    from transformers import ProcessorMixin

    from llava_app.memory import Plan
    from llava_app.seen import Seen, Use

LARGE_SIDE = 1280  # px
LEAST_PART = 0.02  # of a picture's side

Part = tuple[float, float, float, float]  # left, top, right, bottom, as fractions of the picture


class Viewer:
    """The events about what the model sees."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def show(self, chosen: gr.EventData, talk: Talk, model: str | None, image_mode: str) -> Any:
        """A picture of the conversation, large, and as the model sees it."""
        found = _find(chosen._data, talk)
        if found is None:
            return gr.skip()
        turn, number, picture = found
        parts = self._parts(model)
        sight = _sight(picture, talk, image_mode, *parts) if parts else None
        return sheet(picture, sight, turn=turn, number=number)

    def part(self, chosen: gr.EventData, message: dict[str, Any] | None, talk: Talk) -> Any:
        """Put the part of a picture that was marked into the box, in the picture's full resolution."""
        found, part = _find(chosen._data, talk), _part(chosen._data.get("part"))
        if found is None or part is None:
            return gr.skip()
        image = found[2].image
        left, top, right, bottom = part
        width, height = image.size
        box = (int(left * width), int(top * height), max(1, round(right * width)), max(1, round(bottom * height)))
        file = save_pil_to_cache(image.crop(box), get_upload_folder(), "part", "png")
        message = message or {}
        return gr.update(value={"text": message.get("text") or "", "files": [*(message.get("files") or []), file]})

    def measure(self, talk: Talk, model: str | None, image_mode: str) -> str:
        """What the chosen model takes of the memory, and the conversation of its context."""
        from llava_app.seen import use

        parts = self._parts(model)
        if not parts:
            return ""
        processor, plan = parts
        shown = room(plan)
        if not talk.conversation.turns:
            return shown
        return meter(use(talk.conversation.framed(image_mode), processor, limit=plan.length)) + shown

    def _parts(self, model: str | None) -> "tuple[ProcessorMixin, Plan] | None":
        """Processor and plan of the chosen model; None while it is not loaded, and where it runs elsewhere."""
        card = self.models.cards().get(model or "")
        ready = self.models.ready(card) if card else None
        return ready.opened.parts if ready and ready.opened else None


def _sight(picture: Picture, talk: Talk, image_mode: str, processor: "ProcessorMixin", plan: "Plan") -> "Seen":
    from llava_app.seen import seen

    shown = talk.conversation.framed(image_mode)
    return seen(framed(picture, image_mode), shown, processor, limit=plan.length)


def sheet(picture: Picture, sight: "Seen | None", *, turn: int, number: int) -> str:
    """The dialogue about one picture."""
    about = f"data-turn='{turn}' data-picture='{number}'"
    sees = _sees(sight) if sight else ""
    size = f"{picture.image.width} × {picture.image.height} pixels"
    return (
        f"<dialog class='sheet wide' aria-label='Picture'><h2>{html.escape(picture.name)} · {size}</h2>"
        f"<div class='area'><img src='{data_url(picture.image, LARGE_SIDE)}' alt='The picture'>"
        f"<div class='frame' hidden></div></div>"
        "<p>Small details get lost in the model's eyes. Drag over a part to ask about it alone.</p>"
        f"{sees}<menu><button data-do='close'>Close</button>"
        f"<button class='main' data-do='part' {about} disabled>Ask about this part</button></menu></dialog>"
    )


def _sees(sight: "Seen") -> str:
    """What the model sees: frames with their times, or the overview and the tiles in their grid."""
    labels = [f"{time:.1f} s" for time in sight.times] or [f"part {place}" for place in range(1, len(sight.tiles) + 1)]
    shown = [
        f"<img src='{data_url(tile, LARGE_SIDE)}' alt='What the model sees, {label}' title='{label}'>"
        for tile, label in zip(sight.tiles, labels, strict=True)
    ]
    if sight.times:
        shown = [f"<span>{image}<small>{label}</small></span>" for image, label in zip(shown, labels, strict=True)]
    if sight.columns:
        shown = [shown[0], f"<div class='grid' style='--columns:{sight.columns}'>{''.join(shown[1:])}</div>"]
    return f"<figure class='sees'><div>{''.join(shown)}</div><figcaption>{_told(sight)}</figcaption></figure>"


def _told(sight: "Seen") -> str:
    """The same in words."""
    width, height = sight.tiles[0].size
    what = f"{width} × {height} pixels, {sight.tokens:,} visual tokens."
    if not sight.times:
        parts = "" if len(sight.tiles) == 1 else f"an overview and {len(sight.tiles) - 1} tiles of "
        return f"What the model sees: {parts}{what}"
    how = "" if sight.as_clip else " It was not trained on clips: the frames come to it as separate pictures."
    return f"What the model sees: {len(sight.times)} frames of {what}{how}"


def meter(context: "Use") -> str:
    """The context as a bar with its parts, and in words."""
    parts = {"system": context.system, "text": context.text, "pictures": context.pictures}
    spans = "".join(
        f"<span class='{name}' style='width:{100 * tokens / context.limit:.2f}%'></span>"
        for name, tokens in parts.items()
    )
    words = " · ".join(f"<span class='{name}'>{name} {tokens:,}</span>" for name, tokens in parts.items())
    used = sum(parts.values())
    room = f"room for answers {context.free:,}"
    over = " · the oldest questions are left out" if used > context.limit else ""
    return (
        f"<div class='meter'><div class='bar' aria-hidden='true'>{spans}</div>"
        f"<p>Context: {used:,} of {context.limit:,} tokens · {words} · {room}{over}</p></div>"
    )


def room(plan: "Plan") -> str:
    """What a model needs, in words."""
    return (
        f"<p>Model: {plan.need.weights / 1e9:.2f} GB of weights, {plan.total / 1e9:.2f} GB with everything full; "
        f"a context of {plan.length:,} tokens, for {plan.rows} conversations at once</p>"
    )


def _find(data: dict[str, Any], talk: Talk) -> tuple[int, int, Picture] | None:
    """The picture that the browser names by turn and number, when there is one."""
    turn, number = data.get("turn"), data.get("picture")
    if type(turn) is not int or type(number) is not int or not 0 <= turn < len(talk.conversation.turns):
        return None
    images = talk.conversation.turns[turn].images
    return (turn, number, images[number]) if 0 <= number < len(images) else None


def _part(stated: Any) -> Part | None:
    """Where the part lies, when it is one."""
    if not isinstance(stated, list) or len(stated) != 4 or not all(type(edge) in (int, float) for edge in stated):
        return None
    left, top, right, bottom = (float(edge) for edge in stated)
    if not (0 <= left <= right - LEAST_PART <= 1 and 0 <= top <= bottom - LEAST_PART <= 1 >= max(right, bottom)):
        return None
    return left, top, right, bottom
