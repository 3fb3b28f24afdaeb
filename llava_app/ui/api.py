"""The page for programs: one endpoint, `ask`, which is the tool of the MCP server as well.

    from gradio_client import Client, handle_file

    client = Client("http://127.0.0.1:7860")
    cat = handle_file("cat.png")
    job = client.submit([cat], "What is funny?", [], {"temperature": 0}, api_name="/ask")
    for so_far in job:
        print(so_far["answer"])  # grows
    first = {"images": [cat], "question": "What is funny?", "answer": job.result()["answer"]}
    print(client.predict([], "Why?", [first], {}, api_name="/ask")["answer"])

Nothing that comes in is believed: gradio hands it over as it was sent.
"""

import base64
import binascii
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from llava_app.chat import reply
from llava_app.checkpoints import Card
from llava_app.conversation import Conversation
from llava_app.engine import Sampling
from llava_app.errors import ContextError, DataError, ImageError, ModelError, UserError
from llava_app.images import Picture, open_image
from llava_app.limits import LOCAL, Gate, Limits, bounded, check, check_room
from llava_app.ui.door import visitor
from llava_app.ui.models import Models

MAX_TURNS = 50  # of a history
MAX_PICTURES = 16  # in the history and the question together
MAX_CHARACTERS = 20_000  # in one text; far above any model's context, far below what stalls a tokenizer
MAX_DATA_URL = 30_000_000  # characters; 22 MB of a picture file
HEARTBEAT = 0.2  # s between two signs of life, so that a client that went away is noticed
TURN = {"question": str, "answer": str, "images": list}  # of a history; a turn may do without images
NUMBERS = {"temperature": float, "top_p": float, "repetition_penalty": float, "max_new_tokens": int, "seed": int}
TEXTS = ("model", "system")


