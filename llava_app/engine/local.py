"""The engine that owns a model on this machine: one thread computes, everybody else only waits for pieces."""

import queue
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import torch
from transformers import DynamicCache

from llava_app.checkpoints import Card
from llava_app.conversation import Conversation
from llava_app.engine import Piece, Sampling
from llava_app.engine.stream import TextStream
from llava_app.errors import BusyError, ContextError, ModelError
from llava_app.loading import SMALL_BYTES, Loaded
from llava_app.prompts import encode

HEARTBEAT = 0.1  # seconds without news after which a waiting consumer gets an empty piece
TIME_LIMIT = 300.0  # seconds that one answer may take once it is its turn


@dataclass(eq=False)
class _Request:
    """A question on its way to the thread, and the pieces on their way back."""

    conversation: Conversation
    sampling: Sampling
    outbox: "queue.SimpleQueue[Piece | Exception]" = field(default_factory=queue.SimpleQueue)
    given_up: threading.Event = field(default_factory=threading.Event)  # set when nobody reads the answer any more
    phase: str = "queued"  # as in Piece

    def take(self) -> Piece:
        """All that has arrived, as one piece; a heartbeat when nothing has for a while. Raises what the thread raised.

        Joining keeps a slow consumer at the model's heels instead of one redraw per token behind.
        """
        try:
            arrived = [self.outbox.get(timeout=HEARTBEAT)]
        except queue.Empty:
            return Piece("", phase=self.phase)
        while not self.outbox.empty():
            arrived.append(self.outbox.get())
        texts = []
        for item in arrived:
            if isinstance(item, Exception):
                raise item
            texts.append(item.text)
            last = item
        return Piece("".join(texts), last.finish, last.tokens)


@dataclass(eq=False)
class _Answer:
    """An answer being written. S tokens of prompt."""

    request: _Request
    input_ids: torch.Tensor  # (1, S) int64
    pixel_values: torch.Tensor | None  # (I, 3, H, W)
    room: int  # tokens it may have
    deadline: float  # on the monotonic clock
    generator: torch.Generator
    stream: TextStream
    cache: DynamicCache
    tokens: int = 0
    shown: bool = False  # whether any text was handed out


