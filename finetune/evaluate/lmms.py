"""GQA, MME, MM-Vet, SEED-Bench and MMBench by way of lmms-eval (EvolvingLMMs-Lab), which is optional.

lmms-eval gives the questions, their pictures, the prompts and the marks (run with 0.7.3); the answers come from our
engine, as in every suite. Two things differ from its own runs. MM-Vet's judge is ours, asked with its prompt: there a
judge that fails counts as 0 points, here the question is missing. MMBench is marked without a judge (its "static"
variant): otherwise an answer that the judge cannot read is guessed.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from finetune.evaluate.judge import Judge, Messages, consult
from finetune.evaluate.memeworld import as_upload
from finetune.evaluate.results import Answer, Question, Result, Suite, each, unanswered
from llava_app.engine import Sampling
from llava_app.errors import DataError
from llava_app.images import Picture

LONGEST = 1024  # tokens of an answer where the task sets no limit, as for LLaVA in lmms-eval
ROLLED = 1_000_000  # MMBench asks again with the choices rolled; the numbers of such copies differ by multiples of this
NO_SCORE = "a review without a score from 0 to 1"

Said = Mapping[str, Any]  # what a task of lmms-eval says of one answer, by the name of the measure
Tables = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Asked:
    """A task of lmms-eval with its questions; `documents` are its rows without pictures, by the question's id."""

    task: Any
    documents: Any
    questions: list[Question]
    whole: bool
    judge: Judge | None
    folder: Path

    def document(self, question: Question) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self.documents[int(question.identifier)]
        return row

    def said(self, question: Question, text: str) -> Said:
        found: Said = self.task.process_results(self.document(question), [text])
        return found


@dataclass(frozen=True)
class Adapted:
    """How a task of lmms-eval becomes a suite: `category` is a field of its rows, or "" for none."""

    task: str
    category: str
    mark: Callable[[Asked, list[Answer]], list[Result]]
    tables: Callable[[Asked, list[Result]], Tables] = lambda _asked, _results: {}
    judged: bool = False


def suite(
    name: str, judge: Judge | None = None, *, folder: Path, data: Path | None = None, limit: int | None = None
) -> Suite:
    """The suite of this name (a key of ADAPTED), its first `limit` questions. A judge's reviews are kept in `folder`.

    The rows come from the Hub, or from `data` where `save_to_disk` of a loaded data set put them. Raises DataError.
    """
    adapted = ADAPTED[name]
    if adapted.judged:
        _needed(judge)
    task = _load(adapted.task, data)
    task.build_all_requests(limit=limit)
    *_, split = task.instances[0].args
    documents = task.dataset_no_image[split]
    questions = [_question(task, instance.args, documents, adapted.category) for instance in task.instances]
    asked = Asked(task, documents, questions, limit is None, judge, folder)
    longest = task.instances[0].args[1].get("max_new_tokens", LONGEST)
    sampling = Sampling(temperature=0, max_new_tokens=longest)
    return Suite(name, "right", questions, partial(adapted.mark, asked), sampling, partial(adapted.tables, asked))


def _load(name: str, data: Path | None) -> Any:
    """The task of lmms-eval. Raises DataError where lmms-eval, its data or a key is missing."""
    import openai

    try:
        from lmms_eval.tasks import TaskManager, get_task_dict
        from tenacity import RetryError
    except ImportError as error:
        raise DataError(
            f"{name} comes from lmms-eval, which cannot be used ({error}). Install it: pip install lmms-eval"
        ) from error
    local = {"dataset_path": str(data), "dataset_kwargs": {"load_from_disk": True}} if data else {}
    try:
        return get_task_dict([{"task": name, **local}], TaskManager("WARNING", model_name="llava_app"))[name]
    except openai.OpenAIError as error:
        raise DataError("lmms-eval loads this task only with a key: set OPENAI_API_KEY (to any text).") from error
    except RetryError as error:
        raise DataError(
            f"lmms-eval cannot load the data of {name} ({error.last_attempt.exception()}). Log in to the Hub with "
            "hf auth login, or give a folder that save_to_disk wrote: --data FOLDER."
        ) from error


def _question(task: Any, arguments: tuple[Any, ...], documents: Any, category: str) -> Question:
    words, _, show, number, _, split = arguments
    document = documents[number]
    shows = tuple(
        partial(_picture, task, show, split, number, place) for place in range(_pictures(task, split, number))
    )
    right = (str(task.doc_to_target(document)),)
    return Question(str(number), str(document[category]) if category else "all", words, shows, right)


