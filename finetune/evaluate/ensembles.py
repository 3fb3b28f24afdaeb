"""LLaVA together with a text-only model on ScienceQA: the complement and the judge of the first LLaVA paper."""

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.evaluate.judge import Judge, Messages, consult
from finetune.evaluate.scienceqa import Problem, prompt, read_choice, table

SYSTEM = "You are a careful science teacher who answers multiple-choice questions. You cannot see pictures."
ALONE = (
    "{prompt}\n\nThink step by step, then end with exactly one sentence of the form “The answer is X.”, X being the "
    "letter of an option. If the question cannot be answered without its picture, say that and name no letter."
)
AGAIN = (
    "{prompt}\n\nTwo answers to this question differ.\n\n[Answer 1]\n{theirs}\n\n[Answer 2, by somebody who sees the "
    "picture where there is one]\n{ours}\n\nWhat is your own final answer? Give your reasons, then end with exactly "
    "one sentence of the form “The answer is X.”"
)


def ensembles(
    problems: Mapping[str, Problem], ours: Mapping[str, str], judge: Judge, *, folder: Path, seed: int
) -> dict[str, dict[str, Any]]:
    """The columns of both ensembles, made of LLaVA's answers `ours` by problem.

    Complement: the text-only model's answer, LLaVA's where it gives none. Judge: where both give one and they differ,
    the text-only model is asked again with both and has the last word; LLaVA's counts if that cannot be read. Where
    neither gives an answer the paper guessed at random; here the guess follows from `seed` and the problem. A problem
    that the endpoint failed on counts in neither table. Every reply is kept in `folder`.
    """
    judge = replace(judge, temperature=0.0)
    alone = consult(judge, {name: _alone(problems[name]) for name in ours}, folder / "alone.jsonl")
    theirs = {name: _read(problems[name], text) for name, text in alone.replies.items()}
    mine = {name: _read(problems[name], ours[name]) for name in theirs}
    complement = {name: _first(theirs[name], mine[name]) for name in theirs}
    differ = [name for name in theirs if None not in (theirs[name], mine[name]) and theirs[name] != mine[name]]
    asked = {name: _again(problems[name], ours[name], alone.replies[name]) for name in differ}
    again = consult(judge, asked, folder / "again.jsonl")
    final = {name: _first(_read(problems[name], text), mine[name]) for name, text in again.replies.items()}
    judged = {name: choice for name, choice in (complement | final).items() if name not in again.missing}
    return {
        f"{judge.model}, complement": _columns(problems, complement, seed) | {"missing": len(alone.missing)},
        f"{judge.model}, judge": _columns(problems, judged, seed)
        | {"asked again": len(differ), "missing": len(alone.missing) + len(again.missing)},
    }


def _columns(problems: Mapping[str, Problem], choices: Mapping[str, int | None], seed: int) -> dict[str, Any]:
    guessed = {name: _guess(problems[name], seed) for name, choice in choices.items() if choice is None}
    right = {name: guessed.get(name, choice) == problems[name].answer for name, choice in choices.items()}
    return {**table(right, problems), "guessed": len(guessed)}


def _guess(problem: Problem, seed: int) -> int:
    return random.Random(f"{seed}/{problem.identifier}").randrange(len(problem.choices))


def _first(*choices: int | None) -> int | None:
    return next((choice for choice in choices if choice is not None), None)


def _read(problem: Problem, text: str) -> int | None:
    return read_choice(text, len(problem.choices))


def _alone(problem: Problem) -> Messages:
    return _messages(ALONE.format(prompt=_asked(problem)))


def _again(problem: Problem, ours: str, theirs: str) -> Messages:
    return _messages(AGAIN.format(prompt=_asked(problem), ours=ours, theirs=theirs))


def _asked(problem: Problem) -> str:
    """The question as LLaVA is asked, and whether there is a picture that cannot be shown."""
    return prompt(problem, "lepa") + "\n(The question has a picture, which is not shown.)" * bool(problem.image)


def _messages(content: str) -> Messages:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
