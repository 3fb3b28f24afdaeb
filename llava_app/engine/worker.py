"""The engine's thread: it owns the model and computes for everybody at once."""

import gc
import queue
import time
import traceback
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from llava_app.engine import Piece
from llava_app.engine.decoder import Span, make_decoder
from llava_app.engine.features import FeatureCache
from llava_app.engine.prompts import Prompts
from llava_app.engine.request import Request
from llava_app.engine.sampling import choose
from llava_app.engine.slots import Slots
from llava_app.engine.stream import StopText, TextStream
from llava_app.engine.watch import Meter
from llava_app.errors import BusyError, ModelError
from llava_app.loading import Loaded
from llava_app.memory import Plan, give_back
from llava_app.precision import SMALL_BYTES
from llava_app.prompts import TEMPLATES, end_tokens

FRAME = 1 / 40  # s between two pieces of text, whoever they are for: every reader that wakes up holds up the model
CHUNK = 512  # tokens of prompts in one step while others wait for their next token


@dataclass(eq=False)
class _Answer:
    """An answer being written into a row of the cache."""

    request: Request
    row: int
    held: int  # tokens that the row holds
    unread_SD: Tensor  # embeddings of what is to be read next: the rest of the prompt, or the last token
    contents: list[int]  # of the whole prompt and of the tokens written, as `Slots` compares them
    room: int  # tokens it may have
    begun: float  # when it got its row, on the monotonic clock
    deadline: float  # on the monotonic clock
    generator: torch.Generator
    stream: TextStream
    stop_text: StopText
    tokens: int = 0
    ready: str = ""  # text that is to be handed out
    shown: bool = False  # whether any text was ready yet
    handed_out: float = 0.0  # when, on the monotonic clock


