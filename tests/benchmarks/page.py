"""The page beside the engine alone: the app in a process of its own, and eight people who read its stream of events."""

import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from transformers import PreTrainedModel

from llava_app.checkpoints import DEMO, read_card, write_card
from llava_app.conversation import Conversation
from llava_app.engine import Sampling
from llava_app.engine.local import LocalEngine
from llava_app.loading import load
from tests.benchmarks.tab import greedy
from tests.serving import PATIENCE, serving

PEOPLE = 8
ROUNDS = 3
ANSWER = re.compile(r'"content",\d+,"text"\],"[^"]')  # in an event: letters that are added to a message
QUESTION = "Tell me everything that you know about memes."


def page_rows(tokens: int) -> Iterator[tuple[str, float, float, float, float | None, str]]:
    """Tokens per second for eight people, and seconds to the first text of one, both against the engine alone."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        write_endless_memeworld(runs / "endless")
        engine = LocalEngine(load(read_card(runs / "endless")))
        with serving("--runs", str(runs), "--model", "endless", log=runs / "app.log") as address:
            person = Person(address)
            person.ask(8)  # until the model is loaded
            paces, waits = [], []
            for number in range(ROUNDS):
                question = f"{QUESTION} Round {number}."
                paces.append((crowd_at_page(address, question, tokens), crowd(engine, question, tokens)))
                waits.append((person.ask(8, question), first_token(engine, question)))
        engine.close()
    ours, alone = (max(values) for values in zip(*paces[1:], strict=True))
    yield "eight people through the page's server", ours, alone, ours / alone, 0.9, "tokens/s"
    ours, alone = (min(values) for values in zip(*waits[1:], strict=True))
    yield "first text through the page's server (at most 100 ms more)", ours, alone, ours / alone, None, "s"


def write_endless_memeworld(folder: Path) -> None:
    """The built-in model without an end token: it is never likely, and it would end nothing."""
    shutil.copytree(DEMO / "memeworld", folder)
    for weights in folder.glob("model*.safetensors*"):
        weights.unlink()
    model = load(read_card(DEMO / "memeworld"), "float32").model
    without_end_token(model)
    model.save_pretrained(folder)
    write_card(folder, replace(read_card(DEMO / "memeworld"), name="endless"))


def without_end_token(model: PreTrainedModel) -> None:
    """Every answer becomes as long as it may be, and goes on in words."""
    settings = model.generation_config
    model.lm_head.weight.data[settings.eos_token_id] = 0
    settings.eos_token_id = settings.pad_token_id


def crowd(engine: LocalEngine, question: str, tokens: int) -> float:
    """Tokens per second of eight answers at once."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(PEOPLE) as people:
        for _ in people.map(lambda number: _listen(engine, f"{question} {number}", tokens), range(PEOPLE)):
            pass
    return PEOPLE * tokens / (time.perf_counter() - begun)


def first_token(engine: LocalEngine, question: str) -> float:
    begun = time.perf_counter()
    return next(_texts(engine, question, 8)) - begun


def _listen(engine: LocalEngine, question: str, tokens: int) -> None:
    for _ in _texts(engine, question, tokens):
        pass


def _texts(engine: LocalEngine, question: str, tokens: int) -> Iterator[float]:
    for piece in engine.answer(Conversation().ask(question), Sampling(temperature=0, max_new_tokens=tokens)):
        if piece.text:
            yield time.perf_counter()


def crowd_at_page(address: str, question: str, tokens: int) -> float:
    people = [Person(address) for _ in range(PEOPLE)]
    begun = time.perf_counter()
    with ThreadPoolExecutor(PEOPLE) as threads:
        for _ in threads.map(lambda number: people[number].ask(tokens, f"{question} {number}"), range(PEOPLE)):
            pass
    return PEOPLE * tokens / (time.perf_counter() - begun)


@dataclass
class Person:
    """A tab, as the server sees it: a session that sends what the box sends and reads the events that come back."""

    address: str

    def __post_init__(self) -> None:
        self._client = httpx.Client(base_url=self.address, timeout=PATIENCE)
        self._session = uuid.uuid4().hex
        config = self._client.get("config").json()
        box = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == "box")
        events = config["dependencies"]
        self._chain = [next(event["id"] for event in events if [box, "submit"] in event["targets"])]
        while followers := [event for event in events if event["trigger_after"] == self._chain[-1]]:
            self._chain.append(followers[0]["id"])
        self._inputs = {event["id"]: len(event["inputs"]) for event in events}

    def ask(self, tokens: int, question: str = QUESTION) -> float:
        """Ask greedily and read to the end; seconds until the first text of the answer."""
        begun = time.perf_counter()
        settings = greedy(tokens)
        data = [{"text": question, "files": []}, None, None, "run/endless", *settings]
        first = None
        for event in self._chain:
            shown = self._run(event, data if event == self._chain[0] else [None] * self._inputs[event])
            first = first or shown
        if first is None:
            raise RuntimeError("the page showed no answer")
        return first - begun

    def _run(self, event: int, data: list[Any]) -> float | None:
        """Trigger an event and read until it is over; when it first added to an answer, on the clock."""
        joined = self._client.post(
            "gradio_api/queue/join",
            json={"data": data, "fn_index": event, "session_hash": self._session, "trigger_id": None},
        )
        joined.raise_for_status()
        first = None
        with self._client.stream("GET", "gradio_api/queue/data", params={"session_hash": self._session}) as events:
            for line in events.iter_lines():
                if first is None and ANSWER.search(line):
                    first = time.perf_counter()
        return first
