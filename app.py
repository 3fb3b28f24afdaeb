"""Open the page: python app.py [--model NAME_OR_FOLDER]."""

import argparse
import os
from pathlib import Path

# As in llava_app.loading, which would import torch.
PRECISIONS = ("auto", "4bit", "8bit", "bfloat16", "float16", "float32")
SERVER_HELP = "models of a server as well: http://host:8000/v1, with #NAME for one it does not list; may be repeated"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the page."""
    on_a_space = "SPACE_ID" in os.environ
    parser = argparse.ArgumentParser(description="A page to talk to a LLaVA.")
    parser.add_argument("--model", help="name, Hub id or folder of the model to start with (default: what fits here)")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="default: auto, from the machine")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of trained models (default: runs)")
    parser.add_argument("--host", default="0.0.0.0" if on_a_space else "127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument("--mcp", action="store_true", help="let other programs use the page as a tool (MCP)")
    parser.add_argument("--server", dest="servers", action="append", default=[], metavar="URL", help=SERVER_HELP)
    return parser.parse_args(arguments)


def main() -> None:
    flags = parse()
    from llava_app.errors import UserError
    from llava_app.ui.page import open_page

    try:
        open_page(**vars(flags))
    except UserError as error:
        raise SystemExit(f"app.py: {error}") from None


if __name__ == "__main__":
    main()
