"""What a model is, as the card in its folder says, and the list of models this machine can choose from."""

import hashlib
import json
import logging
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llava_app.errors import ModelError
from llava_app.presets import PRESETS

logger = logging.getLogger(__name__)

CARD_NAME = "card.json"
LOCK_NAME = ".lock"  # in a run's folder; the process that trains the run holds it
FORMAT = 1
STAGES = ("base", "align", "instruct")
IMAGE_MODES = ("pad", "crop", "anyres")
DESCRIBING = (".json", ".jinja", ".model", ".txt")  # files that say how the weights are read, and are soon hashed
OWN = "own"  # template and image mode of a model that brings no card: what its own files say
DEMO = Path(__file__).parent / "demo"
RUNS = Path("runs")


@dataclass(frozen=True)
class Card:
    """What a model is: everything that the app decides by, so that nothing is read from a name."""

    name: str  # shown in lists
    source: str  # folder path or Hub id
    kind: str  # "built-in" | "run" | "hub" | "server"
    stage: str  # what was trained last: "base" (nothing yet) | "align" | "instruct"
    template: str  # name of the chat template it was trained with
    image_mode: str  # "pad" | "crop" | "anyres" (tiles)
    trained: tuple[str, ...] = ()  # parts that the last stage trained
    base: str | None = None
    base_revision: str | None = None
    data: dict[str, Any] = field(default_factory=dict, hash=False)
    recipe: dict[str, Any] = field(default_factory=dict, hash=False)
    scores: dict[str, Any] = field(default_factory=dict, hash=False)
    files: dict[str, str] = field(default_factory=dict, hash=False)  # path in the folder → sha256, hex
    about: str = ""  # one honest sentence for the page


@dataclass(frozen=True)
class Outlook:
    """What a model would take of this machine, known before it is loaded or downloaded."""

    family: str  # of transformers: "llava" | "llava_next" | "llava_onevision"
    parameters: int
    context: int  # tokens that it was made for
    precision: str  # that it would be loaded in
    needed: float  # bytes, at the least
    free: float  # bytes on its device, with what the models that are loaded now would give back
    download: float  # bytes that are still to come from the Hub, about
    refusal: str | None  # why it cannot be loaded here, and what to do; None when it can


HUB_PRESETS = tuple(
    Card(
        name=preset.name,
        source=preset.source,
        kind="hub",
        stage="instruct",
        template=preset.template,
        image_mode=preset.image_mode,
        about=preset.about,
    )
    for preset in PRESETS
)

# card.json: field → type; `source` and `kind` are not in it, they follow from where it was found.
_ON_DISK: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "stage": str,
    "template": str,
    "image_mode": str,
    "trained": list,
    "base": (str, type(None)),
    "base_revision": (str, type(None)),
    "data": dict,
    "recipe": dict,
    "scores": dict,
    "files": dict,
    "about": str,
}


def read_card(folder: Path) -> Card:
    """The card of a finished checkpoint folder. Raises ModelError when it is missing or malformed, or a file is."""
    path = Path(folder) / CARD_NAME
    shown = f"{path.parent.name}/{CARD_NAME}"  # the page shows errors, and a path is nobody's business there
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent.name} holds no {CARD_NAME}, so it is no finished model. Choose one that is."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{shown} cannot be read ({type(error).__name__}). Restore the file or train the model again."
        ) from error
    _check(stored, path.parent, shown=shown)
    kind = "built-in" if DEMO.resolve() in path.resolve().parents else "run"
    values = {name: stored[name] for name in _ON_DISK} | {"trained": tuple(stored["trained"])}
    return Card(source=str(folder), kind=kind, **values)


def write_card(folder: Path, card: Card) -> None:
    """Finish a checkpoint: hash every file of the folder (but `state/` and `job/`) and write card.json last, by rename.

    Until the rename the folder is not listed, so a crash leaves no half model behind.
    """
    stored = {name: value for name, value in asdict(replace(card, files=_hashes(folder))).items() if name in _ON_DISK}
    temporary = folder / (CARD_NAME + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT} | stored, file, indent=2, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / CARD_NAME)


