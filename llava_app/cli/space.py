"""python -m llava_app space NAME: the page, and a model of one's own, as a Space on Hugging Face."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HTTPError

from llava_app.checkpoints import RUNS, Card, check_files, find
from llava_app.errors import UserError
from llava_app.flags import VARIABLE

ROOT = Path(__file__).parents[2]
APP = ("app.py", "README.md", "LICENSE", "requirements.txt", "llava_app", "examples")
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
    files, flags = space_files(card), f"--model {start_with(card)}" if card else ""
    size = sum(path.stat().st_size for path in files.values())
    if options.dry_run:
        print(*files, sep="\n")
    print(f"{len(files)} files, {size / 1e6:,.0f} MB" + (f", {VARIABLE}={flags}" if flags else ""))
    if not options.dry_run:
        sent: dict[str, Path | bytes] = {**files, **(with_login() if options.login else {})}
        print(upload(options.name, sent, flags=flags, private=options.private))
    return 0


def space_files(card: Card | None) -> dict[str, Path]:
    """What the Space is made of: path in the Space → file here. The model of `card` is in it if it is no Hub model.

    Raises ModelError when the model is an adapter and its base is not here, or a file is not what its card says.
    """
    paths = [path for name in APP for path in _below(ROOT / name)]
    files = {path.relative_to(ROOT).as_posix(): path for path in paths}
    for model in _with_base(card) if card and card.kind == "run" else ():
        folder = Path(model.source)
        check_files(model, folder, weights=True)
        files |= {f"runs/{folder.name}/{path.relative_to(folder).as_posix()}": path for path in _below(folder)}
    return files


def with_login() -> dict[str, bytes]:
    """The files that differ where people sign in: path in the Space → content. The Hub adds the OAuth client."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("---\n", "---\nhf_oauth: true\n", 1)
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8") + LOGIN
    return {"README.md": readme.encode(), "requirements.txt": requirements.encode()}


def start_with(card: Card) -> str:
    """How the Space names the model."""
    return f"runs/{Path(card.source).name}" if card.kind == "run" else card.source if card.kind == "hub" else card.name


def upload(name: str, files: Mapping[str, Path | bytes], *, flags: str, private: bool) -> str:
    """Make the Space `name` of these files, with the page's `flags`, and give its address. Raises UserError."""
    api = HfApi()
    try:
        space = api.create_repo(name, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        if flags:
            api.add_space_variable(space.repo_id, VARIABLE, flags)
        added = [CommitOperationAdd(inside, path) for inside, path in files.items()]
        api.create_commit(space.repo_id, added, commit_message="The page", repo_type="space")
    except (OSError, HTTPError, ValueError) as error:
        raise UserError(
            f"The Space {name} could not be made ({type(error).__name__}). Log in with “hf auth login”, with a token "
            "that may write, check the name, then run this again."
        ) from error
    return str(space)


def _below(path: Path) -> Iterator[Path]:
    """The file, or every file of the folder that belongs to it."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    return (file for file in found if file.is_file() and not set(LEFT_OUT) & set(file.relative_to(path).parts))


def _with_base(card: Card) -> list[Card]:
    """The model, and where it is an adapter its base, if that lies here too."""
    from llava_app.adapters import base_of  # torch takes seconds to import; a wrong name is told at once

    base = base_of(card, Path(card.source))
    return [card, *([base] if base and base.kind == "run" else [])]
