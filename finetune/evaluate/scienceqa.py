"""ScienceQA (Lu et al. 2022): the problems, how LLaVA is asked, how its answers are read, the columns of the paper."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.evaluate.results import Question, Result, Suite, each, opened, read_json
from llava_app.engine import Sampling
from llava_app.errors import DataError

LETTERS = "ABCDE"
COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg")
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
PROMPTS = ("lepa", "letter")
LETTER_ONLY = "Answer with the option's letter from the given choices directly."
TOKENS = {"lepa": 1024, "letter": 16}

_SAID = re.compile(r"The answer is ([A-Z])\.")


@dataclass(frozen=True)
class Problem:
    """A problem as problems.json has it; `answer` is the place of the right choice, from 0."""

    identifier: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str
    image: str | None
    subject: str
    grade: int
    split: str

    def columns(self) -> list[str]:
        """The columns of the paper's table that it counts in (evaluations/evaluate_acc.py of lupantech/ScienceQA)."""
        context = ["TXT"] * bool(self.hint) + ["IMG"] * bool(self.image)
        return [SUBJECTS[self.subject], *(context or ["NO"]), "G1-6" if self.grade <= 6 else "G7-12", "Avg"]


def read_problems(file: Path) -> dict[str, Problem]:
    """The problems of problems.json by id. Raises DataError."""
    stored = read_json(file)
    if not isinstance(stored, dict):
        raise DataError(f"{file} holds a {type(stored).__name__}; problems.json is an object of problems by id.")
    return {identifier: _problem(file, identifier, values) for identifier, values in stored.items()}


def read_choice(text: str, choices: int = len(LETTERS)) -> int | None:
    """Which choice an answer names, from 0; None where it names none of the `choices`.

    A bare letter; or `X. …`; or exactly one `The answer is X.` (llava/eval/eval_science_qa.py, as published with v1).
    """
    text = text.strip()
    said = _SAID.findall(text)
    if text in LETTERS and len(text) == 1:
        letter = text
    elif text[:1] in LETTERS and text[1:3] == ". ":
        letter = text[:1]
    else:
        letter = said[0] if len(said) == 1 else ""
    return LETTERS.index(letter) if letter and letter in LETTERS[:choices] else None


def table(right: Mapping[str, bool], problems: Mapping[str, Problem]) -> dict[str, float | None]:
    """Per cent right in each column, by whether the answer to each problem (by id) was right."""
    hits: dict[str, list[bool]] = {column: [] for column in COLUMNS}
    for identifier, is_right in right.items():
        for column in problems[identifier].columns():
            hits[column].append(is_right)
    return {column: 100 * sum(found) / len(found) if found else None for column, found in hits.items()}


def is_right(problem: Problem, text: str) -> bool:
    return read_choice(text, len(problem.choices)) == problem.answer


def prompt(problem: Problem, kind: str) -> str:
    """How LLaVA was asked: "lepa" as it was trained in the first paper (QCM → lecture, explanation, answer), "letter"
    as LLaVA-1.5 is asked for the letter alone.

    From scripts/convert_sqa_to_llava_base_prompt.py and docs/Evaluation.md of haotian-liu/LLaVA.
    """
    if kind == "letter":
        listed = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, problem.choices, strict=False)]
        return "\n".join([f"Context: {problem.hint}"] * bool(problem.hint) + [problem.question, *listed, LETTER_ONLY])
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem.choices, strict=False))
    text = f"{problem.question}\nContext: {problem.hint.strip() or 'N/A'}\nOptions: {options}"
    return text.replace("  ", " ").strip()


def suite(problems: Mapping[str, Problem], images: Path, *, kind: str, limit: int | None = None) -> Suite:
    """The test problems in the file's order, the first `limit` of them. Raises DataError when there are none."""
    asked = [problem for problem in problems.values() if problem.split == "test"][:limit]
    if not asked:
        raise DataError("The problems hold none of the split “test”. Give the official problems.json.")

    def tables(results: list[Result]) -> dict[str, dict[str, Any]]:
        right = {result.question.identifier: result.points == 1 for result in results if result.points is not None}
        return {"Columns of the paper": table(right, problems)}

    return Suite(
        f"scienceqa-{kind}",
        "right",
        [_question(problem, images, kind) for problem in asked],
        each(lambda question, text: is_right(problems[question.identifier], text)),
        Sampling(temperature=0, max_new_tokens=TOKENS[kind]),
        tables,
    )


def score_answers(problems: Mapping[str, Problem], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Answers made elsewhere (`question_id`, `text`), joined by id; of several answers to a problem the last counts.

    Problems of the same splits without an answer, and answers without a problem, are counted and left out.
    """
    texts = texts_by_id(answers)
    right = {name: is_right(problems[name], text) for name, text in texts.items() if name in problems}
    splits = {problems[name].split for name in right}
    columns = table(right, problems)
    return {
        "accuracy": columns["Avg"],
        "correct": sum(right.values()),
        "count": len(right),
        "columns": columns,
        "unreadable": sum(read_choice(texts[name], len(problems[name].choices)) is None for name in right),
        "missing_answers": sum(p.split in splits and name not in texts for name, p in problems.items()),
        "answers_without_a_problem": sum(name not in problems for name in texts),
        "repeated_answers": len(answers) - len(texts),
    }


def choices_read(answers: Sequence[Mapping[str, Any]], problems: Mapping[str, Problem]) -> list[dict[str, Any]]:
    """The choice read from each answer, from 0, or -1 for none; without its problem, a letter may be any of five."""
    known = {name: len(problem.choices) for name, problem in problems.items()}
    rows = []
    for name, text in texts_by_id(answers).items():
        choice = read_choice(text, known.get(name, len(LETTERS)))
        rows.append({"question_id": name, "choice": -1 if choice is None else choice})
    return rows


def texts_by_id(answers: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Texts by question id. Raises DataError for a row without either."""
    texts = {}
    for number, row in enumerate(answers, 1):
        if "question_id" not in row or not isinstance(row.get("text"), str):
            raise DataError(f"answer {number} has no question_id or no text. Give one object with both per line.")
        texts[str(row["question_id"])] = row["text"]
    return texts


def _question(problem: Problem, images: Path, kind: str) -> Question:
    file = problem.image and images / problem.split / problem.identifier / problem.image
    return Question(
        problem.identifier,
        SUBJECTS[problem.subject],
        prompt(problem, kind),
        (opened(file),) if file else (),
        (LETTERS[problem.answer],),
    )


def _problem(file: Path, identifier: str, values: Mapping[str, Any]) -> Problem:
    try:
        found = Problem(
            identifier,
            values["question"],
            tuple(values["choices"]),
            int(values["answer"]),
            values["hint"] or "",
            values["image"] or None,
            values["subject"],
            int(str(values["grade"]).removeprefix("grade")),
            values["split"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}, problem {identifier}: {error!r}. Give the official problems.json.") from error
    if found.subject not in SUBJECTS or not 0 <= found.answer < len(found.choices) <= len(LETTERS):
        raise DataError(f"{file}, problem {identifier}: a wrong subject, answer or number of choices.")
    return found
