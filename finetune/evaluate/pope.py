"""POPE (Li et al. 2023): is there such a thing in the picture? Scored as evaluate.py of AoiDragon/POPE does."""

from pathlib import Path
from typing import Any

from finetune.evaluate.results import (
    Question,
    Result,
    Suite,
    by_category,
    each,
    opened,
    read_lines,
    text_of,
)
from llava_app.engine import Sampling
from llava_app.errors import DataError

SPLITS = ("random", "popular", "adversarial")
SHORT = "Answer the question using a single word or phrase."  # LLaVA-1.5's prompt for short answers


def says_yes(text: str) -> bool:
    """How POPE reads an answer: everything is yes but a first sentence with the word No, no or not."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def suite(folder: Path, images: Path, *, limit: int | None = None) -> Suite:
    """The official files coco_pope_random.json, …popular and …adversarial, the first `limit` questions of each."""
    questions = [question for split in SPLITS for question in _questions(folder, images, split)[:limit]]
    return Suite(
        "pope",
        "right",
        questions,
        each(lambda question, text: says_yes(text) == (question.right == ("yes",))),
        Sampling(temperature=0, max_new_tokens=16),
        lambda results: {f"POPE, {split}": measures(some) for split, some in by_category(results).items()},
    )


def measures(results: list[Result]) -> dict[str, Any]:
    """Accuracy, precision, recall, F1 (yes is positive) and the share of yes, in per cent; None where 0 / 0."""
    said = [(says_yes(r.answer), r.question.right == ("yes",)) for r in results if r.points is not None]
    hits = sum(yes and true for yes, true in said)
    yeses, trues = sum(yes for yes, _ in said), sum(true for _, true in said)
    return {
        "accuracy": _share(sum(yes == true for yes, true in said), len(said)),
        "precision": _share(hits, yeses),
        "recall": _share(hits, trues),
        "F1": _share(2 * hits, yeses + trues),
        "yes": _share(yeses, len(said)),
    }


def _share(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def _questions(folder: Path, images: Path, split: str) -> list[Question]:
    return [
        Question(
            f"{split}/{row.get('question_id', number)}",
            split,
            f"{text_of(row, 'text')}\n{SHORT}",
            (opened(images / text_of(row, "image")),),
            (_label(row),),
        )
        for number, row in enumerate(read_lines(folder / f"coco_pope_{split}.json"), 1)
    ]


def _label(row: dict[str, Any]) -> str:
    label = text_of(row, "label")
    if label not in ("yes", "no"):
        raise DataError(f"A label of POPE is “{label}”; it must be yes or no. Give the official files.")
    return label
