import gc
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from llava_app import checkpoints
from llava_app.checkpoints import Card, built_in
from llava_app.conversation import Conversation
from llava_app.engine import Piece, Sampling
from llava_app.engine.local import LocalEngine
from llava_app.engine.sampling import choose
from llava_app.engine.watch import Wait
from llava_app.errors import BusyError, ContextError, ModelError
from llava_app.images import Picture
from llava_app.loading import Loaded, load
from llava_app.prompts import encode

GREEDY = Sampling(temperature=0, max_new_tokens=60)
NOISE = [
    Picture(Image.frombytes("RGB", (40, 30), random.Random(seed).randbytes(3600)), f"noise {seed}") for seed in (1, 2)
]
FUNNY = Conversation().ask("What is funny?", NOISE[:1])


@pytest.fixture
def engine(tiny_loaded: Loaded) -> Iterator[LocalEngine]:
    engine = LocalEngine(tiny_loaded)
    yield engine
    engine.close()


def generated(loaded: Loaded, conversation: Conversation) -> list[int]:
    """What `model.generate` answers to the same inputs."""
    encoded = encode(conversation, loaded.processor, open_answer=True)
    ids = encoded.input_ids[None]
    images = {} if encoded.pixel_values is None else {"pixel_values": encoded.pixel_values}
    output = loaded.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **images,
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=GREEDY.max_new_tokens,
            eos_token_id=1,
            pad_token_id=2,
            suppress_tokens=[loaded.model.config.image_token_id],
        ),
    )
    return output[0, ids.shape[1] :].tolist()


