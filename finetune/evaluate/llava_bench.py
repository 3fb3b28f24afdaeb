"""LLaVA-Bench (Liu et al. 2023): a text-only judge scores a model's answers beside GPT-4's, on COCO or in the wild."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.evaluate.judge import SYSTEM, Consulted, Judge, Messages, consult
from finetune.evaluate.results import (
    Answer,
    Question,
    Result,
    Suite,
    opened,
    read_lines,
    text_of,
    unanswered,
    write_whole,
)
from finetune.evaluate.reviews import NO_SCORES, Pair, pair_of, relative_score
from llava_app.engine import Sampling
from llava_app.errors import DataError

WILD_REPO = "liuhaotian/llava-bench-in-the-wild"
CATEGORIES = ("conv", "detail", "complex")
# The names of the files: ours (COCO), LLaVA's repository (COCO), the Hub (in the wild).
QUESTIONS = ("questions.jsonl", "qa90_questions.jsonl", "coco2014_val_qa_eval/qa90_questions.jsonl")
CONTEXT = ("captions_boxes.jsonl", "caps_boxes_coco2014_val_80.jsonl", "context.jsonl")
REFERENCES = ("reference_answers.jsonl", "qa90_gpt4_answer.jsonl", "answers_gpt4.jsonl")

# The judge's rule of llava/eval/table/rule.json of haotian-liu/LLaVA (Apache-2.0): the same for all three categories,
# but for how the picture is put into words.
BOXES = (
    "five descriptive sentences describing the same image and the bounding box coordinates of each object in the "
    "scene. These coordinates are in the form of bounding boxes, represented as (x1, y1, x2, y2) with floating "
    "numbers ranging from 0 to 1. These values correspond to the top left x, top left y, bottom right x, and bottom "
    "right y. "
)
SENTENCES = "a few sentences describing the image. "
RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in the "
    "image is represented with {content}\n"
    "Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an "
    "overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\n"
    "Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, "
    "respectively. The two scores are separated by a space.\n"
    "In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential "
    "bias and ensuring that the order in which the responses were presented does not affect your judgment."
)


@dataclass(frozen=True)
class Bench:
    """The files of one of the two benchmarks, joined by question id and by picture."""

    name: str  # "llava-bench-coco" | "llava-bench-wild"
    questions: tuple[Mapping[str, Any], ...]
    contexts: Mapping[str, str]  # picture → what the judge is told of it
    references: Mapping[str, str]  # question id → GPT-4's answer
    rule: str

    def ask_judge(self, question: Question, candidate: str, *, swapped: bool) -> Messages:
        """What the judge reads: the reference answer first, the candidate second; the other way round if `swapped`."""
        first, second = self.references[question.identifier], candidate
        if swapped:
            first, second = second, first
        content = (
            f"[Context]\n{self.contexts[question.identifier]}\n\n[Question]\n{question.text}\n\n"
            f"[Assistant 1]\n{first}\n\n[End of Assistant 1]\n\n"
            f"[Assistant 2]\n{second}\n\n[End of Assistant 2]\n\n[System]\n{self.rule}\n\n"
        )
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def read_bench(name: str, folder: Path) -> Bench:
    """The official files in `folder`. Raises DataError for what is missing or does not join."""
    questions = read_lines(_file(folder, QUESTIONS))
    told = {text_of(row, "image"): _told(row) for row in read_lines(_file(folder, CONTEXT))}
    references = {str(row.get("question_id")): text_of(row, "text") for row in read_lines(_file(folder, REFERENCES))}
    identifiers = [str(row.get("question_id")) for row in questions]
    alone = [name for name, row in zip(identifiers, questions, strict=True) if row.get("image") not in told]
    alone += [identifier for identifier in identifiers if identifier not in references]
    if alone or len(set(identifiers)) < len(identifiers):
        raise DataError(f"{folder}: {len(alone)} questions without context or reference, or twice the same id.")
    contexts = {identifier: told[row["image"]] for identifier, row in zip(identifiers, questions, strict=True)}
    rule = RULE.format(content=BOXES if name == "llava-bench-coco" else SENTENCES)
    return Bench(name, tuple(questions), contexts, references, rule)


def download_wild() -> Path:
    """The folder of the in-the-wild benchmark, from the Hub or its cache. Raises DataError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(WILD_REPO, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"{WILD_REPO} cannot be downloaded from the Hub. Give a folder with its files: --data FOLDER."
        ) from error


