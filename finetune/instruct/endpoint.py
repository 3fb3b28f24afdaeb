"""A teacher behind the OpenAI chat protocol: OpenAI itself, vLLM, llama.cpp, Ollama and others."""

from typing import Any

import openai

from finetune.instruct.budget import Usage
from finetune.instruct.teachers import NoReply, Reply, Task, TeacherError

FRAME = 16  # tokens that a chat template may put around a message, with much to spare
PREFACE = 64  # and before the first one


class EndpointTeacher:
    """A model at OPENAI_BASE_URL (OpenAI itself where that is not set), with OPENAI_API_KEY."""

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
            raise _status_error(error, self.name, key=self.client.api_key) from error
        except openai.APIConnectionError as error:
            unheard = type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout")
            raise NoReply(f"no answer: {error.message}", again=True, billed=not unheard) from error
        except (ValueError, TypeError, AttributeError, IndexError) as error:  # a body that is not the protocol's
            raise NoReply("an answer that is not in the OpenAI format", again=True, billed=True) from error


def _status_error(error: openai.APIStatusError, model: str, *, key: str) -> Exception:
    if error.status_code in (401, 403, 404) or error.code == "insufficient_quota":
        said = error.message.replace(key, "…")[:200]  # some servers repeat the key
        return TeacherError(
            f"The server refuses {model} with {error.status_code}: {said}. "
            "Check OPENAI_API_KEY, OPENAI_BASE_URL, the model's name and what your account has left."
        )
    again = error.status_code in (408, 409, 429) or error.status_code >= 500
    after = _retry_after(error)
    wait = f", which asks to wait {after:,.0f} seconds" if after else ""
    return NoReply(f"status {error.status_code}{wait}", again=again, billed=False, after=after)


def _retry_after(error: openai.APIStatusError) -> float | None:
    try:
        return max(0.0, float(error.response.headers["retry-after"]))
    except (KeyError, ValueError):  # none, or a date
        return None