def check_files(card: Card, folder: Path, *, weights: bool) -> None:
    """Raise ModelError unless the files in `folder` are those that the card was written for.

    Without `weights` only those are looked at that say how the weights are read: the weights of a 7B take nine seconds.
    """
    looked_at = [name for name in card.files if weights or ("/" not in name and name.endswith(DESCRIBING))]
    changed = [name for name in looked_at if not _is(folder / name, card.files[name])]
    if changed:
        raise ModelError(
            f"{', '.join(changed)} of {card.name} changed or went away after its {CARD_NAME} was written. Copy the "
            f"whole folder again; where the change is your own, take that file out of {CARD_NAME}."
        )


def revision(folder: Path) -> str:
    """What tells this model from others of its name: the hash of its card or, from the Hub, the commit."""
    path = folder / CARD_NAME
    return _hash(path) if path.exists() else folder.name


def built_in() -> Card:
    """The small model that this project trained itself and ships. Raises ModelError when its folder is damaged."""
    return read_card(DEMO / "memeworld")


def catalogue(runs: Path = RUNS) -> list[Card]:
    """Models to choose from: built-in ones, finished runs (newest first), Hub presets.

    A folder without a card is unfinished and not listed; a broken one is skipped with a warning in the log.
    """
    return _cards_below(DEMO) + sorted(_cards_below(runs), key=_finished_at, reverse=True) + list(HUB_PRESETS)


def find(name_or_path: str, runs: Path = RUNS) -> Card:
    """The model with this name, Hub id or folder. Raises ModelError that lists what there is.

    A Hub id that is not in the list, or a model's folder without a card, is taken as it is; what the model is shows
    when it is loaded.
    """
    cards = catalogue(runs)
    for card in cards:
        if name_or_path in (card.source, card.name, Path(card.source).name):
            return card
    if Path(name_or_path).is_dir():
        return _of_folder(Path(name_or_path))
    owner = re.fullmatch(r"([\w-][\w.-]*)/[\w.-]+", name_or_path)
    if owner and not Path(owner[1]).exists():  # else it is a path with a mistake in it
        return _cardless(name_or_path, "hub")
    known = ", ".join(card.name for card in cards)
    raise ModelError(
        f"There is no model “{name_or_path}”. Choose one of {known}, or give a model folder or a Hub id (OWNER/NAME)."
    )


def _of_folder(folder: Path) -> Card:
    """The model in a folder. One without a card is used as its own files say, but for a run that is not finished."""
    bare = (folder / "config.json").is_file() and not any((folder / name).exists() for name in (CARD_NAME, "run.yaml"))
    return replace(_cardless(folder.resolve().name, "run"), source=str(folder)) if bare else read_card(folder)


def _cardless(source: str, kind: str) -> Card:
    about = "A model without a card of this app: it is used as its own files say."
    return Card(source, source, kind, stage="instruct", template=OWN, image_mode=OWN, about=about)


def _check(stored: Any, folder: Path, *, shown: str) -> None:
    """Raise ModelError unless `stored` is a complete card of this format whose files are all there."""
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        found = stored.get("format") if isinstance(stored, dict) else type(stored).__name__
        raise ModelError(f"{shown} has format {found}; this version reads format {FORMAT}. Update the app or the card.")
    wrong = [name for name, kind in _ON_DISK.items() if name not in stored or not isinstance(stored[name], kind)]
    wrong += [
        name for name, allowed in (("stage", STAGES), ("image_mode", IMAGE_MODES)) if stored.get(name) not in allowed
    ]
    if wrong:
        raise ModelError(f"{shown} has a missing or wrong {', '.join(dict.fromkeys(wrong))}. Train the model again.")
    absent = [name for name in stored["files"] if not (folder / name).is_file()]
    if absent:
        raise ModelError(f"{folder.name} lacks {', '.join(absent)}. Copy the whole folder again.")


def _cards_below(parent: Path) -> list[Card]:
    cards = []
    for path in sorted(parent.glob(f"*/{CARD_NAME}")):
        try:
            cards.append(read_card(path.parent))
        except ModelError as error:
            logger.warning("Not listed: %s", error)
    return cards


def _finished_at(card: Card) -> float:
    return (Path(card.source) / CARD_NAME).stat().st_mtime


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file that belongs to the model, by its path in the folder."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    unhashed = (CARD_NAME, CARD_NAME + ".tmp", LOCK_NAME, "state/", "job/")
    return {name: _hash(path) for name, path in paths.items() if not name.startswith(unhashed)}


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and _hash(path) == digest


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
