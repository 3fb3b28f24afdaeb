"""python -m llava_app VERB: ask, caption, doctor, lens, space."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from llava_app.errors import UserError

VERBS = {
    "ask": 'pictures and a question: ask cat.png "What is funny?"',
    "caption": "describe every picture of a folder",
    "lens": "how much of the context a picture takes, and where a model's parameters are",
    "space": "the page, and a model of yours, as a Space on Hugging Face",
    "doctor": "what this machine has, what the app makes of it, and what to mend",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 1 when the verb says that something is left to do, 2 after an error that
    a person can mend, 130 after an interruption."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verb = arguments[0] if arguments else "--help"
    if verb not in VERBS:
        print("usage: python -m llava_app VERB …")
        print(*(f"  {name:8} {about}" for name, about in VERBS.items()), sep="\n")
        return 0 if verb in ("-h", "--help") else 2
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return int(import_module(f"llava_app.cli.{verb}").main(arguments[1:]))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
