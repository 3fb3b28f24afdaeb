"""From a card to a model that can answer: the only `from_pretrained` and the only quantisation settings."""

from dataclasses import dataclass

import torch
from transformers import LlavaConfig, LlavaProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from llava_app.checkpoints import Card

PRECISIONS = ("auto", "4bit", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Loaded:
    """A model on its device, ready to answer."""

    card: Card
    model: PreTrainedModel
    processor: ProcessorMixin
    device: torch.device
    precision: str  # one of PRECISIONS, never "auto"
    why: str  # one sentence for the page: which precision on which device, and the reason


def load(card: Card, precision: str = "auto") -> Loaded:
    """Load the model of `card` onto the best device of this machine. Raises ModelError."""
    raise NotImplementedError


def default_card() -> tuple[Card, str]:
    """The model to start with on this machine, and the reason as one sentence for the page."""
    raise NotImplementedError


def make_processor(
    config: LlavaConfig, tokenizer: PreTrainedTokenizerBase, *, image_mode: str, template_name: str
) -> LlavaProcessor:
    """A processor whose image size, patch size and token counts come from the model's own config.

    `image_mode`: "pad" fills up to a square with the mean colour, "crop" cuts the centre out.
    """
    raise NotImplementedError
