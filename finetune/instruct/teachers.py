"""Who writes: any OpenAI-compatible endpoint, or a local language model. The template teacher is in template.py."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import openai

from finetune.instruct.budget import Usage
from finetune.instruct.context import Context
from finetune.instruct.dialogue import KINDS
from finetune.instruct.prompts import Message
from llava_app.errors import UserError

FRAME = 16  # tokens that a chat template may put around a message, with much to spare
PREFACE = 64  # and before the first one


class TeacherError(UserError):
    """A teacher that cannot be used at all: no key, no such model, no quota left."""


class NoReply(Exception):
    """This question got no answer.

    `again`: it is worth asking once more, `after` so many seconds where the server says so.
    `billed`: it may have been worked on and billed, so it counts in full.
    """

    def __init__(self, reason: str, *, again: bool, billed: bool, after: float | None = None) -> None:
        super().__init__(reason)
        self.again = again
        self.billed = billed
        self.after = after


@dataclass(frozen=True)
class Task:
    """One question to the teacher: a kind of data for a picture."""

    context: Context
    kind: str
    messages: tuple[Message, ...]
    prompt: str  # version of the system prompt and the examples; "" for a teacher that reads none

    @property
    def key(self) -> str:
        return f"{self.context.id}/{self.kind}"


@dataclass(frozen=True)
class Reply:
    """What a teacher wrote; `finish` is "stop", or "length" at the token limit."""

    text: str
    finish: str
    usage: Usage


class Teacher(Protocol):
    """`most` bounds what `ask` may use; `at_once` is how many questions it takes at the same time."""

    name: str
    kinds: tuple[str, ...]
    at_once: int
    reads_prompts: bool

    def most(self, task: Task) -> Usage: ...

    def ask(self, task: Task) -> Reply:
        """Raises NoReply, or TeacherError where no further question would be answered either."""
        ...


class EndpointTeacher:
    """A model at OPENAI_BASE_URL (OpenAI itself where that is not set), with OPENAI_API_KEY."""

    kinds: tuple[str, ...] = KINDS
    reads_prompts = True

    def __init__(self, model: str, *, max_tokens: int, at_once: int, timeout: float) -> None:
        try:
            self.client = openai.OpenAI(max_retries=0, timeout=timeout)  # asking again needs the budget's leave
        except openai.OpenAIError as error:
            raise TeacherError(
                "The teacher needs a key. Set OPENAI_API_KEY (any word will do for a server without keys), and "
                "OPENAI_BASE_URL for another server than OpenAI's."
            ) from error
        self.name = model
        self.at_once = at_once
        self.max_tokens = max_tokens
        # OpenAI's newer models take only the first name, most other servers know only the second.
        self.limit_name = "max_completion_tokens" if self.client.base_url.host == "api.openai.com" else "max_tokens"

    def most(self, task: Task) -> Usage:
        """No tokenizer makes more tokens than a text has bytes."""
        letters = sum(len(message["content"].encode()) + FRAME for message in task.messages)
        return Usage(letters + PREFACE, self.max_tokens)

    def ask(self, task: Task) -> Reply:
        limit: dict[str, Any] = {self.limit_name: self.max_tokens}
        messages: Any = list(task.messages)
        try:
            completion = self.client.chat.completions.create(model=self.name, messages=messages, **limit)
            choice = completion.choices[0]
            used = completion.usage
            usage = Usage(used.prompt_tokens, used.completion_tokens) if used else self.most(task)
            return Reply(choice.message.content or "", choice.finish_reason or "stop", usage)
        except openai.APIStatusError as error:
            raise _status_error(error, self.name) from error
        except openai.APIConnectionError as error:
            unheard = type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout")
            raise NoReply(f"no answer: {error.message}", again=True, billed=not unheard) from error
        except (ValueError, TypeError, AttributeError, IndexError) as error:  # a body that is not the protocol's
            raise NoReply("an answer that is not in the OpenAI format", again=True, billed=True) from error


def _status_error(error: openai.APIStatusError, model: str) -> Exception:
    if error.status_code in (401, 403, 404) or error.code == "insufficient_quota":
        return TeacherError(
            f"The server refuses {model} with {error.status_code}: {error.message[:200]}. "
            "Check OPENAI_API_KEY, OPENAI_BASE_URL, the model's name and what your account has left."
        )
    again = error.status_code in (408, 409, 429) or error.status_code >= 500
    return NoReply(f"status {error.status_code}", again=again, billed=False, after=_retry_after(error))


def _retry_after(error: openai.APIStatusError) -> float | None:
    try:
        return max(0.0, float(error.response.headers["retry-after"]))
    except (KeyError, ValueError):  # none, or a date
        return None


class LocalTeacher:
    """A causal language model folder on this machine, greedy, one question at a time."""

    kinds: tuple[str, ...] = KINDS
    at_once = 1
    reads_prompts = True

    def __init__(self, folder: Path, *, max_tokens: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype="auto", **options)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            raise TeacherError(
                f"{folder} is no causal language model: {reason}. Give a transformers folder."
            ) from error
        self.model = model.to(device).eval()
        self.name = folder.resolve().name
        self.max_tokens = max_tokens
        self._lock = threading.Lock()

    def most(self, task: Task) -> Usage:
        return Usage(self._encode(task).shape[-1], self.max_tokens)

    def ask(self, task: Task) -> Reply:
        ids = self._encode(task).to(self.model.device)
        prompt, room = ids.shape[-1], getattr(self.model.config, "max_position_embeddings", None)
        if room and prompt + self.max_tokens > room:
            reason = f"{prompt} tokens and {self.max_tokens} for the answer exceed the model's {room}"
            raise NoReply(reason, again=False, billed=False)
        with self._lock:
            written = self.model.generate(
                ids, attention_mask=ids.new_ones(ids.shape), do_sample=False, max_new_tokens=self.max_tokens
            )[0, prompt:]
        finish = "length" if len(written) == self.max_tokens else "stop"
        return Reply(self.tokenizer.decode(written, skip_special_tokens=True), finish, Usage(prompt, len(written)))

    def _encode(self, task: Task) -> Any:
        """(1, tokens). A model without a chat template gets the texts one after the other."""
        from jinja2 import TemplateError

        if self.tokenizer.chat_template is None:
            text = "\n\n".join(message["content"] for message in task.messages)
            return self.tokenizer(text + "\n\n", return_tensors="pt").input_ids
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        try:
            return self.tokenizer.apply_chat_template(list(task.messages), **options)["input_ids"]
        except TemplateError:  # a template that knows no system message
            system, first, *others = task.messages
            merged = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
            return self.tokenizer.apply_chat_template([merged, *others], **options)["input_ids"]
