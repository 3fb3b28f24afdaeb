"""The flags of the page, from the command line and from the environment."""

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

# As in llava_app.loading, which would import torch.
PRECISIONS = ("auto", "4bit", "8bit", "bfloat16", "float16", "float32")
VARIABLE = "LLAVA_FLAGS"
SERVER_HELP = "models of a server as well: http://host:8000/v1, with #NAME for one it does not list; may be repeated"
PUBLIC_HELP = "for strangers: the chat alone, few models, stricter limits (default on a Space)"
AUTH_HELP = "ask for a password: that in FILE, or without FILE that in LLAVA_PASSWORD; may be repeated"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags, after those in LLAVA_FLAGS, which is how a Space is told. Ends the program for wrong ones."""
    on_a_space = "SPACE_ID" in os.environ
    parser = argparse.ArgumentParser(description="A page to talk to a LLaVA.")
    parser.add_argument("--model", help="name, Hub id or folder of the model to start with (default: what fits here)")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="default: auto, from the machine")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of trained models (default: runs)")
    parser.add_argument("--host", default="0.0.0.0" if on_a_space else "127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument("--mcp", action="store_true", help="let other programs use the page as a tool (MCP)")
    parser.add_argument("--server", dest="servers", action="append", default=[], metavar="URL", help=SERVER_HELP)
    parser.add_argument("--public", action="store_true", default=on_a_space, help=PUBLIC_HELP)
    parser.add_argument("--feedback", action="store_true", help="keep votes and corrections on a public page too")
    parser.add_argument("--auth", action="append", default=[], metavar="NAME[:FILE]", help=AUTH_HELP)
    parser.add_argument("--metrics", action="store_true", help="answer /healthz, and /metrics for Prometheus")
    parser.add_argument("--log-json", action="store_true", help="write the log as JSON, one object a line")
    return parser.parse_args([*shlex.split(os.environ.get(VARIABLE, "")), *arguments])
