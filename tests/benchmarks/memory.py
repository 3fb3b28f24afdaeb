"""What a model really takes, beside what `llava_app.memory` says before it is loaded, on a CPU."""

import multiprocessing
import resource
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from llava_app.checkpoints import Card, read_card, write_card
from llava_app.conversation import Conversation
from llava_app.engine import Sampling
from llava_app.engine.local import LocalEngine
from llava_app.loading import Loaded, load

LENGTH = 2048  # tokens of the one conversation, all of them filled


def memory_rows(loaded: Loaded) -> Iterator[tuple[str, float, float, float, float | None, str]]:
    """Peak of a process of its own that loads the model, in two precisions, and fills one conversation."""
    with tempfile.TemporaryDirectory() as folder:
        loaded.model.save_pretrained(folder, max_shard_size="200MB")
        loaded.processor.save_pretrained(folder)
        write_card(Path(folder), replace(loaded.card, source=folder))
        for precision in ("float32", "8bit"):
            measured, planned = _in_a_new_process(read_card(Path(folder)), precision)
            yield f"memory of 500M in {precision}", measured / 1e9, planned / 1e9, measured / planned, None, "GB"


def _in_a_new_process(card: Card, precision: str) -> tuple[float, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (card, precision))


def _measure(card: Card, precision: str) -> tuple[float, float]:
    """Bytes above what Python and torch take by themselves: the peak, and what was planned."""
    torch.ones(512, 512) @ torch.ones(512, 512)
    before = psutil.Process().memory_info().rss
    loaded = load(card, precision)
    plan = replace(loaded.plan, rows=1, length=LENGTH)
    engine = LocalEngine(loaded, plan=plan)
    question = Conversation().ask("word " * (LENGTH // 3))
    for _ in engine.answer(question, Sampling(temperature=0, max_new_tokens=LENGTH)):
        pass
    held = engine.snapshot().tokens_held
    engine.close()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    planned = plan.need.weights + plan.need.step + held * plan.token_bytes
    return peak - before, planned
