"""TextVQA (Singh et al. 2019): soft accuracy against ten people's answers, scored as the official evaluator does.

The normalisation is that of the VQA evaluation (EvalAIAnswerProcessor in facebookresearch/mmf,
mmf/utils/m4c_evaluators.py), its oddities included. LLaVA-1.5's published 58.2 (7B) showed the model the words that an
OCR system had read as well; here it sees the picture alone, so the two do not compare.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from finetune.evaluate.pope import SHORT
from finetune.evaluate.results import Question, Suite, each, opened, read_json, text_of
from llava_app.engine import Sampling
from llava_app.errors import DataError

PEOPLE = 10
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Each is also what it becomes without one of its apostrophes: "dont", "shouldn'tve".
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")


def _spellings() -> dict[str, str]:
    """Every mistaken spelling of a contraction → the contraction."""
    found = {"somebody'd": "somebodyd"}  # the official table has this pair the wrong way round
    for word in CONTRACTIONS.split():
        places = [place for place, letter in enumerate(word) if letter == "'"]
        found |= {word[:place] + word[place + 1 :]: word for place in places}
    return found


SPELLINGS = _spellings()


def normalised(text: str) -> str:
    """An answer as the official evaluator compares it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = _unpunctuated(text.replace("\n", " ").replace("\t", " ").strip())
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(SPELLINGS.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(text: str, people: Sequence[str]) -> float:
    """The mean, over leaving out each of the ten people, of min(1, others who gave this answer / 3)."""
    answers = [normalised(answer) for answer in people]
    mine = normalised(text)
    agreeing = [sum(answer == mine for answer in answers) - (left_out == mine) for left_out in answers]
    return sum(min(1.0, count / 3) for count in agreeing) / len(agreeing)


def suite(file: Path, images: Path, *, limit: int | None = None) -> Suite:
    """The questions of TextVQA_0.5.1_val.json, pictures named by their id. Raises DataError."""
    stored = read_json(file)
    rows = stored.get("data") if isinstance(stored, dict) else None
    if not isinstance(rows, list):
        raise DataError(f"{file} has no list in “data”. Give the official TextVQA_0.5.1_val.json.")
    return Suite(
        "textvqa",
        "soft accuracy",
        [_question(row, images) for row in rows[:limit]],
        each(lambda question, text: soft_accuracy(text, question.right)),
        Sampling(temperature=0, max_new_tokens=64),
    )


def _question(row: dict, images: Path) -> Question:
    answers = row.get("answers")
    if not isinstance(answers, list) or len(answers) != PEOPLE:
        raise DataError(f"TextVQA's question {row.get('question_id')} has not {PEOPLE} answers. Give the val file.")
    text = f"{text_of(row, 'question')}\n{SHORT}"
    picture = opened(images / f"{text_of(row, 'image_id')}.jpg")
    return Question(str(row["question_id"]), "all", text, (picture,), tuple(answers))


def _unpunctuated(text: str) -> str:
    """Marks beside a space vanish, others become one; all vanish where the text has a number with a comma."""
    has_comma = _COMMA_IN_NUMBER.search(text) is not None
    shown = text
    for mark in PUNCTUATION:
        vanishes = has_comma or f"{mark} " in text or f" {mark}" in text
        shown = shown.replace(mark, "" if vanishes else " ")
    return _PERIOD.sub("", shown, count=32)  # as there, where the flag re.UNICODE (32) is given as the count
