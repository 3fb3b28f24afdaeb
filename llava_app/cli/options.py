"""The flags that the verbs share, and what they stand for."""

import argparse
import sys
from pathlib import Path

from llava_app.checkpoints import RUNS, find
from llava_app.engine import Engine, Sampling
from llava_app.errors import UserError

# Endings by which a picture is known without opening it.
PICTURES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"))


def add_model(parser: argparse.ArgumentParser) -> None:
    """The flags that choose a model."""
    parser.add_argument("--model", help="name, Hub id or folder (default: what fits here)")
    parser.add_argument("--precision", default="auto", help="default: auto, from the machine")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of trained models (default: %(default)s)")


def add_sampling(parser: argparse.ArgumentParser, default: Sampling) -> None:
    """The flags of Sampling."""
    parser.add_argument("--temperature", type=float, default=default.temperature, help="default: %(default)s")
    parser.add_argument("--top-p", type=float, default=default.top_p, help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens, help="default: %(default)s")
    parser.add_argument("--repetition-penalty", type=float, default=default.repetition_penalty, help="1: none")
    parser.add_argument("--seed", type=int, help="a number that makes a sampled answer repeatable")


def sampling(options: argparse.Namespace) -> Sampling:
    """What the flags of `add_sampling` say. Raises UserError for a value out of bounds."""
    try:
        return Sampling(
            temperature=options.temperature,
            top_p=options.top_p,
            max_new_tokens=options.max_new_tokens,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def open_engine(options: argparse.Namespace) -> Engine:
    """Load the model that the flags of `add_model` name, and say on stderr which it is. Raises ModelError."""
    chosen = find(options.model, options.runs) if options.model else None
    from transformers.utils.logging import disable_progress_bar

    from llava_app.engine.local import LocalEngine  # torch takes seconds to import; a wrong flag is told at once
    from llava_app.loading import load
    from llava_app.outlook import default_card

    disable_progress_bar()  # of reading the weights; that of a download stays
    card, why = (chosen, "") if chosen else default_card()
    print(f"Loading {card.name} … {why}".strip(), file=sys.stderr)
    loaded = load(card, options.precision)
    print(loaded.why, file=sys.stderr)
    return LocalEngine(loaded)
