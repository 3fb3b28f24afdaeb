"""A trained folder → one that lies in the repository: small files, a card that says what it knows."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from llava_app.checkpoints import read_card, write_card

SHARD = "6MB"  # git hosts warn about large files; the page loads shards like one file
KEPT = ("*.jinja", "tokenizer*.json", "processor_config.json")
ABOUT = {
    "memeworld": "A tiny LLaVA that this project trained itself. It knows only its drawn world: sixteen things, eight "
    "colours, five backgrounds and their captions. Photographs and people mean nothing to it.",
    "memeworld-base": "What the built-in model was trained from: a vision tower and a language model whose projector "
    "has learned nothing, so it cannot see.",
}


def ship(source: Path, target: Path) -> None:
    """Copy a finished checkpoint to `target`, named after its folder, in float16 and in shards."""
    shutil.rmtree(target, ignore_errors=True)
    model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float16, use_safetensors=True)
    model.save_pretrained(target, max_shard_size=SHARD)
    for pattern in KEPT:
        for file in source.glob(pattern):
            shutil.copy(file, target)
    write_card(target, replace(read_card(source), name=target.name, about=ABOUT[target.name]))
