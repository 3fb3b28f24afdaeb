"""The engine that runs a model on this machine, as whoever asks sees it; `worker` computes."""

import threading
from collections.abc import Iterator
from functools import cache
from itertools import takewhile

from torch import Tensor

from llava_app.checkpoints import Card
from llava_app.conversation import Conversation
from llava_app.engine import Piece, Sampling
from llava_app.engine.clips import show_clips
from llava_app.engine.context import fit
from llava_app.engine.request import Request, Shown, collect, features_key
from llava_app.engine.watch import Snapshot
from llava_app.engine.worker import Worker
from llava_app.loading import Loaded
from llava_app.memory import Plan
from llava_app.prompts import Prepared, prepare_shown, seen_together, tokenise

TIME_LIMIT = 300.0  # seconds that one answer may take once it is its turn


class LocalEngine:
    """Answers with a model on this machine: everybody's next tokens in one step, in as many rows as memory allows."""

    def __init__(self, loaded: Loaded, *, plan: Plan | None = None, time_limit: float = TIME_LIMIT) -> None:
        self.card: Card = loaded.card
        self._processor = loaded.processor
        self._device = loaded.device
        self._plan = plan or loaded.plan
        self._worker = Worker(loaded, self._plan, time_limit=time_limit)
        self._waiting: list[Request] = []  # in order, and those that are being answered
        self._closing = threading.Lock()  # nothing enters the inbox behind the None that ends the thread
        self._thread = threading.Thread(target=self._worker.work, name=f"engine {self.card.name}", daemon=True)
        self._thread.start()

    def answer(self, conversation: Conversation, sampling: Sampling) -> Iterator[Piece]:
        """Stream the answer to the open last turn; see `Engine.answer`.

        Raises ContextError when the last question alone leaves no room for an answer, BusyError when the engine is
        closed before its turn came, ModelError when the memory does not suffice.
        """
        request, left_out = self._compose(conversation, sampling)
        self._enqueue(request)
        try:
            finish = None
            if left_out:
                yield Piece("", phase=request.phase, left_out=left_out)
            while finish is None:
                piece = collect(request.outbox, self._heartbeat(request))
                finish = piece.finish
                yield piece
        finally:
            request.given_up.set()
            self._waiting.remove(request)

    @property
    def held(self) -> float:
        """Bytes that closing it gives back."""
        return self._plan.held

    @property
    def promised(self) -> float:
        """Bytes that it may yet take: on a CPU, rows take memory as they are written."""
        if self._device.type != "cpu":
            return 0.0
        return (self._plan.rows * self._plan.length - self._worker.slots.tokens) * self._plan.token_bytes

    def close(self) -> None:
        """End running and waiting answers and let go of the model. Waits for the step in progress."""
        with self._closing:
            if not self._worker.closed:
                self._worker.closed = True
                self._worker.inbox.put(None)
        self._thread.join()

    def snapshot(self) -> Snapshot:
        """What the engine is doing now, for any thread."""
        meter = self._worker.meter
        held = self._worker.slots.tokens
        return Snapshot(
            queued=self._worker.inbox.qsize(),
            answering=len(self._worker.active),
            rows=self._plan.rows,
            tokens_held=held,
            tokens_read=meter.read,
            tokens_reused=meter.reused,
            tokens_written=meter.written,
            pictures_seen=meter.seen,
            pictures_reused=meter.recalled,
            tokens_per_second=meter.rate,
            seconds_to_first=meter.wait,
            cache_bytes=held * self._plan.token_bytes + self._worker.features.bytes,
        )

    def _compose(self, conversation: Conversation, sampling: Sampling) -> tuple[Request, str | None]:
        """Turn the conversation into a prompt that fits, and say what of it had to be left out."""
        if self._worker.closed:
            raise self._worker.put_away()
        conversation, said = show_clips(conversation, self._processor, limit=self._plan.length)
        together = seen_together(conversation, self._processor)
        prepared: dict[str, Prepared] = {}
        lengths: dict[str, int] = {}
        for picture in conversation.pictures:
            key = features_key(picture, together=together)
            features_SD = self._worker.features.get(key)
            if features_SD is None and key not in prepared:
                prepared[key] = prepare_shown(picture, self._processor, together=together)
            lengths[picture.digest] = prepared[key].tokens if features_SD is None else len(features_SD)

        @cache
        def ids(of: Conversation) -> Tensor:
            sizes = [lengths[picture.digest] for picture in of.pictures]
            return tokenise(of, self._processor, picture_tokens=sizes, open_answer=of.is_open)[0]

        limit = self._plan.length
        room = min(sampling.max_new_tokens, limit // 4)
        kept, left_out = fit(conversation, lambda of: len(ids(of)), limit=limit, room=room)
        ids_S = ids(kept)
        begins = (ids_S == self._processor.image_token_id).nonzero()[:, 0].tolist()
        shown = []
        for picture in kept.pictures:
            start, length = begins[0], lengths[picture.digest]
            shown.append(Shown(picture, start, start + length, together))
            begins = begins[length:]
        request = Request(ids_S.tolist(), shown, sampling, prepared, continued=bool(kept.turns[-1].answer))
        return request, " ".join(filter(None, (said, left_out))) or None

    def _enqueue(self, request: Request) -> None:
        with self._closing:
            if self._worker.closed:
                raise self._worker.put_away()
            self._waiting.append(request)
            self._worker.inbox.put(request)

    def _heartbeat(self, request: Request) -> Piece:
        if request.phase != "queued":
            return Piece("", phase=request.phase)
        before = takewhile(lambda other: other is not request, list(self._waiting))
        ahead = sum(other.phase == "queued" for other in before)
        return Piece("", phase="queued", wait=self._worker.meter.until(ahead, rows=self._plan.rows))
