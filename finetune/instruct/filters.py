"""What is not kept of a teacher's dialogues, and why. Only what the context bears out may be said of a picture."""

import re
from typing import NamedTuple

from finetune.instruct.dialogue import Dialogue, Exchange
from finetune.instruct.objects import Lexicon
from llava_app.conversation import IMAGE_MARK

SAME_ANSWERS = 2  # so many "yes" and nothing else is one-sided

CUT_OFF = "cut off at the token limit"
EMPTY = "empty"
ONE_SIDED = "one-sided"
SOURCES = "speaks of captions or boxes"
SELF = "the teacher speaks of itself"
UNKNOWN = "speaks of what is not in the context"
GIVEN_AWAY = "a question gives its answer away"
TWICE = "a question twice"
DUPLICATE = "duplicate"

_SOURCES = re.compile(
    r"\b(?:captions?|bounding[ -]box(?:es)?|coordinates?|annotations?|annotated|the notes)\b"
    r"|\b(?:provided|given|above|following)\s+(?:context|descriptions?|sentences|information|text|list)\b"
    r"|\b(?:according to|based on|from|in)\s+the\s+(?:context|descriptions?|sentences|metadata|tags)\b(?!\s+of)"
    r"|\[\s*[01]?\.\d+\s*,",
    re.IGNORECASE,
)
_SELF = re.compile(
    r"\b(?:as an ai\b|language model|i(?:'m| am) (?:sorry|unable)|i apologi[sz]e"
    r"|i (?:cannot|can't) (?:see|view|assist|help))",
    re.IGNORECASE,
)
_NEGATION = re.compile(
    r"\b(?:no|not|none|neither|nor|never|nobody|nothing|nowhere|without|cannot|absent|\w+n['’]t)\b", re.IGNORECASE
)
_HEDGE = re.compile(
    r"\b(?:may|might|could|would|should|can|if|probably|perhaps|possibly|likely|such as|like|need(?:s|ed)? to)\b",
    re.IGNORECASE,
)
_CLAUSE = re.compile(r"(?<=[.!?;])\s+|\n+|,?\s+but\s+|\A(?:no|yes)\s*[,.]\s*", re.IGNORECASE)
_OPEN_QUESTION = re.compile(r"\s*(?:what|which|who|whose|where|when|why|how)\b", re.IGNORECASE)
_TAG_QUESTION = re.compile(
    r",\s*(?:right|correct|\w+n['’]t\s+\w+|(?:is|are|does|do|has|can)\s+(?:it|they|he|she|there))\s*\?\s*\Z",
    re.IGNORECASE,
)
_YES_OR_NO = re.compile(r"\s*(yes|no)\b", re.IGNORECASE)
_FILLER = re.compile(
    r"an?|the|is|are|was|were|be|its?|this|that|these|those|there|here|they|he|she|of|in|on|at|to|and|with|has|have|do"
    r"|does|can|see|seen|shown|picture|image|photo|what|which|who|where|how|colou?r"
)


class Refused(NamedTuple):
    """`reason` is what refusals are counted by."""

    reason: str
    details: str


def refusal(dialogue: Dialogue, kind: str, finish: str, *, known: set[str], lexicon: Lexicon) -> Refused | None:
    """Why a dialogue is not kept. `known` are the things that its context names."""
    if finish == "length":
        return Refused(CUT_OFF, "")
    return _misshapen(dialogue, kind) or next(
        filter(None, (_wrong_exchange(exchange, kind, known, lexicon) for exchange in dialogue)), None
    )


def fingerprint(dialogue: Dialogue) -> str:
    """The same for dialogues that differ in no letter or digit."""
    return _normalised(" ".join(text for exchange in dialogue for text in exchange))


def _misshapen(dialogue: Dialogue, kind: str) -> Refused | None:
    if not any(text for exchange in dialogue for text in exchange):
        return Refused(EMPTY, "")
    half = next((exchange for exchange in dialogue if not all(exchange)), None)
    if half:
        return Refused(ONE_SIDED, f"only “{_short(half.question or half.answer)}”")
    if kind == "conversation" and len(dialogue) < 2:
        return Refused(ONE_SIDED, "a single question")
    questions = [_normalised(exchange.question) for exchange in dialogue]
    again = next((n for n, question in enumerate(questions) if question in questions[:n]), None)
    if again is not None:
        return Refused(TWICE, _short(dialogue[again].question))
    answers = [_YES_OR_NO.match(exchange.answer) for exchange in dialogue]
    said = {answer and answer[1].lower() for answer in answers}
    if len(dialogue) >= SAME_ANSWERS and len(said) == 1 and None not in said:
        return Refused(ONE_SIDED, f"every answer is “{said.pop()}”")
    return None


def _wrong_exchange(exchange: Exchange, kind: str, known: set[str], lexicon: Lexicon) -> Refused | None:
    for reason, pattern in ((SOURCES, _SOURCES), (SELF, _SELF), (SOURCES, re.compile(IMAGE_MARK))):
        found = pattern.search(f"{exchange.question}\n{exchange.answer}")
        if found:
            return Refused(reason, f"“{found[0]}”")
    unknown = _claimed(exchange, kind, lexicon) - known
    if unknown:
        return Refused(UNKNOWN, ", ".join(sorted(unknown)))
    return Refused(GIVEN_AWAY, _short(exchange.question)) if _gives_away(exchange) else None


def _claimed(exchange: Exchange, kind: str, lexicon: Lexicon) -> set[str]:
    """The things that an exchange says or implies to be there, not what is denied or, in reasoning, supposed."""
    clauses = [clause for clause in _CLAUSE.split(exchange.answer) if clause]
    claims = [clause for clause in clauses if not _NEGATION.search(clause)]
    denied = exchange.answer.lower().startswith("no") or (bool(clauses) and clauses[0] not in claims)
    if not denied:
        claims.append(exchange.question)
    if kind == "reasoning":
        claims = [claim for claim in claims if not _HEDGE.search(claim)]
    return {thing for claim in claims for thing in lexicon.things(claim)}


def _gives_away(exchange: Exchange) -> bool:
    """An open question that holds every word of its answer, or a statement that only wants a yes."""
    if _TAG_QUESTION.search(exchange.question):
        return True
    if not _OPEN_QUESTION.match(exchange.question) or re.search(r"\bor\b", exchange.question):
        return False
    told = {word for word in _normalised(exchange.answer).split() if not _FILLER.fullmatch(word)}
    return bool(told) and told <= set(_normalised(exchange.question).split())


def _normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:79]}…"
