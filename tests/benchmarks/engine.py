"""The engine beside the usual way, in one run: python -m tests.benchmarks.engine [--quick] [--json].

G is `model.generate` streamed by `TextIteratorStreamer` from a thread, as most Gradio apps have it; Q is G behind a
queue of one. Both sides have the same number of CPU threads, rounds alternate, the first is ignored and the best of the
rest counts. Absolute figures belong to the machine, ratios travel. A full run writes engine.json and engine.svg to
results/.
"""

import argparse
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, TextIteratorStreamer

from finetune.evaluate.memeworld import picture_of
from llava_app.checkpoints import built_in
from llava_app.conversation import Conversation
from llava_app.engine import Sampling
from llava_app.engine.local import LocalEngine
from llava_app.engine.weights import Weights
from llava_app.images import Picture
from llava_app.loading import Loaded, load
from llava_app.memory import free_bytes, make_plan, need
from llava_app.processors import make_processor
from llava_app.prompts import encode
from tests.benchmarks.draw import draw
from tests.benchmarks.memory import memory_rows
from tests.benchmarks.page import page_rows, without_end_token

RESULTS = Path(__file__).parent / "results"
PEOPLE = 8
QUESTIONS = ("What is the joke?", "What is on the left?", "Explain this meme.", "Which colour is it?")


@dataclass(frozen=True)
class Row:
    """One measured thing beside what it is compared with."""

    name: str
    value: float
    baseline: float
    ratio: float
    at_least: float | None  # the ratio that is asked for; None where it is only reported
    unit: str


@dataclass(frozen=True)
class Effort:
    rounds: int
    tokens: int
    large: bool  # whether the model of 500 million parameters is measured too


