"""Engines in a process of their own, on the built-in model."""

import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from finetune.evaluate.memeworld import picture_of
from llava_app.checkpoints import built_in, read_card
from llava_app.conversation import Conversation
from llava_app.engine import Piece, Sampling
from llava_app.engine.host import Host
from llava_app.engine.local import LocalEngine
from llava_app.engine.process import ModelProcess, ProcessEngine
from llava_app.errors import ContextError, ModelError
from llava_app.loading import Loaded, load
from tests.browser.endless import write_endless_model

GREEDY = Sampling(temperature=0, max_new_tokens=48)


@pytest.fixture(scope="module")
def models() -> ModelProcess:
    return ModelProcess()


@pytest.fixture
def engine(models: ModelProcess) -> Iterator[ProcessEngine]:
    engine = ProcessEngine(models, built_in(), "float32")
    yield engine
    engine.close()


def text(engine: ProcessEngine | LocalEngine, conversation: Conversation, sampling: Sampling = GREEDY) -> str:
    return "".join(piece.text for piece in engine.answer(conversation, sampling))


def joke(number: int = 0) -> Conversation:
    return Conversation().ask("What is the joke?", [picture_of("heldout", number)])


def test_answers_are_those_of_an_engine_in_this_process(engine: ProcessEngine) -> None:
    here = LocalEngine(load(built_in(), "float32"))
    assert [text(engine, joke(number)) for number in range(3)] == [text(here, joke(number)) for number in range(3)]
    here.close()


def test_the_last_piece_says_why_it_ended_and_how_many_tokens_came(engine: ProcessEngine) -> None:
    pieces = list(engine.answer(joke(), Sampling(temperature=0, max_new_tokens=3)))
    assert (pieces[-1].finish, pieces[-1].tokens) == ("length", 3)


def test_an_engine_that_nobody_listens_to_any_more_stops(engine: ProcessEngine) -> None:
    answer = engine.answer(joke(), Sampling(temperature=2, top_p=1, max_new_tokens=900, seed=1))
    next(piece for piece in answer if piece.text)
    answer.close()  # type: ignore[attr-defined]
    wait_until(lambda: engine.snapshot().answering == 0)
    assert engine.snapshot().tokens_written < 900


def test_what_a_person_may_be_told_crosses_over_as_it_is(engine: ProcessEngine) -> None:
    with pytest.raises(ContextError, match="tokens"):
        text(engine, Conversation().ask("word " * 5000))


def test_a_fault_crosses_over_with_its_trace_for_the_log(engine: ProcessEngine) -> None:
    with pytest.raises(RuntimeError, match=r"in the models' process:\n(?s:.*)Traceback"):
        text(engine, Conversation())  # there is nothing to answer
    assert text(engine, joke())


def test_a_model_that_cannot_be_loaded_is_named(models: ModelProcess) -> None:
    with pytest.raises(ModelError, match="no precision int2"):
        ProcessEngine(models, built_in(), "int2")


def test_a_process_that_dies_ends_its_answers_and_starts_anew_with_the_next_question(
    models: ModelProcess, tmp_path: Path
) -> None:
    write_endless_model(tmp_path / "endless")
    engine = ProcessEngine(models, read_card(tmp_path / "endless"), "float32")
    brief = Sampling(temperature=0, max_new_tokens=5)
    said = text(engine, joke(), brief)
    endless = engine.answer(joke(), Sampling(temperature=0, max_new_tokens=2000))
    next(piece for piece in endless if piece.text)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(ModelError, match="has ended"):
        list(endless)
    wait_until(lambda: engine.snapshot() is None)
    assert text(engine, joke(), brief) == said
    engine.close()


def test_several_ask_at_once(engine: ProcessEngine) -> None:
    alone = [text(engine, joke(number)) for number in range(6)]
    together = dict.fromkeys(range(6), "")
    threads = [
        threading.Thread(target=lambda number=number: together.update({number: text(engine, joke(number))}))
        for number in together
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(together.values()) == alone


def test_the_processor_and_the_plan_come_along(engine: ProcessEngine) -> None:
    processor, plan = engine.opened.parts
    assert processor.tokenizer.bos_token == "<s>"
    assert plan.length == 1024


def wait_until(true: object) -> None:
    deadline = time.monotonic() + 20
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Broken:
    """An engine whose GPU has failed."""

    card = built_in()

    def answer(self, conversation: Conversation, sampling: Sampling) -> Iterator[Piece]:
        yield Piece("It ")
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def test_a_process_whose_gpu_failed_says_so_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = multiprocessing.Pipe()
    host, codes = Host(theirs), []
    monkeypatch.setattr("os._exit", codes.append)
    host._engines[3] = Broken()  # type: ignore[assignment]
    host._do(7, "answer", (3, joke(), GREEDY), threading.Event())
    arrived = [ours.recv() for _ in range(2)]
    assert arrived[0] == (7, Piece("It "))
    assert "illegal memory access" in str(arrived[1][1])
    assert codes == [1]


def test_memory_that_went_to_somebody_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(loaded: Loaded) -> LocalEngine:
        raise torch.OutOfMemoryError("CUDA out of memory")

    ours, theirs = multiprocessing.Pipe()
    monkeypatch.setattr("llava_app.engine.host.LocalEngine", full)
    Host(theirs)._do(7, "load", (built_in(), "float32", 1.0), threading.Event())
    _, error = ours.recv()
    assert isinstance(error, ModelError)
    assert "too little free memory for" in str(error)