class LocalEngine:
    """Answers with a model on this machine, one conversation at a time, in the order in which they were asked."""

    def __init__(self, loaded: Loaded, *, time_limit: float = TIME_LIMIT) -> None:
        self.card: Card = loaded.card
        self._model = loaded.model
        self._processor = loaded.processor
        self._device = loaded.device
        self._time_limit = time_limit
        # Handing a small matrix to a second CPU thread costs more than multiplying it: a model of 5 million parameters
        # decodes 494 tokens/s on one thread and 140 on two.
        all_threads = _all_threads()
        self._threads = 1 if self._model.get_memory_footprint() < SMALL_BYTES else all_threads
        end = loaded.model.generation_config.eos_token_id
        self._end_tokens = frozenset([end] if isinstance(end, int) else end)
        self._inbox: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._closed = False
        self._closing = threading.Lock()  # nothing enters the inbox behind the None that ends the thread
        self._thread = threading.Thread(target=self._work, name=f"engine {loaded.card.name}", daemon=True)
        self._thread.start()

    def answer(self, conversation: Conversation, sampling: Sampling) -> Iterator[Piece]:
        """Stream the answer to the open last turn; see `Engine.answer`.

        Raises ContextError when the conversation leaves no room for an answer, BusyError when the engine is closed
        before its turn came, ModelError when the memory does not suffice.
        """
        request = _Request(conversation, sampling)
        self._enqueue(request)
        try:
            finish = None
            while finish is None:
                piece = request.take()
                finish = piece.finish
                yield piece
        finally:
            request.given_up.set()

    def close(self) -> None:
        """End running and waiting answers and let go of the model. Waits for the step in progress."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)
        self._thread.join()

    def _enqueue(self, request: _Request) -> None:
        with self._closing:
            if self._closed:
                raise BusyError(f"{self.card.name} has been put away for another model. Send the question again.")
            self._inbox.put(request)

    def _work(self) -> None:
        """The thread: serve requests until the None that `close` sends."""
        while (request := self._inbox.get()) is not None:
            torch.set_num_threads(self._threads)
            try:
                self._serve(request)
            except Exception as error:  # whatever it is belongs to this request alone, and its reader raises it
                traceback.clear_frames(error.__traceback__)  # they hold tensors, and the reader may keep the error
                request.outbox.put(self._explained(error))
            torch.set_num_threads(_all_threads())
        del self._model

    def _explained(self, error: Exception) -> Exception:
        if not isinstance(error, torch.OutOfMemoryError):
            return error
        explained = ModelError(
            f"The GPU has too little free memory for this conversation with {self.card.name}. "
            "Start a new chat, use fewer pictures, or choose a smaller model."
        )
        explained.__cause__ = error
        return explained

    @torch.inference_mode()
    def _serve(self, request: _Request) -> None:
        if self._closed:
            raise BusyError(f"{self.card.name} has been put away for another model. Send the question again.")
        if request.given_up.is_set():
            return
        request.phase = "reading"
        answer = self._admit(request)
        token = self._prefill(answer)
        while not self._hand_out(answer, token):
            token = self._decode_one(answer, token)

    def _admit(self, request: _Request) -> _Answer:
        """Turn the conversation into the model's inputs. Raises ContextError when no room is left for an answer."""
        deadline = time.monotonic() + self._time_limit
        encoded = encode(request.conversation, self._processor, open_answer=True)
        length, limit = len(encoded.input_ids), self._model.config.text_config.max_position_embeddings
        if length >= limit:
            raise ContextError(
                f"The conversation has {length} tokens, pictures included, and {self.card.name} reads at most {limit}. "
                "Undo a turn, leave a picture out, or start a new chat."
            )
        generator = torch.Generator(self._device)
        if request.sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(request.sampling.seed)
        return _Answer(
            request,
            encoded.input_ids[None].to(self._device),
            None if encoded.pixel_values is None else encoded.pixel_values.to(self._device),
            room=min(request.sampling.max_new_tokens, limit - length),
            deadline=deadline,
            generator=generator,
            stream=TextStream(self._processor.tokenizer, before=encoded.input_ids.tolist()),
            cache=DynamicCache(config=self._model.config.text_config),
        )

    def _prefill(self, answer: _Answer) -> int:
        """Read the whole prompt and return the answer's first token."""
        return self._next_token(answer, answer.input_ids, answer.pixel_values)

    def _decode_one(self, answer: _Answer, token: int) -> int:
        """Append `token` to what the model has read and return the token after it."""
        return self._next_token(answer, torch.tensor([[token]], device=self._device), None)

    def _next_token(self, answer: _Answer, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> int:
        hidden_BSD = self._model.model(
            input_ids=input_ids, pixel_values=pixel_values, past_key_values=answer.cache, use_cache=True
        ).last_hidden_state
        # The head on two dimensions: with three, which `logits_to_keep=1` would give it, a bfloat16 head on a CPU
        # takes a path 31 to 49 times slower.
        logits_V = self._model.lm_head(hidden_BSD[:, -1])[0].float()
        logits_V[self._model.config.image_token_id] = -torch.inf  # a picture nobody sent would break the next turn
        return choose(logits_V, answer.request.sampling, generator=answer.generator)

    def _hand_out(self, answer: _Answer, token: int) -> bool:
        """Send the text that `token` completes to the reader; whether the answer ends with it."""
        answer.request.phase = "writing"
        answer.tokens += 1
        finish = self._finish(answer, token)
        text = "" if finish == "stop" else answer.stream.push(token)
        if finish:
            text += answer.stream.flush()
        if text and not answer.shown:
            text = text.removeprefix(" ")  # the templates write it between the role and the answer
            answer.shown = True
        answer.request.outbox.put(Piece(text, finish, answer.tokens))
        return finish is not None

    def _finish(self, answer: _Answer, token: int) -> str | None:
        """Why the answer ends with `token`, or None if it goes on."""
        if token in self._end_tokens:
            return "stop"
        if answer.tokens >= answer.room:
            return "length"
        if self._closed or answer.request.given_up.is_set():
            return "stopped"
        return "time" if time.monotonic() > answer.deadline else None


@cache
def _all_threads() -> int:
    """How many threads torch takes by itself, asked before the first engine changes it."""
    return torch.get_num_threads()


def choose(logits_V: torch.Tensor, sampling: Sampling, *, generator: torch.Generator) -> int:
    """A token id by temperature and nucleus (top-p) sampling: Holtzman et al. 2020. Temperature 0 takes the best.

    `logits_V`: float32, one for each of the V tokens of the vocabulary.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    scaled_V = (logits_V - logits_V.max()) / max(sampling.temperature, 1e-3)  # cannot overflow
    probabilities_V, tokens_V = scaled_V.softmax(dim=-1).sort(descending=True)
    likelier_V = probabilities_V.cumsum(dim=-1) - probabilities_V
    probabilities_V[likelier_V >= sampling.top_p] = 0
    return int(tokens_V[torch.multinomial(probabilities_V, 1, generator=generator)])
