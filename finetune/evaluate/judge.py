"""A text-only judge behind any OpenAI-compatible endpoint. Nothing is asked twice, nothing is made up when it fails."""

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from finetune.evaluate.ledger import Ledger, key_of
from llava_app.errors import DataError

Messages = list[dict[str, str]]

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
FAILURES_IN_A_ROW = 5  # after so many the rest is not asked: the endpoint is gone
_HOPELESS = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)  # whatever is asked


@dataclass(frozen=True)
class Judge:
    """Who judges and how it is asked; as in LLaVA's own review scripts, 0.2 and 1,024 tokens.

    Without `url`, the environment's OPENAI_BASE_URL or OpenAI itself; the key is always the environment's.
    """

    model: str
    url: str | None = None
    temperature: float = 0.2
    max_tokens: int = 1024
    seed: int = 0
    timeout: float = 120.0  # s
    retries: int = 4  # of one question, by the client, with back-off
    at_once: int = 4


@dataclass(frozen=True)
class Consulted:
    """What the judge replied and, where it did not, why, both by the name of what was asked."""

    replies: dict[Any, str]
    missing: dict[Any, str]


def consult(judge: Judge, asked: Mapping[Any, Messages], ledger_file: Path) -> Consulted:
    """Ask everything that `ledger_file` holds no reply to. What fails is missing, and asked again by the next run."""
    session = _Session(judge, ledger_file)
    keys = {name: session.key(messages) for name, messages in asked.items()}
    distinct = {key: asked[name] for name, key in keys.items()}
    with ThreadPoolExecutor(judge.at_once) as people:
        list(people.map(session.ask, distinct, distinct.values()))
    session.close()
    replies = {name: session.replies[key] for name, key in keys.items() if key in session.replies}
    return Consulted(replies, {name: session.missing[key] for name, key in keys.items() if key in session.missing})


class _Session:
    """One round of questions, by their keys; `given_up` says why no more is asked."""

    def __init__(self, judge: Judge, ledger_file: Path) -> None:
        self.judge = judge
        self.replies: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        self.given_up: str | None = None
        self._failures = 0
        self._lock = threading.Lock()
        try:
            self._client = openai.OpenAI(base_url=judge.url, timeout=judge.timeout, max_retries=judge.retries)
        except openai.OpenAIError as error:
            raise DataError(
                "The judge needs a key: set OPENAI_API_KEY (to any text where the server asks for none)."
            ) from error
        self.ledger = Ledger(ledger_file)

    def close(self) -> None:
        self._client.close()
        self.ledger.close()

    def key(self, messages: Messages) -> str:
        judge = self.judge
        return key_of(judge.model, str(self._client.base_url), judge.temperature, judge.max_tokens, messages)

    def ask(self, key: str, messages: Messages) -> None:
        known = self.ledger.get(key)
        if known:
            self.replies[key] = known["text"]
        elif self.given_up:
            self.missing[key] = f"not asked, because of {self.given_up}"
        else:
            self._ask(key, messages)

    def _ask(self, key: str, messages: Messages) -> None:
        try:
            text = self._reply(messages)
        except (openai.OpenAIError, ValueError) as error:
            self._fail(key, error)
            return
        self.ledger.add(key, {"judge": self.judge.model, "messages": messages, "text": text})
        self.replies[key] = text
        self._failures = 0

    def _reply(self, messages: Messages) -> str:
        completion = self._client.chat.completions.create(
            model=self.judge.model,
            messages=messages,  # type: ignore[arg-type]
            temperature=self.judge.temperature,
            max_tokens=self.judge.max_tokens,
            seed=self.judge.seed,
        )
        if not getattr(completion, "choices", None):
            raise ValueError("a reply that is not the protocol's")
        return completion.choices[0].message.content or ""

    def _fail(self, key: str, error: Exception) -> None:
        reason = _reason(error)
        self.missing[key] = reason
        with self._lock:
            self._failures += 1
            if _is_hopeless(error) or self._failures >= FAILURES_IN_A_ROW:
                self.given_up = self.given_up or reason


def _is_hopeless(error: Exception) -> bool:
    quota = isinstance(error, openai.RateLimitError) and "quota" in f"{error.code} {error.message}"
    return quota or isinstance(error, _HOPELESS)


def _reason(error: Exception) -> str:
    """For the report; the words of a server stay out of it, they may hold anything."""
    if isinstance(error, openai.RateLimitError) and _is_hopeless(error):
        return "the judge's quota is used up"
    if isinstance(error, openai.APIStatusError):
        return f"status {error.status_code} from the judge"
    if isinstance(error, openai.APITimeoutError):
        return "a judge that did not answer in time"
    if isinstance(error, openai.APIConnectionError):
        return "a judge that cannot be reached"
    return "a reply of the judge that is not the protocol's"
