"""The models' side of `process`: what the process does that models are loaded into."""

import os
import pickle
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import torch

from llava_app.checkpoints import Card, Outlook
from llava_app.conversation import Conversation
from llava_app.engine import Sampling
from llava_app.engine.local import LocalEngine
from llava_app.engine.process import Opened
from llava_app.engine.watch import Snapshot
from llava_app.errors import ModelError, UserError
from llava_app.loading import Shelf, load
from llava_app.memory import free_bytes
from llava_app.outlook import default_card, outlook
from llava_app.precision import best_device


class Host:
    """Loads models and answers with them, as the calls say that come through the pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._engines: dict[int, LocalEngine] = {}
        self._shelf = Shelf()
        self._numbers = count()
        self._given_up: dict[int, threading.Event] = {}

    def work(self) -> None:
        """Read calls until there is nobody who could make one. Each is answered by a thread of its own."""
        while True:
            try:
                number, verb, arguments = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)
            if verb == "stop":
                self._given_up.pop(number).set()
                continue
            given_up = self._given_up[number] = threading.Event()
            threading.Thread(target=self._do, args=(number, verb, arguments, given_up), daemon=True).start()

    def _do(self, number: int, verb: str, arguments: tuple[Any, ...], given_up: threading.Event) -> None:
        try:
            if verb == "answer":
                self._answer(number, *arguments, given_up=given_up)
            else:
                self._send(number, getattr(self, f"_{verb}")(*arguments))
        except UserError as error:
            self._send(number, error.with_traceback(None))
        except Exception as error:  # the page's side writes it into the log, under a number
            self._send(number, RuntimeError(f"in the models' process:\n{traceback.format_exc()}"))
            if isinstance(error, torch.AcceleratorError):  # CUDA computes nothing more in a process that had one
                os._exit(1)

    def _choose(self) -> tuple[Card, str]:
        return default_card()

    def _weigh(self, cards: Sequence[Card], precision: str) -> dict[Card, Outlook]:
        closing = [engine for engine in list(self._engines.values()) if engine.card.kind != "built-in"]
        held = sum(engine.held for engine in closing) - self._promised()
        found = {}
        for card in cards:
            with suppress(ModelError):  # which loading it will tell
                found[card] = outlook(card, precision, given_back=held)
        return {card: expected for card, expected in found.items() if expected}

    def _free(self) -> float:
        return free_bytes(best_device()) - self._promised()

    def _promised(self) -> float:
        return sum(engine.promised for engine in list(self._engines.values()))

    def _load(self, card: Card, precision: str, share: float) -> tuple[int, Opened]:
        number = next(self._numbers)
        try:
            loaded = load(card, precision, share=share, promised=self._promised(), shelf=self._shelf)
            self._engines[number] = LocalEngine(loaded)
        except torch.OutOfMemoryError:  # somebody else took what the plan counted on
            self._shelf.clear()
            raise ModelError(
                f"The GPU has too little free memory for {card.name}. "
                "Close what else uses it, or choose a smaller model."
            ) from None
        return number, Opened(loaded.why, pickle.dumps((loaded.processor, loaded.plan)))

    def _answer(
        self, number: int, engine: int, conversation: Conversation, sampling: Sampling, *, given_up: threading.Event
    ) -> None:
        told: tuple[Any, ...] = ()
        for piece in self._engines[engine].answer(conversation, sampling):
            if given_up.is_set():
                return
            if piece.text or piece.finish or piece.left_out or (piece.phase, piece.wait) != told:
                self._send(number, piece)
            told = piece.phase, piece.wait

    def _snapshot(self, engine: int) -> Snapshot | None:
        return self._engines[engine].snapshot()

    def _close(self, engine: int) -> None:
        self._engines.pop(engine).close()

    def _clear(self) -> None:
        self._shelf.clear()

    def _send(self, number: int, item: Any) -> None:
        with self._sending:
            self._connection.send((number, item))
