"""python -m llava_app ask: a conversation in the terminal."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

from llava_app.chat import reply
from llava_app.cli.options import PICTURES, add_model, add_sampling, open_engine, sampling
from llava_app.conversation import Conversation
from llava_app.engine import Engine, Sampling
from llava_app.errors import UserError
from llava_app.images import Picture, open_image

# Why an answer ended, where it did not end by itself.
FINISHES = {
    "length": "(The longest answer allowed; --max-new-tokens allows more.)",
    "stopped": "(Stopped.)",
    "time": "(Stopped at the time limit.)",
}


def main(arguments: Sequence[str]) -> int:
    """Answer one question, or every line that is typed; 130 when an only answer was interrupted."""
    parser = argparse.ArgumentParser(prog="python -m llava_app ask", description="Without a question, asks for them.")
    parser.add_argument("words", nargs="*", metavar="PICTURE… QUESTION", help="picture files, then the question")
    parser.add_argument("--system", help="text before the conversation (default: what the model was trained with)")
    add_model(parser)
    add_sampling(parser, Sampling())
    options = parser.parse_intermixed_args(arguments)
    files, question = split(options.words)
    pictures, settings = [open_image(file) for file in files], sampling(options)
    start = Conversation(system=options.system)
    with closing(open_engine(options)) as engine:
        if question is None:
            _talk(engine, start, pictures, sampling=settings)
            return 0
        finished = _stream(engine, start.ask(question, pictures), settings)
        return 130 if finished.turns[-1].finish == "stopped" else 0


def split(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Picture files and the question: the last word, unless it is a file or is spelled like a picture's name."""
    if not words or os.path.exists(words[-1]) or Path(words[-1]).suffix.lower() in PICTURES:
        return list(words), None
    return list(words[:-1]), words[-1]


def printable(text: str) -> str:
    """Text that does nothing to a terminal but show: no escape sequences, whatever a model was led to write."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def _talk(engine: Engine, conversation: Conversation, pictures: list[Picture], *, sampling: Sampling) -> None:
    """Answer line by line until the input ends. The pictures belong to the first question."""
    for question in _lines():
        shown = () if conversation.turns else pictures
        try:
            conversation = _stream(engine, conversation.ask(question, shown), sampling)
        except UserError as error:
            print(error, file=sys.stderr)


def _lines() -> Iterator[str]:
    prompt = "> " if sys.stdin.isatty() else ""
    with suppress(EOFError):
        while True:
            if line := input(prompt).strip():
                yield line


def _stream(engine: Engine, asked: Conversation, sampling: Sampling) -> Conversation:
    """Print the answer as it comes; Ctrl-C ends it, and what was written stays. Raises UserError."""
    kept, written = asked.answer("", "stopped"), 0
    try:
        with closing(reply(engine, asked, sampling)) as answer:
            for progress in answer:
                print(printable(progress.text[written:]), end="", flush=True)
                kept, written = progress.conversation, len(progress.text)
                if progress.left_out:
                    print(f"({progress.left_out})", file=sys.stderr)
    except KeyboardInterrupt:
        pass
    finally:
        print()
    if note := FINISHES.get(kept.turns[-1].finish or ""):
        print(note, file=sys.stderr)
    return kept
