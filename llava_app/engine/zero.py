"""A model on ZeroGPU, where Hugging Face lends a Space a GPU for the seconds of one answer.

Its package `spaces`, which is there on a Space alone, makes the thread that imports it believe that there is a GPU.
What that thread has moved onto it before the page opens is really there in a fork of this process, in which an answer
is written. So the model is loaded here, not in the process of `engine.process`, and by the main thread.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import spaces  # before torch, which it changes
import torch

from llava_app.checkpoints import Card
from llava_app.conversation import Conversation
from llava_app.engine import Piece, Sampling
from llava_app.engine.local import LocalEngine
from llava_app.errors import BusyError, UserError
from llava_app.loading import load
from llava_app.memory import free_bytes, make_plan, need

PRECISION = "bfloat16"
LONGEST = 60  # s that the GPU is asked for; an answer ends then
GPU = "cuda"
NO_GPU = (
    "There is no GPU for this question now, or your share of the day is used up. Wait a little, then send it again."
)


class ZeroEngine:
    """An engine whose answers come from a fork. To be made before the page opens."""

    def __init__(self, card: Card) -> None:
        """Raises ModelError as `loading.load`."""
        loaded = load(card, PRECISION, device=torch.device("cpu"))
        loaded.model.to(GPU)
        self.card = loaded.card
        self.why = "Runs in bfloat16 on a GPU that is lent for each answer."

        @cache
        def engine() -> LocalEngine:
            """In the fork, as long as that lives."""
            device = torch.device(GPU)
            plan = make_plan(
                need(loaded.model.config, PRECISION), free_bytes(device), name=card.name, precision=PRECISION
            )
            return LocalEngine(replace(loaded, device=device), plan=plan, time_limit=LONGEST)

        @spaces.GPU(duration=LONGEST)
        def on_gpu(conversation: Conversation, sampling: Sampling) -> Iterator[Piece | UserError]:
            try:
                yield from engine().answer(conversation, sampling)
            except UserError as error:  # of an exception only the name of its class would arrive
                yield error.with_traceback(None)

        self._on_gpu = on_gpu

    def answer(self, conversation: Conversation, sampling: Sampling) -> Iterator[Piece]:
        """Stream the answer to the open last turn; see `Engine.answer`. Raises BusyError when no GPU is lent."""
        yield Piece("", phase="queued")
        try:
            for item in self._on_gpu(conversation, sampling):
                if isinstance(item, UserError):
                    raise item
                yield item
        except UserError:
            raise
        except Exception as error:  # of `spaces`, which raises errors of Gradio
            raise BusyError(NO_GPU) from error

    def snapshot(self) -> None:
        """Nothing: it is the fork that could know."""

    def close(self) -> None:
        """Nothing: the memory belongs to the fork, which Hugging Face ends."""