class Programs:
    """What programs may call, on the models of this process."""

    def __init__(self, models: Models, gate: Gate | None = None) -> None:
        """`gate`: where every question passes; by default that of a page of one's own."""
        self._models = models
        self._gate = gate or Gate(LOCAL)

    def ask(
        self,
        images: list[Any],
        question: str,
        history: list[dict[str, Any]] | None = None,
        settings: dict[str, Any] | None = None,
        request: gr.Request | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Ask a vision-language model about pictures. The answer streams; the last result is the whole of it.

        Args:
            images: Pictures of this question: files uploaded with handle_file, or data URLs (data:image/png;base64,…).
            question: What to ask.
            history: The turns before, oldest first: {"question": text, "answer": text, "images": as above}.
            settings: Any of temperature, top_p, repetition_penalty, max_new_tokens, seed, system, model.

        Returns:
            {"answer": text so far, "phase": "done" at the end, "finish": why it ended, "left_out": what was not shown}
        """
        try:
            with self._gate.enter(visitor(request)):
                sampling, chosen, system = read_settings(settings or {})
                asked = self._read(images, question, history or [], system)
                longest = min(sampling.max_new_tokens, self._gate.limits.new_tokens)
                yield from self._answer(asked, replace(sampling, max_new_tokens=longest), chosen)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def _read(self, images: Any, question: Any, history: Any, system: str | None) -> Conversation:
        """The conversation with its open question. Raises UserError, and at a limit before any picture is decoded."""
        limits = self._gate.limits
        bounded(read_text("question", question), limits)
        pictures, most = count_pictures(images, history), min(MAX_PICTURES, limits.pictures_kept)
        if pictures > most:
            raise ImageError(f"There are {pictures} pictures; the limit is {most}. Send fewer.")
        if not question.strip() and not images:
            raise DataError("There is neither a question nor a picture. Send at least one of them.")
        asked = read_history(history, system, limits).ask(question, read_pictures(images, limits))
        check(asked, limits)
        return asked

    def _answer(self, asked: Conversation, sampling: Sampling, chosen: str | None) -> Iterator[dict[str, Any]]:
        while not self._models.first.done():
            yield _result(phase="loading")
            wait([self._models.first], HEARTBEAT)
        with self._models.lend(self._card(chosen or self._models.first.result())) as ready:
            while not ready.done():
                yield _result(phase="loading")
                wait([ready], HEARTBEAT)
            with closing(reply(ready.result().engine, asked, sampling)) as answer:
                for progress in answer:
                    finish = progress.conversation.turns[-1].finish if progress.phase == "done" else None
                    yield _result(progress.text, phase=progress.phase, finish=finish, left_out=progress.left_out)

    def _card(self, chosen: str) -> Card:
        """The model with this key or name. Raises ModelError that lists what there is."""
        cards = self._models.cards()
        for key, card in cards.items():
            if chosen in (key, card.name):
                return card
        raise ModelError(f"There is no model “{chosen[:100]}”. Choose one of {', '.join(cards)}.")


def offer(models: Models, gate: Gate) -> None:
    """Add the endpoint to the page that is being built."""
    gr.api(Programs(models, gate).ask, api_name="ask", concurrency_limit=None)


def check_mcp(*, with_passwords: bool) -> None:
    """Raises UserError when the package is missing that makes the endpoint an MCP tool, which knows no passwords."""
    if with_passwords:
        raise UserError("--mcp would let everybody in without the password of --auth. Leave one of them out.")
    if find_spec("mcp") is None:
        raise UserError('--mcp needs the package mcp. Install it (pip install "mcp>=1.21,<2") or leave --mcp out.')


def read_settings(settings: dict[str, Any]) -> tuple[Sampling, str | None, str | None]:
    """Sampling, model and system prompt. Raises DataError for a name or a value that means nothing."""
    if not isinstance(settings, dict) or not set(settings) <= {*NUMBERS, *TEXTS}:
        raise DataError(f"settings must be an object with any of {', '.join((*NUMBERS, *TEXTS))}.")
    numbers = {name: _number(name, settings[name]) for name in NUMBERS if settings.get(name) is not None}
    texts = [read_text(name, settings[name]) if settings.get(name) else None for name in TEXTS]
    try:
        return Sampling(**numbers), texts[0], texts[1]
    except ValueError as error:
        raise DataError(str(error)) from error


def read_history(history: Sequence[Any], system: str | None, limits: Limits = LOCAL) -> Conversation:
    """The turns before the question. Raises DataError that names the turn, or what `read_pictures` raises."""
    if not isinstance(history, list):
        raise DataError("history must be a list of turns.")
    if len(history) > MAX_TURNS:
        raise ContextError(f"The history has {len(history)} turns; the limit is {MAX_TURNS}. Send the last ones only.")
    conversation = Conversation(system=system)
    for number, turn in enumerate(history, start=1):
        if not isinstance(turn, dict) or not {"question", "answer"} <= set(turn) <= set(TURN):
            raise DataError(
                f"Turn {number} of the history must be an object with question, answer and, if any, images."
            )
        pictures = read_pictures(turn.get("images", []), limits)
        conversation = conversation.ask(read_text(f"The question of turn {number}", turn["question"]), pictures)
        conversation = conversation.answer(read_text(f"The answer of turn {number}", turn["answer"]))
    return conversation


def read_text(name: str, value: Any) -> str:
    """A text of bounded length. Raises DataError or ContextError."""
    if not isinstance(value, str):
        raise DataError(f"{name} must be a text, not {type(value).__name__}.")
    if len(value) > MAX_CHARACTERS:
        raise ContextError(f"{name} has {len(value):,} characters; the limit is {MAX_CHARACTERS:,}. Shorten it.")
    return value


def count_pictures(images: Any, history: Any) -> int:
    """How many pictures question and history bring along; what is of a wrong form is refused where it is read."""
    turns = [turn for turn in history if isinstance(turn, dict)] if isinstance(history, list) else []
    lists = [images, *(turn.get("images") for turn in turns)]
    return sum(len(one) for one in lists if isinstance(one, list))


def read_pictures(images: Any, limits: Limits = LOCAL) -> list[Picture]:
    """Uploaded files and data URLs as pictures. Raises DataError, ImageError, and BusyError when the memory is full."""
    if not isinstance(images, list):
        raise DataError("images must be a list of uploaded files or data URLs.")
    if len(images) > MAX_PICTURES:
        raise ImageError(f"There are {len(images)} pictures; the limit is {MAX_PICTURES}. Send fewer.")
    return [_picture(image, f"picture {number}", limits) for number, image in enumerate(images, start=1)]


def _picture(image: Any, name: str, limits: Limits) -> Picture:
    check_room(limits)
    if isinstance(image, str) and image.startswith("data:image/"):
        return open_image(_decoded(image, name), name)
    path = image.get("path") if isinstance(image, dict) else None
    uploads = Path(get_upload_folder()).resolve()
    if not isinstance(path, str) or "\0" in path or not Path(path).resolve().is_relative_to(uploads):
        raise ImageError(f"{name} is neither an uploaded file nor a data URL (data:image/png;base64,…). Upload it.")
    return open_image(path, name)


def _decoded(url: str, name: str) -> bytes:
    if len(url) > MAX_DATA_URL:
        raise ImageError(f"{name} is a data URL of {len(url):,} characters; the limit is {MAX_DATA_URL:,}. Upload it.")
    try:
        return base64.b64decode(url.partition(";base64,")[2], validate=True)
    except binascii.Error as error:
        raise ImageError(f"{name} is a data URL that is no base64. Write it as data:image/png;base64,…") from error


def _number(name: str, value: Any) -> Any:
    kind = NUMBERS[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**64 or kind(value) != value:
        raise DataError(f"{name} must be a {'whole ' if kind is int else ''}number within reason.")
    return kind(value)


def _result(answer: str = "", *, phase: str, finish: str | None = None, left_out: str | None = None) -> dict[str, Any]:
    return {"answer": answer, "phase": phase, "finish": finish, "left_out": left_out}
