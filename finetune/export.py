"""A finished run → a standard model folder that needs nothing else, with a model card, and on to the Hub if told to."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from PIL import Image

from finetune.checkpoint import save_model, stored_dtype
from finetune.held_out import greedy
from llava_app.adapters import base_of, merge
from llava_app.checkpoints import Card, catalogue, check_files, read_card, revision, write_card
from llava_app.errors import ModelError, TrainingError
from llava_app.evaluations import read_scores
from llava_app.images import Picture
from llava_app.loading import Loaded, load
from llava_app.presets import PRESETS

QUESTIONS = ("What is shown here?", "Which colour is it?", "Describe the picture.", "What is funny about it?")
COLOURS = ("red", "green", "blue", "white")
ANSWER_TOKENS = 32
LEAST_EQUAL = 0.5  # of the answers: 16 bits round, and an even choice between two tokens may fall the other way
CURVE_POINTS = 10
COMMIT = "[0-9a-f]{40}"  # the revision of a base that came from the Hub
HUB_LICENCES = {  # of presets, as the Hub spells them
    "Apache-2.0": ["license: apache-2.0"],
    "Llama 2 Community Licence": ["license: llama2"],
    "Llama 3 Community Licence": ["license: llama3"],
    "Tongyi Qianwen research licence": ["license: other", "license_name: tongyi-qianwen-research"],
}
NO_ROOM = "Adapters are merged in float32: close what else uses the memory, or export on a machine with more."
LICENCES = (
    "The code is Apache-2.0. Weights and data keep their own licences: look at those of the base and of the data "
    "before you hand this on. A LLaVA-1.5 from Vicuna comes under the Llama 2 licence; its instruction data was "
    "written by GPT-4, whose terms hold for it."
)


def export(run: Path, out: Path) -> Card:
    """Merge the run in `run` and write it to `out`, with README.md; returns its card.

    Merging happens in float32 on the unquantised base; the answers of the merged model, as stored, are compared with
    those before. Raises ModelError when there is no finished run or its files changed, TrainingError when `out` is
    taken or most answers changed.
    """
    if out.exists() and any(out.iterdir()):
        raise TrainingError(f"{out} is not empty. Give a new folder.")
    card = read_card(run)
    check_files(card, run, weights=True)
    loaded = load(card, "float32", advice=NO_ROOM)
    before = _answers(loaded)
    base = base_of(card, run)
    dtype = stored_dtype(Path(loaded.model.name_or_path))
    if dtype == torch.float32:
        dtype = torch.bfloat16
    merge(loaded.model)
    save_model(out, loaded.model, loaded.model.state_dict(), processor=loaded.processor, dtype=dtype)
    scores = {
        score.suite: f"{score.value:.1f} % of {score.count:,} questions, before export" for score in read_scores(run)
    }
    merged = replace(card, source=str(out), base=base.name if base else card.base, scores=card.scores | scores)
    write_card(out, merged)
    equal = _compare(before, _answers(load(read_card(out), "float32", advice=NO_ROOM)))
    (out / "README.md").write_text(model_card(merged, _curve(run), equal=equal, dtype=dtype), encoding="utf-8")
    write_card(out, merged)  # again: it holds the hashes of all files
    return merged


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to the Hub, privately at first; returns its address.

    The token is the one that `hf auth login` stored. Raises ModelError when the Hub refuses or cannot be reached.
    """
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message=f"Upload {folder.name}")
    except (OSError, HTTPError, ValueError) as error:
        raise ModelError(f"{repository} was not uploaded: {error}. Log in with `hf auth login`, then again.") from error
    return f"https://huggingface.co/{repository}"


def model_card(card: Card, curve: Sequence[dict[str, Any]], *, equal: float, dtype: torch.dtype) -> str:
    """README.md: front matter that the Hub reads, then what the model is, where it comes from and how good it is."""
    refused = sum(card.data.get("refused", {}).values())
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "tags: [llava]",
        *origin(card),
        "---",
        "",
        f"# {card.name}",
        "",
        card.about,
        "",
        f"Base: {card.base} (revision {card.base_revision}). Stored in {str(dtype).removeprefix('torch.')}. "
        f"Chat template: {card.template}. Pictures: {card.image_mode}.",
        f"Before and after export, {equal:.0%} of {len(QUESTIONS)} greedy answers are the same, word for word.",
        "",
        "## Data",
        "",
        f"{card.data.get('records', 0):,} records of {card.data.get('file')} "
        f"(sha256 {str(card.data.get('sha256'))[:16]}…); {refused:,} were refused.",
        "",
        "## Recipe",
        "",
        *(f"- {name}: {value}" for name, value in card.recipe.items() if value is not None),
        "",
        "## Scores",
        "",
        *([f"- {name}: {value}" for name, value in card.scores.items()] or ["Not measured yet."]),
        "",
        "## Curve",
        "",
        "| step | loss | held-out loss |",
        "|---|---|---|",
        *(f"| {line['step']} | {_number(line.get('loss'))} | {_number(line.get('held_out_loss'))} |" for line in curve),
        "",
        "## Licences",
        "",
        LICENCES,
        "",
    ]
    return "\n".join(lines)


def origin(card: Card) -> list[str]:
    """What the Hub is told of the base: its id and its licence, each where it is known."""
    shipped = [revision(Path(other.source)) for other in catalogue() if other.kind == "built-in"]
    if card.base_revision in shipped:
        return ["license: apache-2.0"]
    if not re.fullmatch(COMMIT, str(card.base_revision)):
        return []
    preset = next((preset for preset in PRESETS if card.base in (preset.name, preset.source)), None)
    lines = [f"base_model: {preset.source if preset else card.base}"]
    return lines + (HUB_LICENCES[preset.licence] if preset else [])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _curve(run: Path) -> list[dict[str, Any]]:
    """Steps evenly spread over the run's log, each with the losses measured there."""
    steps: dict[int, dict[str, Any]] = {}
    for line in map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines()):
        steps.setdefault(line["step"], {}).update(line)
    points = list(steps.values())
    measured = [line for line in points if "held_out_loss" in line]
    spread = points[:: max(1, len(points) // CURVE_POINTS)] + measured + points[-1:]
    return sorted({line["step"]: line for line in spread}.values(), key=lambda line: line["step"])


def _answers(loaded: Loaded) -> list[list[int]]:
    """Token ids of greedy answers to QUESTIONS, each about a picture of one colour."""
    pictures = [Picture(Image.new("RGB", (64, 64), colour), colour) for colour in COLOURS]
    return [
        greedy(loaded.model, loaded.processor, question, [picture], tokens=ANSWER_TOKENS)
        for question, picture in zip(QUESTIONS, pictures, strict=True)
    ]


def _compare(before: list[list[int]], after: list[list[int]]) -> float:
    """The share of equal answers. Raises TrainingError below LEAST_EQUAL."""
    equal = sum(one == other for one, other in zip(before, after, strict=True)) / len(before)
    if equal < LEAST_EQUAL:
        raise TrainingError(f"Only {equal:.0%} of the answers stayed the same in the merge. It cannot be trusted.")
    return equal
