"""Where the files of a model lie, and those of the Hub that are not here yet. Without torch: the page looks, too."""

import shutil
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HTTPError
from huggingface_hub.file_download import repo_folder_name

from llava_app.checkpoints import Card
from llava_app.errors import ModelError

HUB_TIMEOUT = 5.0  # seconds after which the Hub counts as unreachable
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]


def folder_of(card: Card) -> Path:
    """Where the files of `card` lie; those of a Hub model are downloaded first unless they are here already."""
    if card.kind != "hub":
        return Path(card.source)
    try:
        return Path(snapshot_download(card.source, allow_patterns=HUB_FILES, local_files_only=not hub_answers(card)))
    except (OSError, HTTPError) as error:
        raise ModelError(
            f"{card.name} is not complete on this machine and the Hub did not deliver {card.source}. "
            "Connect to the internet and try again, or choose the built-in model."
        ) from error


def hub_answers(card: Card) -> bool:
    """Whether the Hub offers the model right now: one short question, since downloads would retry for minutes."""
    try:
        HfApi().model_info(card.source, timeout=HUB_TIMEOUT)
    except (OSError, HTTPError):
        return False
    return True


def here(card: Card) -> Path | None:
    """Where its files lie; None for a Hub model that has not been downloaded, and for one on a server."""
    if card.kind != "hub":
        return Path(card.source) if card.kind != "server" else None
    try:
        return Path(snapshot_download(card.source, allow_patterns=HUB_FILES, local_files_only=True))
    except OSError:
        return None


def no_room(download: float, *, name: str) -> str | None:
    """Why the disk does not take a download of so many bytes, if it does not."""
    folder = next(path for path in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if download <= free:
        return None
    return (
        f"{name} takes {download / 1e9:.1f} GB on the disk and {free / 1e9:.1f} GB are free there. "
        "Make room, set HF_HOME to a folder on another disk, or choose a smaller model."
    )


def fetched(card: Card) -> int:
    """Bytes of a Hub model that are on this machine, those of a download that runs included."""
    blobs = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=card.source, repo_type="model") / "blobs"
    sizes = 0
    for path in blobs.glob("*"):
        with suppress(FileNotFoundError):  # renamed as it was complete
            sizes += path.stat().st_size
    return sizes
