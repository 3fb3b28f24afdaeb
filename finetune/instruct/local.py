"""A teacher on this machine: any causal language model folder, through transformers."""

import threading
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.instruct.budget import Usage
from finetune.instruct.teachers import NoReply, Reply, Task, TeacherError


class LocalTeacher:
    """A causal language model folder on this machine, greedy, one question at a time."""

    at_once = 1

    def __init__(self, folder: Path, *, max_tokens: int) -> None:
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
