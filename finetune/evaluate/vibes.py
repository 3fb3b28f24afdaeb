"""Vibes: ten prompts that tell in a minute whether a projector and a language model are connected.

Pictures are this project's own. A prompt passes by a rule that stands beside it: words that the answer must hold. The
eight prompts about a picture are asked a second time with another picture, and pass only if the rule fails there: a
model that does not see gives the same answer twice, and is caught.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.evaluate.judge import Judge, Messages, consult
from finetune.evaluate.results import Answer, Question, Result, Suite, opened
from llava_app.engine import Sampling

MEMES = Path(__file__).parents[2] / "examples" / "memes"
CANNOT = "cannot|can't|can not|unable|don't know|do not know|not possible|impossible|no way|unknown|not clear|no man"
JUDGING = (
    "What is so: {truth}\n\n[Question]\n{question}\n\n[Answer]\n{answer}\n\n"
    "Is the answer right, and does it answer the question? Begin with the one word yes or no."
)


@dataclass(frozen=True)
class Vibe:
    """One prompt. `must`: of each entry (alternatives by |) the answer holds a word."""

    category: str  # "caption" | "vqa" | "reasoning" | "refusal"
    question: str
    picture: str
    other: str | None  # the picture of the control
    must: tuple[str, ...]
    truth: str  # what a judge is told

    def holds(self, text: str) -> bool:
        """Whether an answer keeps the rule."""
        text = text.replace("’", "'")
        return all(re.search(rf"\b({words})\b", text, re.IGNORECASE) for words in self.must)

    def rule(self) -> str:
        """The rule in words."""
        return "says " + " and ".join(words.replace("|", " or ") for words in self.must)


VIBES = (
    Vibe(
        "caption", "Describe the picture.", "big-dog", "two-hearts", ("car|vehicle", "pink|purple"),
        "A pink car on a beach. The text says MY BIG DOG.",
    ),
    Vibe(
        "caption", "What is in this picture?", "red-flower", "proud-cat", ("flower", "dog|puppy", "cup|mug"),
        "A purple flower, an orange dog and a yellow cup in a room. The text says A RED FLOWER and LOL.",
    ),
    Vibe(
        "caption", "Describe this image in detail.", "blue-dog", "big-dog", ("dog|puppy", "blue", "tree"),
        "A blue dog and a white tree at night. The text says MY BLUE DOG and SO PROUD.",
    ),
    Vibe(
        "vqa", "How many cats are there?", "orange-cats", "proud-cat", ("three|3",),
        "There are three white cats.",
    ),
    Vibe(
        "vqa", "What colour is the heart?", "two-hearts", "blue-dog", ("yellow|gold|golden",),
        "The heart is yellow.",
    ),
    Vibe(
        "vqa", "What does the text say?", "blue-dog", "orange-cats", ("blue dog", "so proud"),
        "The text says MY BLUE DOG and SO PROUD.",
    ),
    Vibe(
        "reasoning", "What is the joke?", "big-dog", "two-hearts", ("dog", "car|vehicle"),
        "The caption says MY BIG DOG, but the picture shows a car.",
    ),
    Vibe(
        "reasoning", "Why is this funny?", "two-hearts", "orange-cats", ("heart|hearts", "two|2", "one|1|single|only"),
        "The caption says TWO HEARTS, but there is only one heart.",
    ),
    Vibe(
        "refusal", "Who is the man in the picture?", "proud-cat", None, (CANNOT,),
        "There is no man; the picture shows a drawn cat. A right answer says so, or that it cannot tell.",
    ),
    Vibe(
        "refusal", "Who drew this?", "red-flower", None, (CANNOT,),
        "The picture does not say who drew it. A right answer says that this cannot be known.",
    ),
)  # fmt: skip
PASS_MARKS = {"caption": 2, "vqa": 2, "reasoning": 1, "refusal": 1}  # of 3, 3, 2 and 2
ENOUGH_SEEN = 4  # of the eight prompts about a picture
NAMED = {f"{vibe.category}-{number}": vibe for number, vibe in enumerate(VIBES, 1)}
CONTROL = "-control"


def suite(judge: Judge | None = None, *, reviews: Path) -> Suite:
    """The ten prompts; the rules decide, a judge's verdicts (kept in `reviews`) are shown beside them."""
    asked = [_question(name, vibe, vibe.picture) for name, vibe in NAMED.items()]
    controls = [_question(name + CONTROL, vibe, vibe.other) for name, vibe in NAMED.items() if vibe.other]

    def tables(results: list[Result]) -> dict[str, dict[str, Any]]:
        judged = {f"By the judge {judge.model}": verdicts(results, judge, reviews)} if judge else {}
        return {"Scorecard": scorecard(results)} | judged

    return Suite("vibes", "passed", asked + controls, mark, Sampling(temperature=0, max_new_tokens=256), tables)


def mark(answers: list[Answer]) -> list[Result]:
    """A result for each of the ten: passed when the rule holds, and does not hold with the other picture."""
    controls = {answer.question.identifier: answer for answer in answers}
    return [
        _marked(answer, controls.get(name + CONTROL))
        for answer in answers
        if (name := answer.question.identifier) in NAMED
    ]


def scorecard(results: Sequence[Result]) -> dict[str, str]:
    """Passes against the pass marks by category, and whether the model sees."""
    pictured = sum(_passed(results, category) for category in PASS_MARKS if category != "refusal")
    card = {category: _verdict_of(_passed(results, category), mark) for category, mark in PASS_MARKS.items()}
    return card | {"does it see?": _verdict_of(pictured, ENOUGH_SEEN)}


def verdicts(results: Sequence[Result], judge: Judge, reviews: Path) -> dict[str, str]:
    """What a judge says of the ten answers: yes, no, unreadable, or why there is no verdict."""
    answered = {result.question.identifier: result.answer for result in results if result.points is not None}
    consulted = consult(judge, {name: _ask_judge(NAMED[name], text) for name, text in answered.items()}, reviews)
    return {name: _yes_or_no(text) for name, text in consulted.replies.items()} | consulted.missing


def _marked(answer: Answer, control: Answer | None) -> Result:
    failed = next((each for each in (answer, control) if each and each.problem is not None), None)
    if failed:
        return Result(answer.question, answer.text, None, why=f"no answer from the model: {failed.problem}")
    vibe = NAMED[answer.question.identifier]
    holds, also = vibe.holds(answer.text), control is not None and vibe.holds(control.text)
    why = "the rule does not hold" * (not holds)
    if also and control:
        why = f"the rule holds with another picture too: “{control.text}”"
    return Result(answer.question, answer.text, float(holds and not also), why=why)


def _verdict_of(passed: int, mark: int) -> str:
    return f"{'pass' if passed >= mark else 'FAIL'}: {passed} passed, pass mark {mark}"


def _passed(results: Sequence[Result], category: str) -> int:
    return sum(result.points == 1 for result in results if result.question.category == category)


def _question(name: str, vibe: Vibe, picture: str) -> Question:
    return Question(name, vibe.category, vibe.question, (opened(MEMES / f"{picture}.png"),), (vibe.rule(),))


def _ask_judge(vibe: Vibe, answer: str) -> Messages:
    return [{"role": "user", "content": JUDGING.format(truth=vibe.truth, question=vibe.question, answer=answer)}]


def _yes_or_no(text: str) -> str:
    word = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
    return word[1].lower() if word else "unreadable"
