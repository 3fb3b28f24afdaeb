"""python -m llava_app doctor: what this machine has, what the app makes of it, and what to mend."""

import argparse
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

from llava_app.checkpoints import HUB_PRESETS, RUNS, built_in, catalogue
from llava_app.errors import UserError

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
DOWNLOAD_BYTES = 14e9  # LLaVA-1.5-7B in 16 bit, as the Hub has it
LITTLE_MEMORY = 2e9  # bytes, below which even a small model may not find its room beside the page


@dataclass(frozen=True)
class Finding:
    """One line of the report, and what to do where something is wrong."""

    about: str
    found: str
    remedy: str | None = None


def main(arguments: Sequence[str]) -> int:
    """Print the report; 1 when there is something to mend."""
    parser = argparse.ArgumentParser(prog="python -m llava_app doctor", description="What is here, and what to mend.")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of trained models (default: %(default)s)")
    options = parser.parse_args(arguments)
    remedies = []
    for finding in examine(options.runs):
        print(f"{finding.about:12} {finding.found}", flush=True)
        if finding.remedy:
            remedies.append(f"{finding.about}: {finding.remedy}")
    print("\nTo mend:" if remedies else "\nNothing to mend.", *remedies, sep="\n- ")
    return 1 if remedies else 0


def examine(runs: Path) -> Iterator[Finding]:
    """Everything there is to say, cheap things first; what needs torch only when torch is there."""
    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    packages = list(_packages(REQUIREMENTS.read_text(encoding="utf-8")))
    yield from packages
    yield from _folders(runs)
    if any(finding.remedy for finding in packages):
        return
    try:
        yield from _devices()
        yield from _models(runs)
    except (ImportError, OSError) as error:  # a library that is there but does not start
        yield Finding("Trial", f"broke off: {error}", f"pip install --force-reinstall -r {REQUIREMENTS.name}")


def _packages(requirements: str) -> Iterator[Finding]:
    """The version of each package that `requirements` lists, and whether it is one that this app runs with."""
    for line in requirements.splitlines():
        wanted = Requirement(line.partition("#")[0])
        install = f'pip install "{wanted}"'
        try:
            here = version(wanted.name)
        except PackageNotFoundError:
            yield Finding(wanted.name, "not installed", install)
            continue
        fits = wanted.specifier.contains(here, prereleases=True)
        yield Finding(wanted.name, here, None if fits else f"this app is made for {wanted.specifier}: {install}")


def _devices() -> Iterator[Finding]:
    import torch

    from llava_app.memory import free_bytes
    from llava_app.precision import gpu_fault

    if torch.cuda.is_available() and gpu_fault():
        remedy = "install a build of PyTorch for this GPU (pytorch.org, Get started), or end what has taken it"
        yield Finding("GPU", f"{torch.cuda.get_device_name()}: {gpu_fault()}", remedy)
    elif torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            device = torch.device("cuda", number)
            free, total = free_bytes(device), torch.cuda.get_device_properties(device).total_memory
            yield Finding("GPU", f"{torch.cuda.get_device_name(device)}, {_gb(free)} of {_gb(total)} free")
    elif torch.backends.mps.is_available():
        yield Finding("GPU", "Apple, which shares the memory of the machine")
    elif shutil.which("nvidia-smi"):
        remedy = "install the CUDA build of PyTorch (pytorch.org, Get started), or update the driver"
        yield Finding("GPU", f"an NVIDIA driver, which torch {torch.__version__} cannot use", remedy)
    else:
        yield Finding("GPU", "none that torch can use")
    yield Finding("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch")
    yield _memory(free_bytes(torch.device("cpu")))


def _memory(free: float) -> Finding:
    remedy = f"close other programs; below {_gb(LITTLE_MEMORY)} models may not load" if free < LITTLE_MEMORY else None
    return Finding("Memory", f"{_gb(free)} free", remedy)


def _folders(runs: Path) -> Iterator[Finding]:
    """Where files are kept, and whether there is room."""
    from huggingface_hub.constants import HF_HUB_CACHE

    uploads = os.environ.get("GRADIO_TEMP_DIR") or os.path.join(tempfile.gettempdir(), "gradio")
    yield _folder("Hub models", Path(HF_HUB_CACHE), needed=DOWNLOAD_BYTES, instead="set HF_HOME to a folder on another")
    yield _folder("Uploads", Path(uploads), needed=1e9, instead="set GRADIO_TEMP_DIR to a folder on another")
    yield _folder("Runs", runs, needed=1e9, instead="give --runs with a folder on another")


def _folder(about: str, folder: Path, *, needed: float, instead: str) -> Finding:
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free, kept = shutil.disk_usage(parent).free, _size(folder)
    found = f"{folder.absolute()}: {_gb(kept)} kept, {_gb(free)} free on its disk"
    if not os.access(parent, os.W_OK):
        return Finding(about, found, f"{parent} may not be written to; allow it, or {instead} disk")
    if free + kept < needed:
        return Finding(about, found, f"{_gb(needed)} may be needed; make room, or {instead} disk")
    return Finding(about, found)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _models(runs: Path) -> Iterator[Finding]:
    """Which models there are, which one the app would take, how, and whether the built-in one really answers."""
    from llava_app.outlook import default_card, why_precision

    names = [card.name for card in catalogue(runs) if card not in HUB_PRESETS]
    yield Finding("Models here", ", ".join(names))
    card, why = default_card()
    yield Finding("Starts with", f"{card.name}. {why}")
    yield Finding("Precision", why_precision(card) or f"4 bit on a GPU, once {card.name} is downloaded.")
    yield _trial()


def _trial() -> Finding:
    """Load the built-in model and ask it something."""
    from transformers.utils.logging import disable_progress_bar

    from llava_app.chat import reply
    from llava_app.conversation import Conversation
    from llava_app.engine import Sampling
    from llava_app.engine.local import LocalEngine
    from llava_app.loading import load

    disable_progress_bar()
    began = time.monotonic()
    try:
        engine = LocalEngine(load(built_in()))
        list(reply(engine, Conversation().ask("What is a cat?"), Sampling(temperature=0, max_new_tokens=16)))
        engine.close()
    except UserError as error:
        return Finding("Trial", "the built-in model does not answer", str(error))
    return Finding("Trial", f"the built-in model was loaded and answered in {time.monotonic() - began:.1f} s")


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
