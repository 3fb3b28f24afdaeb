"""The settings of an answer: their controls, and what the page sends of them."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from llava_app.engine import Sampling
from llava_app.errors import ContextError, UserError

MAX_SYSTEM = 4_000  # characters
IMAGE_MODES = {"own": "as the model was trained", "pad": "whole, on a square", "crop": "the middle square"}
Setting = float | str | None  # numbers, but for the seed and the system prompt, which are text
DEFAULTS: tuple[Setting, ...] = (
    Sampling.temperature,
    Sampling.top_p,
    Sampling.max_new_tokens,
    "",
    Sampling.repetition_penalty,
    "",
    "own",
)


@dataclass(frozen=True)
class Settings:
    """How to answer."""

    sampling: Sampling
    system: str | None  # None: the model's own
    image_mode: str = "own"  # as in `images.framed`


def read(
    temperature: Any,
    top_p: Any,
    max_new_tokens: Any,
    seed: Any,
    repetition_penalty: Any = None,
    system: Any = None,
    image_mode: Any = None,
    *,
    longest: int = Sampling.MAX_NEW_TOKENS[1],
) -> Settings:
    """The settings as the page sends them, moved into their bounds; an answer has `longest` tokens at most.

    Raises UserError when the seed is no number, ContextError when the system prompt is too long.
    """
    if seed and not re.fullmatch(r"\s*\d{1,20}\s*", str(seed)):
        raise UserError(f"The seed “{seed!s:.40}” is not a whole number. Type 20 digits at most, or leave it empty.")
    system = str(system or "").strip()
    if len(system) > MAX_SYSTEM:
        raise ContextError(
            f"The system prompt has {len(system):,} characters; the limit is {MAX_SYSTEM:,}. Shorten it, then send."
        )
    sampling = Sampling.clamped(
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=int(seed) if seed else None,
        repetition_penalty=repetition_penalty,
    )
    sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, longest))
    return Settings(sampling, system or None, image_mode if image_mode in tuple(IMAGE_MODES) else "own")


def controls(longest: int) -> list[gr.components.Component]:
    """The controls, in the order in which `read` takes them; an answer has `longest` tokens at most."""
    temperature, top_p, max_new_tokens, seed, repetition_penalty, system, image_mode = DEFAULTS
    return [
        gr.Slider(
            *Sampling.TEMPERATURE,
            value=temperature,
            step=0.05,
            label="Temperature",
            info="0 always takes the likeliest word; higher is more varied.",
        ),
        gr.Slider(
            *Sampling.TOP_P,
            value=top_p,
            step=0.05,
            label="Top-p",
            info="Leaves out the unlikely words; 1 keeps them all.",
        ),
        gr.Slider(
            Sampling.MAX_NEW_TOKENS[0],
            longest,
            value=max_new_tokens,
            step=1,
            label="Longest answer",
            info="In tokens; about four letters each.",
        ),
        gr.Textbox(
            seed,
            placeholder="random",
            max_length=len(str(Sampling.SEED[1])),
            label="Seed",
            info="A number that makes an answer repeatable; empty is a new one each time.",
        ),
        gr.Slider(
            *Sampling.REPETITION_PENALTY,
            value=repetition_penalty,
            step=0.05,
            label="Repetition penalty",
            info="Above 1 it avoids words it has used; 1 leaves it free.",
        ),
        gr.Textbox(
            system,
            placeholder="the model's own",
            max_length=MAX_SYSTEM,
            lines=2,
            label="System prompt",
            info="What the model is told first. LLaVA-1.5 was tuned with its own; another can make it worse.",
        ),
        gr.Dropdown(
            [(told, mode) for mode, told in IMAGE_MODES.items()],
            value=image_mode,
            filterable=False,
            label="Pictures",
            info="How the model sees what is no square. Another way than it was trained with can make it worse.",
            elem_id="image-mode",
        ),
    ]


def connect(page: gr.Blocks, settings: Sequence[gr.components.Component], reset: gr.Button) -> None:
    """Keep the settings in the visitor's browser, and set them back on request. Nothing here reaches the server."""
    defaults = json.dumps(DEFAULTS)
    kept = gr.BrowserState(list(DEFAULTS), storage_key="llava.settings", secret="llava")  # no secret, but one is needed
    shown = list(settings)
    local: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    page.load(None, kept, shown, js=f"(kept) => kept?.length === {len(shown)} ? kept : {defaults}", **local)
    gr.on([control.change for control in shown], None, shown, kept, js="(...settings) => [settings]", **local)
    reset.click(None, None, shown, js=f"() => {defaults}", **local)