def _pictures(task: Any, split: str, number: int) -> int:
    """How many pictures a row has, without opening them."""
    cell = task.dataset[split].with_format("arrow")[number]["image"][0]
    return len(cell) if "List" in type(cell).__name__ else int(cell.is_valid)


def _picture(task: Any, show: Callable[[Any], list[Any]], split: str, number: int, place: int) -> Picture:
    return as_upload(show(task.dataset[split][number])[place], f"{number}-{place + 1}.png")


def _by(points: Callable[[Said], float]) -> Callable[[Asked, list[Answer]], list[Result]]:
    """Marks each answer by what lmms-eval says of it."""
    return lambda asked, answers: each(lambda question, text: points(asked.said(question, text)))(answers)


def _seed(said: Said) -> float:
    found = said["seed_all"]
    return float(found["pred"].lower().strip() == found["answer"].lower().strip())


def _mme_totals(asked: Asked, results: list[Result]) -> Tables:
    """Perception (of 2,000) and cognition (of 800), of all questions or not at all."""
    if not asked.whole or any(result.points is None for result in results):
        return {}
    said: dict[str, list[Any]] = defaultdict(list)
    for result in results:
        for measure, found in asked.said(result.question, result.answer).items():
            said[measure].append(found)
    totals = asked.task.aggregation()
    return {"MME's own scores": {measure: float(totals[measure](found)) for measure, found in said.items()}}


def _mmbench(asked: Asked, answers: list[Answer]) -> list[Result]:
    """One result for each question and its rolled copies: right when all are (Liu et al. 2023, circular evaluation)."""
    groups: dict[int, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[asked.document(answer.question)["index"] % ROLLED].append(answer)
    return [_circular(asked, group) for group in groups.values()]


def _circular(asked: Asked, group: list[Answer]) -> Result:
    failed = next((answer for answer in group if answer.problem is not None), None)
    if failed:
        return unanswered(replace(failed, question=group[0].question))
    right = [_mmbench_point(asked.said(answer.question, answer.text)["gpt_eval_score"]) for answer in group]
    why = f"{sum(right)} of {len(right)} right with the choices rolled" * (len(right) > 1)
    return Result(group[0].question, group[0].text, float(all(right)), why=why)


def _mmbench_point(row: Mapping[str, Any]) -> int:
    import pandas
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    answers = {row["index"]: row["answer"]}
    return int(MMBench_Evaluator().eval_sub_data(pandas.DataFrame([row]), answers, static_only=True))


def _mm_vet(asked: Asked, answers: list[Answer]) -> list[Result]:
    """Each answer has the score that the judge gives it, from 0 to 1; without one it is missing."""
    judge = replace(_needed(asked.judge), temperature=0.0)
    questions = {
        answer.question.identifier: _ask_judge(asked.document(answer.question), answer.text)
        for answer in answers
        if answer.problem is None
    }
    consulted = consult(judge, questions, asked.folder / "judge.jsonl")
    return [
        unanswered(answer)
        if answer.problem is not None
        else _reviewed(answer, consulted.replies.get(name := answer.question.identifier), consulted.missing.get(name))
        for answer in answers
    ]


def _reviewed(answer: Answer, review: str | None, missing: str | None) -> Result:
    found = re.match(r"\s*([01](?:\.\d+)?)\b", review or "")
    points = float(found[1]) if found and float(found[1]) <= 1 else None
    return Result(answer.question, answer.text, points, why="" if points is not None else missing or NO_SCORE)


def _ask_judge(document: Mapping[str, Any], text: str) -> Messages:
    """As lmms-eval asks: a table whose last cell is to be filled."""
    from lmms_eval.tasks.mmvet.utils import MM_VET_PROMPT

    right = document["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return [{"role": "user", "content": f"{MM_VET_PROMPT}\n{document['question']} | {right} | {text} |"}]


def _judge_table(asked: Asked, _results: list[Result]) -> Tables:
    return {"Judge": {"model": _needed(asked.judge).model}}


def _needed(judge: Judge | None) -> Judge:
    if judge is None:
        raise DataError("MM-Vet needs a judge: --judge MODEL, by any endpoint that speaks the OpenAI protocol.")
    return judge


ADAPTED = {
    "gqa": Adapted("gqa", "", _by(lambda said: float(said["exact_match"]))),
    "mme": Adapted("mme", "category", _by(lambda said: float(next(iter(said.values()))["score"])), _mme_totals),
    "mm-vet": Adapted("mmvet", "capability", _mm_vet, _judge_table, judged=True),
    "seed": Adapted("seedbench", "data_type", _by(_seed)),
    "mmbench": Adapted("mmbench_en_dev_static", "category", _mmbench),
}