FULL, QUICK = Effort(5, 128, True), Effort(2, 48, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no large model; under a minute, no files")
    parser.add_argument("--json", action="store_true", help="print the rows as a list on the last line")
    options = parser.parse_args()
    effort = QUICK if options.quick else FULL
    rows = []
    for row in measure(effort):
        rows.append(row)
        wanted = "" if row.at_least is None else f", at least {row.at_least:g}"
        print(f"{row.name}: {row.value:.4g} {row.unit} against {row.baseline:.4g}: {row.ratio:.2f}{wanted}", flush=True)
    if not options.quick:
        machine = {
            "machine": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()[0],
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "torch": torch.__version__, "transformers": transformers.__version__,
        }  # fmt: skip
        written = {"measured_on": machine, "rows": [asdict(row) for row in rows]}
        (RESULTS / "engine.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        draw(RESULTS / "engine.svg", people=by_people(effort), turns=by_turn(effort))
    if options.json:
        print(json.dumps([{k: v for k, v in asdict(row).items() if k != "unit"} for row in rows]))


def measure(effort: Effort) -> Iterator[Row]:
    small = endless(load(built_in(), "float32"))
    with Pair(endless(load(built_in())), baseline=small) as pair:
        yield pair.one_stream("one stream, built-in model, as the app chooses", effort, at_least=2.5, same=False)
    with Pair(small) as pair:
        yield pair.one_stream("one stream, built-in model, float32", effort, at_least=2)
        yield from pair.eight_people("float32", effort, at_least=4)
    with Pair(endless(load(built_in(), "bfloat16"))) as pair:
        yield from list(pair.eight_people("bfloat16", effort, at_least=7))[:1]
    with Pair(endless(random_llava("576 image tokens", side=336, width=192, layers=6, inner=512))) as pair:
        yield from pair.turns(effort)
    if effort.large:
        yield from large(effort)
    yield from (Row(*row) for row in page_rows(effort.tokens))


def large(effort: Effort) -> Iterator[Row]:
    plain = endless(random_llava("500M", side=112, width=1024, layers=16, inner=8192, vocabulary=32_000))
    yield from (Row(*row) for row in memory_rows(plain))
    shorter = replace(effort, tokens=effort.tokens // 4)
    with Pair(in_bfloat16(plain, "8bit"), baseline=plain) as pair:
        yield pair.one_stream("one stream, 500M, 8 bit", shorter, at_least=2, same=False)
    half = in_bfloat16(plain, "bfloat16")
    with Pair(in_bfloat16(plain, "8bit"), baseline=half) as pair:
        yield pair.one_stream("one stream, 500M, 8 bit, against G in bfloat16", shorter, at_least=None, same=False)


def by_people(effort: Effort) -> dict[str, list[tuple[int, float]]]:
    """For each side, (people at once, tokens per second of all together), on the built-in model in float32."""
    with Pair(endless(load(built_in(), "float32"))) as pair:
        sides = {"this engine": pair.ours, "generate, one after the other": pair.usual}
        crowds = {
            name: [(count, pair.crowd(answer, count, effort.tokens)[0]) for count in (1, 1, 2, 4, 8, 16)]
            for name, answer in sides.items()
        }
    return {name: points[1:] for name, points in crowds.items()}  # the first only warmed up


def by_turn(effort: Effort) -> dict[str, list[tuple[int, float]]]:
    """For each side, (turn, seconds to its first token), with 576 image tokens in the first."""
    waits: dict[str, list[tuple[int, float]]] = {"this engine": [], "everything read again": []}
    with Pair(endless(random_llava("576 image tokens", side=336, width=192, layers=6, inner=512))) as pair:
        for kept in (False, True):
            talk = pair.question()
            for turn in range(1, 11):
                ours, usual = pair.ours(talk, 2).times[0], pair.usual(talk, 2).times[0]
                if kept:
                    waits["this engine"].append((turn, ours))
                    waits["everything read again"].append((turn, usual))
                talk = talk.answer("A big red dog.").ask(QUESTIONS[turn % len(QUESTIONS)])
    return waits


# Models


def endless(loaded: Loaded) -> Loaded:
    """The model without an end token, so that every answer is as long as it may be."""
    without_end_token(loaded.model)
    return loaded


def random_llava(name: str, *, side: int, width: int, layers: int, inner: int, vocabulary: int = 1024) -> Loaded:
    """A LLaVA of random float32 weights with the built-in model's tokenizer."""
    small = load(built_in(), "float32")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6, image_size=side,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=width // 64 if width > 512 else width // 32, vocab_size=vocabulary,
            max_position_embeddings=4096, tie_word_embeddings=vocabulary == 1024,
        ),
        image_token_index=small.model.config.image_token_id,
        image_seq_length=(side // 14) ** 2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config = deepcopy(small.model.generation_config)
    processor = make_processor(config, small.processor.tokenizer, image_mode="pad", template_name="vicuna_v1")
    plan = make_plan(need(config, "float32"), free_bytes(small.device), name=name, precision="float32")
    card = replace(small.card, name=name)
    return Loaded(card, model, Weights(model), processor, small.device, "float32", "", plan)


def in_bfloat16(loaded: Loaded, precision: str) -> Loaded:
    """A copy, since an engine takes the weights over; `precision` is bfloat16 or 8bit."""
    model = deepcopy(loaded.model).to(torch.bfloat16)
    return replace(loaded, model=model, weights=Weights(model, eight_bit=precision == "8bit"), precision=precision)


# Two ways to answer


@dataclass(frozen=True)
class Run:
    """One answer: when its tokens came, in seconds after the question, and what they were."""

    times: list[float]
    text: str

    @property
    def rate(self) -> float:
        """Tokens per second after the first."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


class _Clock(TextIteratorStreamer):
    """The usual streamer, which also notes when each token comes."""

    def __init__(self, tokenizer: object, asked: float) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._asked, self.times = asked, []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter() - self._asked)
        super().put(value)


class Pair:
    """The engine and G on the same weights."""

    def __init__(self, loaded: Loaded, baseline: Loaded | None = None) -> None:
        self.baseline = baseline or replace(loaded, model=deepcopy(loaded.model))
        self.engine = LocalEngine(loaded)
        self.queue_of_one = threading.Lock()
        self._fresh = iter(range(10**6))

    def __enter__(self) -> "Pair":
        torch.set_num_threads(self.engine._worker._threads)
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def ours(self, conversation: Conversation, tokens: int) -> Run:
        asked = time.perf_counter()
        times: list[float] = []
        text = ""
        for piece in self.engine.answer(conversation, Sampling(temperature=0, max_new_tokens=tokens)):
            text += piece.text
            times += [time.perf_counter() - asked] * (piece.tokens - len(times))
        return Run(times, text.strip())

    def usual(self, conversation: Conversation, tokens: int) -> Run:
        """G, and Q where several ask."""
        asked = time.perf_counter()
        with self.queue_of_one:
            loaded = self.baseline
            encoded = encode(conversation, loaded.processor, open_answer=True)
            streamer = _Clock(loaded.processor.tokenizer, asked)
            inputs = {"input_ids": encoded.input_ids[None], "attention_mask": torch.ones_like(encoded.input_ids)[None]}
            if encoded.pixel_values is not None:
                inputs["pixel_values"] = encoded.pixel_values.to(loaded.model.dtype)
            settings = {
                "max_new_tokens": tokens, "do_sample": False, "streamer": streamer,
                "suppress_tokens": [loaded.model.config.image_token_id],
            }  # fmt: skip
            with torch.inference_mode():
                worker = threading.Thread(target=self._generate, args=(inputs | settings,))
                worker.start()
                text = "".join(streamer)
                worker.join()
        return Run(streamer.times, text.strip())

    def _generate(self, arguments: dict[str, object]) -> None:
        torch.set_num_threads(self.engine._worker._threads)
        with torch.inference_mode():
            self.baseline.model.generate(**arguments)

    def question(self) -> Conversation:
        """A question about a picture that nobody has asked yet."""
        number = next(self._fresh)
        return Conversation().ask(QUESTIONS[number % len(QUESTIONS)], [self.picture(number)])

    def picture(self, number: int) -> Picture:
        return picture_of("heldout", 5000 + number)

    # What is measured

    def crowd(self, answer: Callable[[Conversation, int], Run], people: int, tokens: int) -> tuple[float, float]:
        """Tokens per second of all together, and how long the last one waited for a first token."""
        asked = [self.question() for _ in range(people)]
        begun = time.perf_counter()
        with ThreadPoolExecutor(people) as threads:
            runs = list(threads.map(lambda talk: answer(talk, tokens), asked))
        return people * tokens / (time.perf_counter() - begun), max(run.times[0] for run in runs)

    def one_stream(self, name: str, effort: Effort, *, at_least: float | None, same: bool = True) -> Row:
        def round_() -> tuple[float, float]:
            asked = self.question()
            ours, usual = self.ours(asked, effort.tokens), self.usual(asked, effort.tokens)
            assert not same or ours.text == usual.text, (ours.text, usual.text)
            return ours.rate, usual.rate

        ours, usual = best(round_, effort.rounds, max)
        return Row(name, ours, usual, ours / usual, at_least, "tokens/s")

    def eight_people(self, precision: str, effort: Effort, *, at_least: float) -> Iterator[Row]:
        rates, waits = [], []
        for _ in range(effort.rounds):
            ours = self.crowd(self.ours, PEOPLE, effort.tokens)
            usual = self.crowd(self.usual, PEOPLE, effort.tokens)
            rates.append((ours[0], usual[0]))
            waits.append((ours[1], usual[1]))
        ours_rate, usual_rate = of(rates, max)
        yield Row(f"eight people, {precision}", ours_rate, usual_rate, ours_rate / usual_rate, at_least, "tokens/s")
        ours_wait, usual_wait = of(waits, min)
        yield Row("eight people, the last first token", ours_wait, usual_wait, usual_wait / ours_wait, 10, "s")

    def turns(self, effort: Effort) -> Iterator[Row]:
        """First tokens: of a second turn, of a tenth, and of a new chat about a picture seen before."""
        second: list[tuple[float, float]] = []
        tenth: list[tuple[float, float]] = []
        again: list[tuple[float, float]] = []
        for _ in range(effort.rounds):
            talk = self.question()
            first = self.ours(talk, 2).times[0]
            waits = []
            for turn in range(2, 11):
                talk = talk.answer("A big red dog.").ask(QUESTIONS[turn % len(QUESTIONS)])
                waits.append(self.ours(talk, 2).times[0])
                if turn == 2:
                    second.append((waits[0], self.usual(talk, 2).times[0]))
            tenth.append((waits[-1], waits[0]))
            other = Conversation().ask("Please say what there is to see here.", talk.turns[0].images)
            again.append((self.ours(other, 2).times[0], first))
        ours, usual = of(second, min)
        yield Row("first token of turn 2 after 576 image tokens", ours, usual, usual / ours, 12, "s")
        late, early = of(tenth, min)
        yield Row("first token of turn 10, against turn 2 (at most 1.2)", late, early, late / early, None, "s")
        known, new = of(again, min)
        yield Row("a new chat about a picture seen before", known, new, new / known, 5, "s")


def best(
    round_: Callable[[], tuple[float, float]], rounds: int, choose: Callable[[Iterator[float]], float]
) -> tuple[float, float]:
    return of([round_() for _ in range(rounds)], choose)


def of(pairs: list[tuple[float, float]], choose: Callable[[Iterator[float]], float]) -> tuple[float, float]:
    """The best of each side, the first round left out."""
    later = pairs[1:]
    return choose(ours for ours, _ in later), choose(usual for _, usual in later)


if __name__ == "__main__":
    main()