def chosen(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by every token that the engine chooses."""
    tokens: list[int] = []

    def note(logits: torch.Tensor, samplings: list[Sampling], **others: Any) -> list[int]:
        chosen = choose(logits, samplings, **others)
        tokens.extend(chosen)
        return chosen

    monkeypatch.setattr("llava_app.engine.worker.choose", note)
    return tokens


CONVERSATIONS = {
    "a picture": FUNNY,
    "no picture": Conversation().ask("Hello"),
    "two turns": FUNNY.answer("A joke.").ask("Why?"),
    "a second picture in a later turn": FUNNY.answer("A joke.").ask("And this one?", NOISE[1:]),
    "two pictures in one turn": Conversation().ask("Compare.", NOISE),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_greedy_answers_equal_generate_token_for_token(
    engine: LocalEngine, tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    expected = generated(tiny_loaded, CONVERSATIONS[name])
    assert len(set(expected)) > 1
    tokens = chosen(engine, monkeypatch)
    pieces = list(engine.answer(CONVERSATIONS[name], GREEDY))
    assert tokens == expected
    assert pieces[-1].tokens == len(expected)
    assert pieces[-1].finish == ("stop" if expected[-1] == 1 else "length")


def text_of(pieces: Iterator[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_the_text_is_the_decoding_of_the_tokens(engine: LocalEngine, tiny_loaded: Loaded) -> None:
    expected = tiny_loaded.processor.tokenizer.decode(generated(tiny_loaded, FUNNY), skip_special_tokens=True)
    assert text_of(engine.answer(FUNNY, GREEDY)) == expected.removeprefix(" ")


def test_the_answer_depends_on_the_picture(engine: LocalEngine) -> None:
    other = Conversation().ask("What is funny?", NOISE[1:])
    assert text_of(engine.answer(FUNNY, GREEDY)) != text_of(engine.answer(other, GREEDY))


def test_the_same_seed_gives_the_same_answer_and_no_seed_another(engine: LocalEngine) -> None:
    free = Sampling(temperature=1, max_new_tokens=20)
    seeded = replace(free, seed=7)
    assert text_of(engine.answer(FUNNY, seeded)) == text_of(engine.answer(FUNNY, seeded))
    assert len({text_of(engine.answer(FUNNY, free)) for _ in range(4)}) > 1


def test_the_space_between_role_and_answer_is_not_part_of_the_answer(
    engine: LocalEngine, tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = iter([*tiny_loaded.processor.tokenizer("  A  joke ", add_special_tokens=False)["input_ids"], 1])
    monkeypatch.setattr("llava_app.engine.worker.choose", lambda *_, **__: [next(script)])
    assert text_of(engine.answer(FUNNY, GREEDY)) == " A  joke "


def test_the_image_token_is_never_chosen(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def look(logits: torch.Tensor, *_: object, **__: object) -> list[int]:
        seen.append(float(logits[0, 3]))
        return [1]

    monkeypatch.setattr("llava_app.engine.worker.choose", look)
    list(engine.answer(FUNNY, GREEDY))
    assert seen == [-torch.inf]


def test_any_of_several_end_tokens_ends_the_answer(tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    newline = tiny_loaded.processor.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    monkeypatch.setattr(tiny_loaded.model.generation_config, "eos_token_id", [1, newline])
    monkeypatch.setattr("llava_app.engine.worker.choose", lambda *_, **__: [newline])
    engine = LocalEngine(tiny_loaded)
    assert list(engine.answer(FUNNY, GREEDY))[-1] == Piece("", "stop", 1)
    engine.close()


def test_the_token_limit_ends_the_answer(engine: LocalEngine) -> None:
    pieces = list(engine.answer(FUNNY, replace(GREEDY, max_new_tokens=3)))
    assert (pieces[-1].finish, pieces[-1].tokens) == ("length", 3)


def with_context(loaded: Loaded, length: int, rows: int = 4) -> LocalEngine:
    return LocalEngine(loaded, plan=replace(loaded.plan, rows=rows, length=length))


def test_the_answer_is_cut_to_the_room_that_the_context_leaves(tiny_loaded: Loaded) -> None:
    prompt = len(encode(FUNNY, tiny_loaded.processor, open_answer=True).input_ids)
    engine = with_context(tiny_loaded, prompt + 2)
    last = list(engine.answer(FUNNY, GREEDY))[-1]
    engine.close()
    assert (last.finish, last.tokens) == ("length", 2)


def test_a_question_without_room_for_an_answer_is_refused_with_both_numbers(tiny_loaded: Loaded) -> None:
    prompt = len(encode(FUNNY, tiny_loaded.processor, open_answer=True).input_ids)
    engine = with_context(tiny_loaded, prompt)
    with pytest.raises(ContextError, match=rf"has {prompt} tokens.*at most {prompt}"):
        list(engine.answer(FUNNY, GREEDY))
    engine.close()


def test_a_long_conversation_goes_on_without_its_oldest_turns_and_says_so(tiny_loaded: Loaded) -> None:
    prompt = len(encode(FUNNY, tiny_loaded.processor, open_answer=True).input_ids)
    engine = with_context(tiny_loaded, prompt + 120)
    conversation = FUNNY
    said = []
    for number in range(6):
        pieces = list(engine.answer(conversation, GREEDY))
        said += [piece.left_out for piece in pieces if piece.left_out]
        conversation = conversation.answer("Something short.").ask(f"Question {number}?")
    assert said
    assert "no longer sees the first" in said[0]
    engine.close()


def test_a_failure_reaches_the_reader_with_its_cause_and_the_next_question_works(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> list[int]:
        raise RuntimeError("broken") from ValueError("the reason")

    with monkeypatch.context() as patch:
        patch.setattr("llava_app.engine.worker.choose", fail)
        with pytest.raises(RuntimeError, match="broken") as caught:
            list(engine.answer(FUNNY, GREEDY))
    assert isinstance(caught.value.__cause__, ValueError)
    assert list(engine.answer(FUNNY, GREEDY))[-1].finish is not None


def test_too_little_gpu_memory_is_something_a_person_is_told(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> list[int]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("llava_app.engine.worker.choose", fail)
    with pytest.raises(ModelError, match=r"too little free memory.*smaller model") as caught:
        list(engine.answer(FUNNY, GREEDY))
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


class Gate:
    """Stands in for the choice of a token, which then takes until somebody opens the gate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()
        self.tokens = 0
        monkeypatch.setattr("llava_app.engine.worker.choose", self)

    def __call__(self, logits: torch.Tensor, *_: object, **__: object) -> list[int]:
        self.tokens += len(logits)
        self.reached.set()
        assert self.opened.wait(30)
        return [50] * len(logits)


def test_closing_the_iterator_stops_the_model_within_one_token_and_does_not_wait(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    answer = engine.answer(FUNNY, GREEDY)
    assert next(answer).text == ""
    assert gate.reached.wait(30)
    answer.close()  # the model is in the middle of its first token, and stays there
    gate.opened.set()
    list(engine.answer(FUNNY, replace(GREEDY, max_new_tokens=1)))
    assert gate.tokens == 2


def test_an_answer_that_nobody_reads_any_more_is_stopped_too(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    answer = engine.answer(FUNNY, GREEDY)
    next(answer)
    del answer
    gc.collect()
    gate.opened.set()
    list(engine.answer(FUNNY, replace(GREEDY, max_new_tokens=1)))
    assert gate.tokens <= 2


@pytest.fixture
def one_row(tiny_loaded: Loaded) -> Iterator[LocalEngine]:
    engine = with_context(tiny_loaded, 512, rows=1)
    yield engine
    engine.close()


def test_heartbeats_say_whether_the_answer_is_queued_or_the_prompt_being_read(
    one_row: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate = one_row, Gate(monkeypatch)
    first, second = engine.answer(FUNNY, GREEDY), engine.answer(FUNNY, GREEDY)
    next(first)
    assert gate.reached.wait(30)
    assert next(first) == Piece("", phase="reading")
    assert next(second) == Piece("", phase="queued", wait=Wait(0, None))
    gate.opened.set()
    assert text_of(first) == text_of(second) != ""


def test_who_waits_learns_how_many_come_before_and_about_how_long_that_takes(
    one_row: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(one_row.answer(FUNNY, GREEDY))
    typical = one_row._worker.meter.until(0, rows=1).seconds
    gate = Gate(monkeypatch)
    first, *others = (one_row.answer(FUNNY, replace(GREEDY, temperature=1, seed=seed)) for seed in range(4))
    next(first)
    assert gate.reached.wait(30)
    assert [next(other).wait for other in others] == [Wait(ahead, (ahead + 1) * typical) for ahead in range(3)]
    others[0].close()  # who gives up is not waited for
    assert [next(other).wait.ahead for other in others[1:]] == [0, 1]
    gate.opened.set()
    assert all(text_of(answer) for answer in (first, *others[1:]))
    assert one_row.snapshot().queued == 0


def test_a_question_given_up_while_queued_is_never_read(one_row: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, gate = one_row, Gate(monkeypatch)
    first, second = engine.answer(FUNNY, replace(GREEDY, max_new_tokens=1)), engine.answer(FUNNY, GREEDY)
    next(first)
    next(second)
    second.close()
    gate.opened.set()
    list(first)
    list(engine.answer(FUNNY, replace(GREEDY, max_new_tokens=1)))
    assert gate.tokens == 2


def test_a_slow_reader_gets_what_has_arrived_as_one_piece(engine: LocalEngine) -> None:
    answer = engine.answer(FUNNY, GREEDY)
    first = next(answer)
    list(engine.answer(FUNNY, GREEDY))  # served after the first one
    rest = list(answer)
    assert len(rest) == 1
    assert first.text + rest[0].text == text_of(engine.answer(FUNNY, GREEDY))


def test_the_time_limit_ends_the_answer_and_keeps_what_was_written(
    tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_app.engine.worker.choose", lambda logits, *_, **__: [50] * len(logits))
    engine = LocalEngine(tiny_loaded, time_limit=0)
    pieces = list(engine.answer(FUNNY, GREEDY))
    assert pieces[-1].finish == "time"
    assert text_of(iter(pieces)) != ""
    engine.close()


def test_closing_the_engine_ends_the_running_answer_and_refuses_the_waiting_one(
    one_row: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate = one_row, Gate(monkeypatch)
    running, waiting = engine.answer(FUNNY, GREEDY), engine.answer(FUNNY, GREEDY)
    next(running)
    next(waiting)
    assert gate.reached.wait(30)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._worker.closed:
        time.sleep(0.01)
    gate.opened.set()
    closing.join()
    assert list(running)[-1].finish == "stopped"
    with pytest.raises(BusyError, match="Tiny has been put away"):
        list(waiting)
    with pytest.raises(BusyError, match="Send the question again"):
        list(engine.answer(FUNNY, GREEDY))


def test_a_closed_engine_lets_go_of_the_model_and_of_its_thread(tiny_card: Card) -> None:
    threads = set(threading.enumerate())
    loaded = load(tiny_card, "float32")
    engine = LocalEngine(loaded)
    list(engine.answer(FUNNY, replace(GREEDY, max_new_tokens=1)))
    engine.close()
    assert set(threading.enumerate()) <= threads
    assert loaded.model not in gc.get_referents(engine._worker.__dict__)


def test_a_small_model_answers_on_one_thread_and_leaves_the_others_as_they_were(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def note(*_: object, **__: object) -> list[int]:
        threads.append(torch.get_num_threads())
        return [1]

    threads: list[int] = []
    monkeypatch.setattr("llava_app.engine.worker.choose", note)
    before = torch.get_num_threads()
    list(engine.answer(FUNNY, GREEDY))
    engine.close()
    assert threads == [1]
    assert torch.get_num_threads() == before


def test_four_bit_answers_stream_on_a_cpu(tiny_card: Card) -> None:
    engine = LocalEngine(load(tiny_card, "4bit"))
    assert list(engine.answer(FUNNY, replace(GREEDY, max_new_tokens=3)))[-1].tokens in (1, 2, 3)
    engine.close()


@pytest.mark.skipif(not (checkpoints.DEMO / "memeworld").exists(), reason="the built-in model is not trained yet")
@pytest.mark.parametrize("precision", ["auto", "4bit"])
def test_the_built_in_model_ends_its_answer_itself(precision: str) -> None:
    engine = LocalEngine(load(built_in(), precision))
    picture = Picture(Image.new("RGB", (112, 112), "red"), "red")
    pieces = list(engine.answer(Conversation().ask("what is this?", [picture]), GREEDY))
    engine.close()
    assert pieces[-1].finish == "stop"
    assert text_of(iter(pieces))


def test_numbers_from_outside_are_moved_into_bounds() -> None:
    assert Sampling.clamped(temperature=-1, top_p=7, max_new_tokens=1e9, seed=-3.0) == Sampling(0.0, 1.0, 2048, 0)
    nan = float("nan")
    assert Sampling.clamped(temperature=nan, top_p=None, max_new_tokens=nan, seed=nan) == Sampling()
    assert Sampling.clamped(max_new_tokens=7.9, seed=3.7) == Sampling(max_new_tokens=7, seed=3)


@pytest.mark.parametrize("values", [{"temperature": 2.1}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"seed": -1}])
def test_a_setting_out_of_bounds_cannot_be_made(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must lie between"):
        Sampling(**values)  # type: ignore[arg-type]
