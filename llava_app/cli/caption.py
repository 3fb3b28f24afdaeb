"""python -m llava_app caption: a folder of pictures → JSON lines of file names and captions."""

import argparse
import json
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from functools import partial
from pathlib import Path

from tqdm import tqdm

from llava_app.chat import reply
from llava_app.cli.options import PICTURES, add_model, add_sampling, open_engine, sampling
from llava_app.conversation import Conversation
from llava_app.engine import Engine, Sampling
from llava_app.errors import DataError, UserError
from llava_app.images import open_image

QUESTION = "Describe this picture."
OUT = "captions.jsonl"
BEGIN = b'{"file": '  # of every line


def main(arguments: Sequence[str]) -> int:
    """Caption what has no caption yet; 1 when a picture could not be read, which is tried again next time."""
    parser = argparse.ArgumentParser(prog="python -m llava_app caption", description="Started again, it goes on.")
    parser.add_argument("folder", type=Path, help="of pictures; folders in it are read as well")
    parser.add_argument("--out", type=Path, help=f"JSON lines (default: {OUT} in the folder)")
    parser.add_argument("--question", default=QUESTION, help="default: %(default)s")
    add_model(parser)
    add_sampling(parser, Sampling(temperature=0))
    options = parser.parse_args(arguments)
    settings, out = sampling(options), options.out or options.folder / OUT
    names = picture_names(options.folder)
    waiting = sorted(names - captioned(out)) if out.exists() else sorted(names)
    print(f"{len(names)} pictures, {len(names) - len(waiting)} of them captioned already.", file=sys.stderr)
    if not waiting:
        return 0
    with closing(open_engine(options)) as engine:
        caption = partial(_caption, engine, options.folder, question=options.question, sampling=settings)
        with closing(_several(caption, waiting, at_once=_rows(engine))) as results:
            unread = _write(tqdm(results, total=len(waiting), unit="picture", disable=None), out)
    for error in unread:
        print(f"No caption: {error}", file=sys.stderr)
    print(f"{len(waiting) - len(unread)} captions written to {out}, {len(unread)} not.", file=sys.stderr)
    return 1 if unread else 0


def picture_names(folder: Path) -> set[str]:
    """The pictures below `folder`, known by their endings, as paths in it. Raises DataError when there are none."""
    names = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURES and path.is_file()
    }
    if not names:
        raise DataError(f"There are no pictures in {folder}. Give a folder of PNG, JPEG, WebP or HEIC files.")
    return names


def captioned(out: Path) -> set[str]:
    """The files that have their line in `out`. What a crash left of a last line is cut off.

    Raises DataError, and changes nothing, when there is something else in the file.
    """
    written = out.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    cut = written[len(whole) :]
    lines = whole.splitlines()
    if not cut.startswith(BEGIN[: len(cut)]):
        lines.append(cut)
    names = set()
    for number, line in enumerate(lines, start=1):
        try:
            names.add(json.loads(line)["file"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"Line {number} of {out} is no caption. Remove it, or give another --out.") from error
    if cut:
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return names


def _rows(engine: Engine) -> int:
    """How many pictures the engine can read at once."""
    snapshot = engine.snapshot()
    return snapshot.rows if snapshot else 1


def _several(
    caption: Callable[[str], str | UserError], names: Sequence[str], *, at_once: int
) -> Generator[tuple[str, str | UserError], None, None]:
    """Each file with its caption, or with what is wrong with it, as they are done. Closing it drops the rest."""
    pool = ThreadPoolExecutor(at_once, thread_name_prefix="caption")
    try:
        running = {pool.submit(caption, name): name for name in names}
        for future in as_completed(running):
            yield running[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _caption(engine: Engine, folder: Path, name: str, *, question: str, sampling: Sampling) -> str | UserError:
    try:
        asked = Conversation().ask(question, [open_image(folder / name, "this file")])
        return [progress.text for progress in reply(engine, asked, sampling)][-1].strip()
    except UserError as error:
        return error


def _write(results: Iterable[tuple[str, str | UserError]], out: Path) -> list[str]:
    """Add a line for every caption, at once, and return what went wrong with the others, in the order of the files."""
    unread = {}
    with out.open("a", encoding="utf-8") as file:
        for name, caption in results:
            if isinstance(caption, UserError):
                unread[name] = f"{name}: {caption}"
                continue
            file.write(json.dumps({"file": name, "caption": caption}, ensure_ascii=False) + "\n")
            file.flush()
    return [unread[name] for name in sorted(unread)]
