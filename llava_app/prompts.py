"""The one renderer: a conversation → the text, the token ids, and the mask of the answers."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import ProcessorMixin

from llava_app.conversation import Conversation

TEMPLATES = ("plain", "vicuna_v1")


@dataclass(frozen=True)
class Encoded:
    """One conversation as a model takes it, S tokens and I pictures. No batch axis on the tokens."""

    input_ids: torch.Tensor  # (S,) int64; every picture is as many image tokens as the model makes features of it
    supervised: torch.Tensor  # (S,) bool; true on the answers and their end token
    pixel_values: torch.Tensor | None  # (I, 3, H, W) float32; None without pictures


def template_text(name: str) -> str:
    """The Jinja text of a template in `TEMPLATES`. ModelError when there is none of that name."""
    raise NotImplementedError


def messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation as chat templates read it: role and content, pictures before text."""
    raise NotImplementedError


def render(conversation: Conversation, template: str, *, open_answer: bool) -> str:
    """The prompt as text, with Llama's `</s>` as the end token and without a begin token; `<image>` per picture.

    `template` is Jinja text. `open_answer`: the last turn is open, and the prompt ends where its answer starts;
    otherwise every turn is answered.
    """
    raise NotImplementedError


def encode(conversation: Conversation, processor: ProcessorMixin, *, open_answer: bool) -> Encoded:
    """Render with the processor's chat template and tokenise. Chat, training and evaluation all come through here.

    What a person typed never becomes a special token.
    """
    raise NotImplementedError
