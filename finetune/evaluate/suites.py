"""The suites by name, each built from the command's options."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from finetune.evaluate.judge import Judge
from finetune.evaluate.results import Result, Suite
from llava_app.errors import DataError

MEMEWORLD_QUESTIONS = 1000

Builder = Callable[[argparse.Namespace, Judge | None, Path], Suite]


@dataclass(frozen=True)
class Entry:
    """How a suite is built from options, a judge and the folder of its results, and what it measures."""

    build: Builder
    about: str
    name: Callable[[argparse.Namespace], str] = lambda options: str(options.suite)


def name_of(options: argparse.Namespace) -> str:
    """The suite's name with what makes its scores other ones: the split, the prompt."""
    return SUITES[options.suite].name(options)


def build(options: argparse.Namespace, judge: Judge | None, folder: Path) -> Suite:
    """The suite that the options name. Raises DataError when its files or its judge are missing."""
    return SUITES[options.suite].build(options, judge, folder)


def _memeworld(options: argparse.Namespace, _judge: Judge | None, _folder: Path) -> Suite:
    from finetune.evaluate import clips, memeworld, pairs, small_print

    limit = options.limit or MEMEWORLD_QUESTIONS
    how = {"split": options.split, "limit": limit, "swap_pictures": options.swap_pictures}
    lessons = {"pairs": pairs.questions, "clips": clips.questions, "small-print": small_print.questions}
    questions = lessons.get(options.ask) or partial(memeworld.questions, asking=options.ask)
    return memeworld.suite(name_of(options), questions(**how))


def _memeworld_name(options: argparse.Namespace) -> str:
    asking = [options.ask] * (options.ask != "suite")
    return "-".join(["memeworld", options.split, *asking] + ["swapped"] * options.swap_pictures)


def _vibes(options: argparse.Namespace, judge: Judge | None, folder: Path) -> Suite:
    from finetune.evaluate import vibes

    return vibes.suite(judge, reviews=folder / "judge.jsonl")


def _llava_bench(options: argparse.Namespace, judge: Judge | None, folder: Path) -> Suite:
    from finetune.evaluate import llava_bench

    if judge is None:
        raise DataError("LLaVA-Bench needs a judge: --judge MODEL, by any endpoint that speaks the OpenAI protocol.")
    wild = options.suite == "llava-bench-wild"
    data = options.data or (llava_bench.download_wild() if wild else _data(options))
    bench = llava_bench.read_bench(options.suite, data)
    images = options.images or data / "images"
    suite = llava_bench.suite(bench, images, judge, folder=folder, both_orders=options.both_orders)
    return replace(suite, questions=suite.questions[: options.limit])


def _scienceqa(options: argparse.Namespace, judge: Judge | None, folder: Path) -> Suite:
    from finetune.evaluate import scienceqa
    from finetune.evaluate.ensembles import ensembles

    data = _data(options)
    problems = scienceqa.read_problems(data / "problems.json")
    images = options.images or data / "images"
    suite = scienceqa.suite(problems, images, kind=options.prompt, limit=options.limit)
    if judge is None:
        return suite

    def tables(results: list[Result]) -> dict[str, dict[str, Any]]:
        ours = {result.question.identifier: result.answer for result in results if result.points is not None}
        return suite.tables(results) | ensembles(problems, ours, judge, folder=folder, seed=options.seed)

    return replace(suite, tables=tables)


def _pope(options: argparse.Namespace, _judge: Judge | None, _folder: Path) -> Suite:
    from finetune.evaluate import pope

    return pope.suite(_data(options), options.images or _data(options) / "images", limit=options.limit)


def _textvqa(options: argparse.Namespace, _judge: Judge | None, _folder: Path) -> Suite:
    from finetune.evaluate import textvqa

    file = _data(options)
    file = file / "TextVQA_0.5.1_val.json" if file.is_dir() else file
    return textvqa.suite(file, options.images or file.parent / "train_images", limit=options.limit)


def _lmms(options: argparse.Namespace, judge: Judge | None, folder: Path) -> Suite:
    from finetune.evaluate import lmms

    return lmms.suite(options.suite, judge, folder=folder, data=options.data, limit=options.limit)


def _data(options: argparse.Namespace) -> Path:
    if options.data is None:
        raise DataError(f"{options.suite} needs its official files: --data FOLDER.")
    return Path(options.data)


SUITES: dict[str, Entry] = {
    "memeworld": Entry(_memeworld, "drawn pictures that training never showed", _memeworld_name),
    "vibes": Entry(_vibes, "ten prompts that tell whether a model sees"),
    "llava-bench-coco": Entry(_llava_bench, "90 questions about 30 COCO pictures, judged"),
    "llava-bench-wild": Entry(_llava_bench, "60 questions about 24 pictures, judged"),
    "scienceqa": Entry(_scienceqa, "multiple choice with and without pictures", lambda o: f"scienceqa-{o.prompt}"),
    "pope": Entry(_pope, "does it see things that are not there?"),
    "textvqa": Entry(_textvqa, "reading text in photographs"),
    "gqa": Entry(_lmms, "short questions about scenes, by lmms-eval"),
    "mme": Entry(_lmms, "yes-or-no questions of many kinds, by lmms-eval"),
    "mm-vet": Entry(_lmms, "questions that need several abilities, by lmms-eval, judged"),
    "seed": Entry(_lmms, "multiple choice about pictures and clips, by lmms-eval"),
    "mmbench": Entry(_lmms, "multiple choice, each asked with its choices rolled, by lmms-eval"),
}