def suite(bench: Bench, images: Path, judge: Judge, *, folder: Path, both_orders: bool = False) -> Suite:
    """Answers marked by `judge`, whose reviews are kept in `folder`."""

    def mark(answers: list[Answer]) -> list[Result]:
        return review(bench, answers, judge, folder=folder, both_orders=both_orders)

    questions = [
        Question(
            str(row["question_id"]),
            str(row["category"]),
            text_of(row, "text"),
            (opened(_picture(images, row["image"])),),
            (bench.references[str(row["question_id"])],),
        )
        for row in bench.questions
    ]
    return Suite(
        bench.name,
        "relative to the reference answers",
        questions,
        mark,
        Sampling(temperature=0, max_new_tokens=1024),
        lambda results: {"Judge": {"model": judge.model, "orders": 2 if both_orders else 1}, **_means(results)},
    )


def review(bench: Bench, answers: Sequence[Answer], judge: Judge, *, folder: Path, both_orders: bool) -> list[Result]:
    """Points are the candidate's scores, out_of the reference's. A question without all its reviews is missing.

    Every reply is kept in judge.jsonl, those to these answers in reviews.jsonl, as `score reviews` reads them.
    """
    orders = (False, True) if both_orders else (False,)
    asked = {
        (answer.question.identifier, swapped): bench.ask_judge(answer.question, answer.text, swapped=swapped)
        for answer in answers
        if answer.problem is None
        for swapped in orders
    }
    consulted = consult(judge, asked, folder / "judge.jsonl")
    _write_reviews(folder / "reviews.jsonl", answers, consulted)
    return [_marked(answer, consulted, orders) for answer in answers]


def _marked(answer: Answer, consulted: Consulted, orders: Sequence[bool]) -> Result:
    if answer.problem is not None:
        return unanswered(answer)
    found: list[Pair] = []
    for swapped in orders:
        asked = (answer.question.identifier, swapped)
        pair = pair_of(consulted.replies.get(asked, ""), swapped=swapped)
        if pair is None:
            why = consulted.missing.get(asked, f"a review with {NO_SCORES}")
            return Result(answer.question, answer.text, None, why=why)
        found.append(pair)
    points = sum(pair.candidate for pair in found) / len(found)
    most = sum(pair.reference for pair in found) / len(found)
    return Result(answer.question, answer.text, points, most, consulted.replies[answer.question.identifier, False])


def _write_reviews(file: Path, answers: Sequence[Answer], consulted: Consulted) -> None:
    categories = {answer.question.identifier: answer.question.category for answer in answers}
    rows = [
        {"question_id": name, "category": categories[name], "swapped": swapped, "text": text}
        for (name, swapped), text in consulted.replies.items()
    ]
    write_whole(file, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def _means(results: list[Result]) -> dict[str, dict[str, Any]]:
    """What the relative scores are ratios of."""
    pairs = [Pair(result.out_of, result.points) for result in results if result.points is not None]
    if not pairs:
        return {}
    means = {
        "reference answers": sum(pair.reference for pair in pairs) / len(pairs),
        "this model": sum(pair.candidate for pair in pairs) / len(pairs),
        "relative score": relative_score(pairs),
    }
    return {"Mean scores from the judge": means}


def _told(row: Mapping[str, Any]) -> str:
    """Captions, one per line, and after an empty line the boxes; or the curated description."""
    captions = row.get("captions", row.get("caption", []))
    told = captions if isinstance(captions, str) else "\n".join(captions)
    boxes = [f"{instance['category']}: {instance['bbox']}" for instance in row.get("instances", [])]
    return "\n\n".join([told, "\n".join(boxes)]) if "instances" in row else told


def _file(folder: Path, names: Sequence[str]) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise DataError(f"{folder} holds none of {', '.join(names)}. Give the folder of the official files.")
    return found


def _picture(images: Path, name: str) -> Path:
    """COCO's own name for a picture is accepted as well."""
    official = images / f"COCO_val2014_{name}"
    return official if official.is_file() else images / name
