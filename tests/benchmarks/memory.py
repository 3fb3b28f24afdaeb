"""What a model really takes, beside what `llava_app.memory` says before it is loaded, on a CPU."""

import multiprocessing
import tempfile
import threading
import time
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
    before = _own()
    peak = _Peak()
    loaded = load(card, precision)
    plan = replace(loaded.plan, rows=1, length=LENGTH)
    engine = LocalEngine(loaded, plan=plan)
    question = Conversation().ask("word " * (LENGTH // 3))
    for _ in engine.answer(question, Sampling(temperature=0, max_new_tokens=LENGTH)):
        pass
    held = engine.snapshot().tokens_held
    engine.close()
    planned = plan.need.weights + plan.need.step + held * plan.token_bytes
    return peak.bytes - before, planned


def _own() -> int:
    """Bytes that only this process can give back; a mapped file's pages are the system's."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


class _Peak:
    """The most that this process had, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.bytes = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, _own())
            time.sleep(0.003)
