"""How much of a model's context one picture takes, where a model's parameters are, and what the published ones need.

python -m llava_app lens --family llava-1.6 --size 1344x672
python -m llava_app lens --model memeworld
python -m llava_app lens --catalogue
"""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

from llava_app.lens import Economy, Published, Share, economy, families, published, shares, size_of

SIZES = ("336x336", "640x480", "1344x672", "1920x1080")


def main(arguments: Sequence[str]) -> int:
    """Print the tables asked for. Raises UserError."""
    options = _parser().parse_args(arguments)
    rows, line = _rows(options)
    if options.json:
        print(*(json.dumps(vars(row)) for row in rows), sep="\n")
    else:
        print(*map(line, rows), sep="\n")
    return 0


def _rows(options: argparse.Namespace) -> tuple[Sequence[Any], Callable[[Any], str]]:
    """The rows of the table asked for, and how one is written for people."""
    if options.catalogue:
        return published(), _published_line
    if options.model:
        return economy(options.model), _economy_line
    return _all_shares(options), _share_line


def _all_shares(options: argparse.Namespace) -> list[Share]:
    sizes = [size_of(text) for text in options.size or SIZES]
    return [share for family in options.family or families() for share in shares(family, sizes)]


def _share_line(row: Share) -> str:
    taken = "  ".join(f"{int(context) // 1024}k {share:6.1%}" for context, share in row.share.items())
    bar = "█" * min(40, round(40 * row.share["4096"]))
    size = f"{row.width}×{row.height}"
    return f"{row.family:16}  {size:>11}  {row.tiles:2} tiles  {row.visual_tokens:5} tokens  {taken}  {bar}"


def _economy_line(row: Economy) -> str:
    stages = "  ".join(f"{stage}: {'trains' if learns else 'frozen'}" for stage, learns in row.trained.items())
    return f"{row.part:15} {row.parameters:14,}  {row.of_all:6.1%}  {stages}"


def _published_line(row: Published) -> str:
    needs = "  ".join(f"{precision} {size / 1e9:.1f} GB" for precision, size in row.memory.items())
    return f"{row.name:21} {row.parameters / 1e9:5.1f} B  {row.context:6,} tokens  {needs}  {row.licence}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava_app lens", description=__doc__.split("\n")[0])
    parser.add_argument("--family", action="append", choices=families(), help="several may be given (default: all)")
    parser.add_argument("--size", action="extend", nargs="+", metavar="WIDTHxHEIGHT", help="of the picture, in pixels")
    parser.add_argument("--model", help="instead: where the parameters of this model are, and which stage trains them")
    parser.add_argument("--catalogue", action="store_true", help="instead: the published models and what they need")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    return parser