class Worker:
    """Reads requests and writes answers, one step for everybody at a time, in as many rows as the plan allows.

    `work` is the thread's function. Other threads put requests into `inbox` and read `features`, `slots` and `meter`.
    """

    def __init__(self, loaded: Loaded, plan: Plan, *, time_limit: float) -> None:
        self._card = loaded.card
        self._weights = loaded.weights  # kept for others that may share them
        self._processor = loaded.processor
        self._device = loaded.device
        self._time_limit = time_limit
        self._plan = plan
        self._decoder = make_decoder(loaded.weights, loaded.model, rows=plan.rows, length=plan.length)
        # Handing a small matrix to a second CPU thread costs more than multiplying it.
        self._threads = 1 if loaded.model.get_memory_footprint() < SMALL_BYTES else _all_threads()
        self._image_token: int = loaded.model.config.image_token_id
        end = loaded.model.generation_config.eos_token_id
        ends = end_tokens(loaded.processor.tokenizer, loaded.card.template)
        self._end_tokens = frozenset([*([end] if isinstance(end, int) else end), *ends])
        self._end_texts = TEMPLATES.get(loaded.card.template, ())
        self.inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.closed = False
        self.features = FeatureCache(plan.feature_bytes)
        self.slots = Slots(plan.rows)
        self.meter = Meter()
        self._prompts = Prompts(loaded, self.features, self.meter)
        self.active: list[_Answer] = []

    def put_away(self) -> BusyError:
        """What somebody is told whose question came too late."""
        return BusyError(f"{self._card.name} has been put away for another model. Send the question again.")

    @torch.inference_mode()
    def work(self) -> None:
        """Admit who waits, read and write one step for everybody, until the None that `close` sends."""
        while True:
            if self.slots.free and not self._admit_next():
                break
            self._end_abandoned()
            if self.active:
                self._advance(self.active)
        for answer in self.active:
            answer.request.outbox.put(Piece(answer.ready + answer.stop_text.flush(), "stopped", answer.tokens))
        torch.set_num_threads(_all_threads())
        self.active.clear()
        self.features.clear()
        del self._weights, self._decoder, self._prompts
        gc.collect()  # the decoder and what replays it know each other
        give_back()

    def _admit_next(self) -> bool:
        """Take one request from the inbox, waiting for it when there is nothing else to do; whether to go on."""
        try:
            request = self.inbox.get_nowait() if self.active else self._wait()
        except queue.Empty:
            return True
        if request is None:
            return False
        if self.closed:
            request.outbox.put(self.put_away())
        elif not request.given_up.is_set():
            try:
                self.active.append(self._admit_or_relieve(request))
            except Exception as error:
                self._refuse(request, error)
        return True

    def _wait(self) -> Request | None:
        torch.set_num_threads(_all_threads())
        request = self.inbox.get()
        torch.set_num_threads(self._threads)
        return request

    def _admit_or_relieve(self, request: Request) -> _Answer:
        try:
            return self._admit(request)
        except torch.OutOfMemoryError:
            self._relieve()
            return self._admit(request)

    def _admit(self, request: Request) -> _Answer:
        """Give the request a row with as much of its prompt as the cache holds, and embed the rest."""
        request.phase = "reading"
        contents = request.contents
        place = self.slots.take(contents)
        try:
            if place.source != place.row:
                self._decoder.copy(place.source, place.row, place.length)
            unread_SD = self._prompts.embed(request, place.length)
        except Exception:
            self.slots.drop(place.row)
            raise
        self.meter.reused += place.length
        seed = request.sampling.seed
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return _Answer(
            request,
            place.row,
            place.length,
            unread_SD,
            contents,
            room=min(request.sampling.max_new_tokens, self._plan.length - len(contents)),
            begun=time.monotonic(),
            deadline=time.monotonic() + self._time_limit,
            generator=generator,
            stream=TextStream(self._processor.tokenizer, before=request.ids),
            stop_text=StopText((*self._end_texts, *request.sampling.stop)),
            shown=request.continued,
        )

    def _advance(self, answers: list[_Answer], *, again: bool = False) -> None:
        """One step for these answers. When it fails, each goes once more, alone and in smaller parts, so that whatever
        is wrong with one of them, or with all of them together, ends as few as possible."""
        begun = time.monotonic()
        parts = _parts(answers, CHUNK // 4 if again else CHUNK)
        try:
            chosen = self._step(parts)
        except Exception as error:
            if again:
                self._fail(answers[0], error)
                return
            traceback.clear_frames(error.__traceback__)
            if isinstance(error, torch.OutOfMemoryError):
                self._relieve()
            for answer in list(answers):
                self._advance([answer], again=True)
            return
        self.meter.step(begun, len(chosen))
        for answer, token in chosen:
            try:
                self._hand_out(answer, token)
            except Exception as error:
                self._fail(answer, error)

    def _step(self, parts: list[tuple[_Answer, int]]) -> list[tuple[_Answer, int]]:
        """Read the first so many unread tokens of each answer; the next token of each that has nothing left to read."""
        spans = [Span(answer.row, answer.held, size) for answer, size in parts]
        logits_BV = self._decoder.step(torch.cat([answer.unread_SD[:size] for answer, size in parts]), spans)
        rows = [row for row, (answer, size) in enumerate(parts) if size == len(answer.unread_SD)]
        writing = [parts[row][0] for row in rows]
        tokens = []
        if writing:
            logits_BV = (logits_BV if len(rows) == len(parts) else logits_BV[rows]).float()
            logits_BV[:, self._image_token].fill_(-torch.inf)  # a picture nobody sent breaks the next turn
            tokens = choose(
                logits_BV,
                [answer.request.sampling for answer in writing],
                read=[answer.contents for answer in writing],
                generators=[answer.generator for answer in writing],
            )
            embeds_B1D = self._prompts.embeddings(torch.tensor(tokens, device=self._device)).split(1)
        for answer, size in parts:
            self.slots.extend(answer.row, answer.contents[answer.held : answer.held + size])
            self.meter.read += 0 if answer.tokens else size
            answer.held += size
            answer.unread_SD = answer.unread_SD[size:]
        for number, answer in enumerate(writing):
            answer.unread_SD = embeds_B1D[number]
            answer.contents.append(tokens[number])
        return list(zip(writing, tokens, strict=True))

    def _hand_out(self, answer: _Answer, token: int) -> None:
        """Send the text that `token` completes to the reader, with what came since it was last woken, and end the
        answer if it ends here."""
        now = time.monotonic()
        answer.request.phase = "writing"
        answer.tokens += 1
        if answer.tokens == 1:
            self.meter.first_token(now - answer.request.asked)
        text = "" if token in self._end_tokens else answer.stop_text.push(answer.stream.push(token))
        finish = self._verdict(answer, token, now)
        if finish:
            text += answer.stop_text.push(answer.stream.flush()) + answer.stop_text.flush()
        if text and not answer.shown:
            text = text.removeprefix(" ")  # the templates write it between the role and the answer
            answer.shown = True
        answer.ready += text
        due = now - answer.handed_out >= FRAME * max(2, len(self.active))  # a browser draws each anew
        if finish or (answer.ready and due):
            answer.request.outbox.put(Piece(answer.ready, finish, answer.tokens))
            answer.ready, answer.handed_out = "", now
        if finish:
            self._end(answer)

    def _verdict(self, answer: _Answer, token: int, now: float) -> str | None:
        """Why the answer ends with `token`, or None if it goes on."""
        if token in self._end_tokens or answer.stop_text.reached:
            return "stop"
        if answer.tokens >= answer.room:
            return "length"
        if self.closed:
            return "stopped"
        return "time" if now > answer.deadline else None

    def _end(self, answer: _Answer) -> None:
        self.meter.row_free(time.monotonic() - answer.begun)
        self.slots.release(answer.row)
        self.active.remove(answer)

    def _end_abandoned(self) -> None:
        for answer in [answer for answer in self.active if answer.request.given_up.is_set()]:
            self._end(answer)

    def _fail(self, answer: _Answer, error: Exception) -> None:
        """End one answer with an error, which its reader raises."""
        self._end(answer)
        self._refuse(answer.request, error)

    def _refuse(self, request: Request, error: Exception) -> None:
        traceback.clear_frames(error.__traceback__)  # they hold tensors, and the reader may keep the error
        if isinstance(error, torch.OutOfMemoryError):
            explained = ModelError(
                f"The GPU has too little free memory for this conversation with {self._card.name}. "
                "Start a new chat, use fewer pictures, or choose a smaller model."
            )
            explained.__cause__ = error
            error = explained
        request.outbox.put(error)

    def _relieve(self) -> None:
        """Give back what can be computed again."""
        self.features.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _parts(answers: list[_Answer], chunk: int) -> list[tuple[_Answer, int]]:
    """How many tokens each answer reads in the next step: one of what it writes, at most `chunk` of all prompts."""
    parts = []
    for answer in answers:
        size = len(answer.unread_SD) if answer.tokens else min(len(answer.unread_SD), chunk)
        chunk -= 0 if answer.tokens else size
        if size:
            parts.append((answer, size))
    return parts


@cache
def _all_threads() -> int:
    """How many threads torch takes by itself, asked before the first engine changes it."""
    return torch.get_num_threads()
