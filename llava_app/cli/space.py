"""python -m llava_app space NAME: the page, and a model of one's own, as a Space on Hugging Face."""

import argparse
import os
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError

from llava_app.checkpoints import RUNS, Card, check_files, find
from llava_app.errors import UserError
from llava_app.flags import VARIABLE

ROOT = Path(__file__).parents[2]
APP = ("app.py", "README.md", "LICENSE", "requirements.txt", "llava_app", "examples")
# What pages and models are made of. Other files, and hidden ones, are somebody's own and stay here.
KINDS = ["py", "js", "css", "html", "svg", "png", "md", "txt", "conf", "jinja", "json", "safetensors", "model"]
LOGIN = "gradio[oauth]  # for hf_oauth in README.md\n"  # its packages authlib and itsdangerous
LEFT_OUT = ("__pycache__", "state", "job")  # folders: compiled code, and what a training run needs to go on


def main(arguments: Sequence[str]) -> int:
    """Upload, and say where it is. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m llava_app space", description="The page as a public Space.")
    parser.add_argument("name", help="NAME, or OWNER/NAME; a Space of this name is brought up to date")
    parser.add_argument("--model", help="name, Hub id or folder of the model to start with (default: what fits there)")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of trained models (default: %(default)s)")
    parser.add_argument("--private", action="store_true", help="for you alone")
    parser.add_argument("--login", action="store_true", help="only for people who sign in with Hugging Face")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be uploaded")
    options = parser.parse_args(arguments)
    card = find(options.model, options.runs) if options.model else None
    files, start = space_files(card), start_with(card) if card else None
    size = sum(path.stat().st_size for path in files.values())
    if options.dry_run:
        print(*files, sep="\n")
    print(f"{len(files)} files, {size / 1e6:,.0f} MB" + (f", {VARIABLE}=--model {start}" if start else ""))
    if not options.dry_run:
        sent: dict[str, Path | bytes] = {**files, **(with_login() if options.login else {})}
        print(upload(options.name, sent, model=start, private=options.private))
    return 0


def space_files(card: Card | None) -> dict[str, Path]:
    """What the Space is made of: path in the Space → file here. The model of `card` is in it if it is no Hub model.

    Raises ModelError when the model is an adapter and its base is not here, or a file is not what its card says.
    """
    files = {path.relative_to(ROOT).as_posix(): path for path in _tracked() or _released()}
    for model in _with_base(card) if card and card.kind == "run" else ():
        folder = Path(model.source)
        check_files(model, folder, weights=True)
        names = {path.relative_to(folder).as_posix() for path in _below(folder)} | model.files.keys()
        files |= {f"runs/{folder.name}/{inside}": folder / inside for inside in sorted(names)}
    return files


def with_login() -> dict[str, bytes]:
    """The files that differ where people sign in: path in the Space → content. The Hub adds the OAuth client."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("---\n", "---\nhf_oauth: true\n", 1)
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8") + LOGIN
    return {"README.md": readme.encode(), "requirements.txt": requirements.encode()}


def start_with(card: Card) -> str:
    """How the Space names the model."""
    return f"runs/{Path(card.source).name}" if card.kind == "run" else card.source if card.kind == "hub" else card.name


def upload(name: str, files: Mapping[str, Path | bytes], *, model: str | None, private: bool) -> str:
    """Make the Space `name` of these files, starting with `model`, and give its address. Raises UserError.

    Of a Space that is there already, what an earlier upload brought and `files` lack goes, and the flags other than
    --model stay.
    """
    api = HfApi()
    try:
        space = api.create_repo(name, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        there = api.list_repo_files(space.repo_id, repo_type="space")
        gone = [CommitOperationDelete(path) for path in there if path not in files and _is_ours(path)]
        added = [CommitOperationAdd(inside, path) for inside, path in files.items()]
        api.create_commit(space.repo_id, [*gone, *added], commit_message="The page", repo_type="space")
        _set_model(api, space.repo_id, model)
    except (OSError, HTTPError, ValueError) as error:
        raise UserError(
            f"The Space {name} could not be made ({type(error).__name__}). Log in with “hf auth login”, with a token "
            "that may write, check the name, then run this again."
        ) from error
    return str(space)


def with_model(flags: str, model: str | None) -> str:
    """The flags of a Space with this model in place of another; None is what fits there."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model")
    others = parser.parse_known_args(shlex.split(flags))[1]
    return shlex.join([*others, *(("--model", model) if model else ())])


def _set_model(api: HfApi, space: str, model: str | None) -> None:
    known = api.get_space_variables(space)
    before = known[VARIABLE].value if VARIABLE in known else ""
    after = with_model(before, model)
    if after:
        api.add_space_variable(space, VARIABLE, after)
    elif before:
        api.delete_space_variable(space, VARIABLE)


def _is_ours(path: str) -> bool:
    """Whether an upload brings files of this place in a Space."""
    return path.split("/")[0] in (*APP, "runs")


def _tracked() -> list[Path]:
    """The page's files that git knows; none where this is no repository."""
    command = ["git", "ls-files", "-z", "--", *APP]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [path for name in os.fsdecode(listed).split("\0") if name and (path := ROOT / name).is_file()]


def _released() -> list[Path]:
    """The page's files in a folder that is no repository."""
    folders = (path for name in APP if (ROOT / name).is_dir() for path in _below(ROOT / name))
    return [*(ROOT / name for name in APP if (ROOT / name).is_file()), *folders]


def _below(folder: Path) -> Iterable[Path]:
    """Every file of the folder of the KINDS, but for those in LEFT_OUT."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_own = any(part in LEFT_OUT or part.startswith(".") for part in parts)
        if path.suffix[1:] in KINDS and not is_own and path.is_file():
            yield path


def _with_base(card: Card) -> list[Card]:
    """The model, and where it is an adapter its base, if that lies here too."""
    from llava_app.adapters import base_of  # torch takes seconds to import; a wrong name is told at once

    base = base_of(card, Path(card.source))
    return [card, *([base] if base and base.kind == "run" else [])]
