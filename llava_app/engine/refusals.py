"""What a person is told when a server says no, and what the log has of it: never the server's words, in which those of
a visitor may be."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import openai

from llava_app.errors import BusyError, ContextError, ModelError, UserError

MOST_WORDS = 2000  # characters of what a server says that are read
SAID = (
    "message",
    "msg",
    "detail",
    "error",
    "type",
    "code",
)  # where errors have their words; elsewhere is what was asked


@dataclass(frozen=True)
class Refusal:
    """The first row whose codes and words fit."""

    codes: tuple[int, ...]  # of HTTP; empty: any
    words: str  # a pattern in what the server said; its named groups may stand in `text`
    error: type[UserError]
    text: str
    pictures: bool = False  # only where pictures were sent


REDIRECTS = (301, 302, 303, 307, 308)
UNKNOWN = "The server does not know the model {name} any more. Choose another one."
# The words are those of vLLM, SGLang, llama.cpp, Ollama, TGI and transformers serve.
REFUSALS = (
    Refusal((429,), "", BusyError, "{name} is asked too much at the moment. Wait a little, then send again."),
    Refusal(
        REDIRECTS,
        "",
        ModelError,
        "The server of {name} sends questions on to another address, where this app does not follow. Give --server the "
        "address itself.",
    ),
    Refusal(
        (400, 413, 422),
        r"context[ _](length|size|window)|too long|max_new_tokens.*<=|maximum.*tokens",
        ContextError,
        "The conversation is longer than {name} can read on its server. Start a new chat, or use fewer pictures.",
    ),
    Refusal(
        (),
        r"at most (?P<most>[1-9]\d*) image",
        ModelError,
        "The most pictures that {name} takes on its server is {most}. Start a new chat with fewer.",
        pictures=True,
    ),
    Refusal((400, 404), r"model\b.*\b(not exist|not found)|unknown model|pinned", ModelError, UNKNOWN),
    Refusal(
        (),
        r"image|vision|multi-?modal|mmproj",
        ModelError,
        "{name} cannot see pictures on its server. Choose another model, or start a new chat without pictures.",
        pictures=True,
    ),
    Refusal((404,), "", ModelError, UNKNOWN),
    Refusal((400,), "model|not found", ModelError, UNKNOWN),
    Refusal(
        (400, 422),
        r"unexpected|unrecognized|extra|repetition_penalty|top_k",
        ModelError,
        "The server of {name} does not know one of the settings. Reset the settings, above all repetition penalty.",
    ),
    Refusal((401, 403), "", ModelError, "The server of {name} asks for a key, which this app does not send."),
    Refusal((), "", ModelError, "The server of {name} failed (code {code}). Send the question again."),
)


def refused(error: openai.APIError, *, name: str, with_pictures: bool) -> UserError:
    """What to tell of the model `name`."""
    code, said = code_of(error), " ".join(_words(error.body)) or error.message
    for row in REFUSALS:
        fits = (not row.codes or code in row.codes) and (with_pictures or not row.pictures)
        words = re.search(row.words, said[:MOST_WORDS], re.IGNORECASE) if fits else None
        if words:
            return row.error(row.text.format(name=name, code=code, **words.groupdict()))
    raise AssertionError("the last row fits everything")


def code_of(error: openai.APIError) -> int:
    """That of HTTP; in the middle of a stream, where there is none, that in the error itself, else 500."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code
    code = error.body.get("code") if isinstance(error.body, Mapping) else None
    return code if type(code) is int else 500


def loggable(error: Exception) -> str:
    """The kind of an error, and what in it is no text."""
    cause = error.__cause__ or error
    code = f", code {code_of(error)}" if isinstance(error, openai.APIError) and error.body is not None else ""
    return type(cause).__name__ + code


def _words(body: Any) -> list[str]:
    """The texts that tell what was wrong."""
    if isinstance(body, Mapping):
        return [word for key in SAID for word in _words(body.get(key))]
    if isinstance(body, list):
        return [word for part in body for word in _words(part)]
    return [body] if isinstance(body, str) else []
