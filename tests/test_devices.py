"""What runs on a GPU, run on a pretended one: every tensor where it belongs, and nothing in a graph that waits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_app.checkpoints import Card
from llava_app.conversation import Conversation
from llava_app.engine import Sampling
from llava_app.engine.local import LocalEngine
from llava_app.engine.worker import Worker
from llava_app.images import picture_of
from llava_app.loading import Loaded, load
from tests.emulated_cuda import EmulatedCuda, move
from tests.family_models import CONFIGS, write_family_model
from tests.fixtures_model import write_tiny_model

DRAWN = Sampling(temperature=0.8, top_p=0.9, top_k=40, repetition_penalty=1.2, max_new_tokens=12, seed=1)
GREEDY = Sampling(temperature=0, max_new_tokens=12)


@pytest.fixture
def card(tmp_path: Path) -> Card:
    return write_tiny_model(tmp_path / "tiny")


def loaded_on_cpu(card: Card, precision: str) -> Loaded:
    return load(card, precision, device=torch.device("cpu"))


@pytest.fixture
def on_gpu(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> Callable[[Loaded], Loaded]:
    """Puts a model onto the pretended GPU; the engine's thread may use that."""

    def work(worker: Worker) -> None:
        with EmulatedCuda():
            works(worker)

    def moved(loaded: Loaded) -> Loaded:
        move(loaded.model)
        return replace(loaded, device=cuda)

    works = Worker.work
    monkeypatch.setattr(Worker, "work", work)
    return moved


def answers(loaded: Loaded) -> list[str]:
    """Of a conversation about two pictures."""
    engine = LocalEngine(loaded)
    red, blue = (picture_of(Image.new("RGB", (40, 30), colour), colour) for colour in ("red", "blue"))
    talk, texts = Conversation(), []
    for question, pictures, sampling in (("What?", [red], GREEDY), ("Why?", [], DRAWN), ("And this?", [blue], DRAWN)):
        talk = talk.ask(question, pictures)
        texts.append("".join(piece.text for piece in engine.answer(talk, sampling)))
        talk = talk.answer(texts[-1])
    engine.close()
    return texts


def test_a_gpu_answers_as_the_cpu_does(
    card: Card, on_gpu: Callable[[Loaded], Loaded], caplog: pytest.LogCaptureFixture
) -> None:
    wanted = answers(loaded_on_cpu(card, "float32"))
    assert answers(on_gpu(loaded_on_cpu(card, "float32"))) == wanted
    assert not caplog.messages  # such as that a step was not recorded


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_a_gpu_sees_pictures_in_tiles_as_the_cpu_does(
    tmp_path: Path, on_gpu: Callable[[Loaded], Loaded], kind: str
) -> None:
    card = write_family_model(tmp_path / kind, CONFIGS[kind]())
    wanted = answers(loaded_on_cpu(card, "float32"))
    assert answers(on_gpu(loaded_on_cpu(card, "float32"))) == wanted


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "4bit"])
def test_a_gpu_answers_in_16_and_in_4_bit(
    card: Card, on_gpu: Callable[[Loaded], Loaded], caplog: pytest.LogCaptureFixture, precision: str
) -> None:
    assert all(answers(on_gpu(loaded_on_cpu(card, precision))))
    assert "recorded" not in caplog.text


@torch.inference_mode()
def test_what_waits_for_the_gpu_is_refused_in_a_recording(cuda: torch.device) -> None:
    numbers = torch.arange(3, device=cuda)
    for wait in (numbers.sum().item, numbers.tolist, numbers.nonzero, lambda: numbers[numbers > 1]):
        wait()
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            wait()
    with pytest.raises(RuntimeError, match="same device"):
        numbers + torch.arange(3)
