"""The engine for a model that runs elsewhere, behind any server that speaks the OpenAI chat protocol."""

import base64
import io
import logging
import queue
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai

from llava_app.checkpoints import Card
from llava_app.conversation import Conversation, Turn
from llava_app.engine import Piece, Sampling
from llava_app.engine.reading import Reading
from llava_app.engine.refusals import REDIRECTS, code_of, loggable, refused
from llava_app.engine.servers import Servers
from llava_app.errors import ModelError, UserError
from llava_app.images import Picture
from llava_app.video import Clip

HEARTBEAT = 0.1  # s without news after which a waiting consumer gets an empty piece
FRAMES = 8  # of a clip, at most: servers know pictures
TIME_LIMIT = 300.0  # s that one answer may take

FOREIGN = (ValueError, AttributeError, TypeError, LookupError)  # raised by what is not of the protocol

logger = logging.getLogger(__name__)


class RemoteEngine:
    """Asks the least busy of the servers that offer the model of `card`, and another when that fails at once."""

    def __init__(self, card: Card, servers: Servers, *, time_limit: float = TIME_LIMIT) -> None:
        self.card = card
        self._servers = servers
        self._time_limit = time_limit
        self._closed = False

    def answer(self, conversation: Conversation, sampling: Sampling) -> Iterator[Piece]:
        """Stream the answer to the open last turn; see `Engine.answer`. Closing the iterator aborts the request.

        Raises ContextError when the conversation is too long for the server, BusyError when it refuses for now,
        ModelError when it cannot be reached, broke off, does not know the model or cannot see.
        """
        conversation, left_out = _with_stills(conversation)
        request = _request(self.card.source, conversation, sampling)
        outbox: queue.SimpleQueue[Piece | Exception] = queue.SimpleQueue()
        work = self._servers.start(self._ask(request, outbox, with_pictures=bool(conversation.pictures)))
        try:
            if left_out:
                yield Piece("", phase="queued", left_out=left_out)
            yield from self._pieces(outbox)
        finally:
            work.cancel()

    def snapshot(self) -> None:
        """Nothing: what a server does for others is not known here."""

    def close(self) -> None:
        """End the answers that run."""
        self._closed = True

    def _pieces(self, outbox: "queue.SimpleQueue[Piece | Exception]") -> Iterator[Piece]:
        deadline, phase = time.monotonic() + self._time_limit, "queued"
        while not self._closed and time.monotonic() < deadline:
            try:
                item = outbox.get(timeout=HEARTBEAT)
            except queue.Empty:
                yield Piece("", phase=phase)
                continue
            if isinstance(item, Exception):
                raise item
            phase = item.phase
            yield item
            if item.finish:
                return
        yield Piece("", "stopped" if self._closed else "time")

    async def _ask(
        self, request: dict[str, Any], outbox: "queue.SimpleQueue[Piece | Exception]", *, with_pictures: bool
    ) -> None:
        """Put the answer into `outbox` piece by piece, or what went wrong."""
        name = self.card.name
        try:
            await self._stream(request, outbox)
        except openai.APITimeoutError as error:
            outbox.put(_told(ModelError(f"The server of {name} said nothing for too long. Send again."), error))
        except openai.APIConnectionError as error:
            outbox.put(_told(ModelError(f"The server of {name} broke off. Send the question again."), error))
        except openai.APIError as error:
            outbox.put(_told(refused(error, name=name, with_pictures=with_pictures), error))
        except FOREIGN as error:
            text = f"The server of {name} answers with something else than the OpenAI protocol. Check its address."
            outbox.put(_told(ModelError(text), error))
        except Exception as error:
            outbox.put(error)

    async def _stream(self, request: dict[str, Any], outbox: "queue.SimpleQueue[Piece | Exception]") -> None:
        """Ask the servers one after the other until one answers. Raises openai.APIError or one of FOREIGN when all
        fail or an answer breaks off, and ModelError when none can be reached."""
        failed: Exception | None = None  # the first that says more than that nobody is there
        for server in self._servers.offering(self.card.source):
            reading = Reading(outbox.put, request["max_tokens"])
            try:
                with server.busy():
                    await reading.read(await server.ask(request))
                return
            except (openai.APIError, *FOREIGN) as error:
                if not _may_another_do_better(error):
                    raise
                server.fail()
                if reading.phase == "writing":
                    raise
                logger.warning("%s gave no answer: %s", server.name, loggable(error))
                if type(error) is openai.APIConnectionError and reading.phase == "queued":
                    self._servers.start(server.look())  # which leaves it out until it answers again
                else:
                    failed = failed or error
        raise failed or ModelError(
            f"No server with {self.card.name} can be reached. Check that it runs, then send again."
        )


def _with_stills(conversation: Conversation) -> tuple[Conversation, str | None]:
    """The conversation with at most FRAMES of each clip as pictures, and what to say of the clips just sent."""
    turns = tuple(replace(turn, images=tuple(map(_thinned, turn.images))) for turn in conversation.turns)
    frames = sum(len(image.frames) for image in turns[-1].images if isinstance(image, Clip))
    said = f"The server is shown {frames} frames of the clip as separate pictures." if frames else None
    return replace(conversation, turns=turns).spread(), said


def _thinned(image: Picture) -> Picture:
    return image.thinned(FRAMES) if isinstance(image, Clip) else image


def _request(model: str, conversation: Conversation, sampling: Sampling) -> dict[str, Any]:
    if conversation.turns[-1].answer:
        raise ModelError("A model on a server cannot continue an answer. Ask it to go on.")
    extras: dict[str, Any] = {}  # what is not of the protocol, which some servers refuse, only where it is asked for
    if sampling.repetition_penalty != 1:
        extras["repetition_penalty"] = sampling.repetition_penalty
    if sampling.top_k:
        extras["top_k"] = sampling.top_k
    optional = {"seed": sampling.seed, "stop": list(sampling.stop) or None, "extra_body": extras or None}
    return {
        "model": model,
        "messages": messages(conversation),
        "stream": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
    } | {name: value for name, value in optional.items() if value is not None}


def messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation in the words of the protocol: pictures as data URLs before the text of their question."""
    told: list[dict[str, Any]] = []
    if conversation.system is not None:
        told.append({"role": "system", "content": conversation.system})
    for turn in conversation.turns:
        told.append({"role": "user", "content": _content(turn)})
        if turn.answer is not None:
            told.append({"role": "assistant", "content": turn.answer})
    return told


def _content(turn: Turn) -> list[dict[str, Any]]:
    pictures = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in turn.images]
    return [*pictures, {"type": "text", "text": turn.question}]


def _data_url(picture: Picture) -> str:
    """Lossless, so that the model sees what it would see here."""
    file = io.BytesIO()
    picture.image.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _may_another_do_better(error: Exception) -> bool:
    """Whether it is the server that is at fault, and not the question."""
    if not isinstance(error, openai.APIError) or isinstance(error, openai.APIConnectionError):
        return True
    return code_of(error) >= 500 or code_of(error) in (404, 429, *REDIRECTS)


def _told(error: UserError, cause: Exception) -> UserError:
    """`error`, and its cause in the log."""
    logger.warning("%s (%s)", error, loggable(cause))
    error.__cause__ = cause
    return error
