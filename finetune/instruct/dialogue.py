"""What a teacher writes ↔ questions and answers. Slips of form are forgiven; what stays unclear is refused."""

import json
import re
from typing import Any, NamedTuple

KINDS = ("conversation", "detail", "reasoning")  # the three of the LLaVA paper

_QUESTION = r"question|q|user|human|instruction"
_ANSWER = r"answer|a|assistant|ai|gpt|response"
_LABEL = re.compile(
    rf"^[\s>*#_\-\d.)(]*({_QUESTION}|{_ANSWER})\s*\d*\s*[*_]*\s*:[*_]*[ \t]*", re.IGNORECASE | re.MULTILINE
)
_IS_QUESTION = re.compile(rf"(?:{_QUESTION})\Z", re.IGNORECASE)
_RULER = re.compile(r"^\s*([=*_~-])\1{2,}\s*$", re.MULTILINE)
_FENCE = re.compile(r"\A\s*```\w*\n(.*?)\n?```\s*\Z", re.DOTALL)
_PREAMBLE = re.compile(
    r"\A(?:(?:sure|certainly|of course|okay)\b[^\n]*\n+|(?:here is|here's|below is)\b[^\n]*:[ \t]*\n+"
    r"|[*#_\s]*(?:detailed\s+|image\s+)?description\s*:[*_]*\s*)",
    re.IGNORECASE,
)


class Exchange(NamedTuple):
    """One question and its answer."""

    question: str
    answer: str


Dialogue = tuple[Exchange, ...]


def format_dialogue(dialogue: Dialogue) -> str:
    """The form that the prompts ask for; `parse_dialogue` reads it back."""
    return "\n\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in dialogue)


def parse_dialogue(text: str) -> Dialogue:
    """The exchanges of a reply: labelled lines, also numbered, in Markdown or in JSON. A half exchange has ""."""
    text = _unfenced(text)
    said = _from_json(text)
    return _paired(_from_lines(text) if said is None else said)


def parse_description(text: str) -> str:
    """The description in a reply, without a label or a polite first line."""
    text = _unfenced(text)
    exchanges = parse_dialogue(text)
    if len(exchanges) == 1 and exchanges[0].answer:
        return exchanges[0].answer
    before = ""
    while before != text:
        before, text = text, _PREAMBLE.sub("", text, count=1)
    return _tidy(text)


def _unfenced(text: str) -> str:
    fenced = _FENCE.match(text)
    return fenced[1] if fenced else text


def _from_lines(text: str) -> list[tuple[bool, str]]:
    """(is it a question, what was said) in order. Text before the first label is dropped."""
    text = _RULER.sub("", text)
    labels = list(_LABEL.finditer(text))
    ends = [label.start() for label in labels[1:]] + [len(text)] * bool(labels)
    return [
        (bool(_IS_QUESTION.match(label[1])), _tidy(text[label.end() : end]))
        for label, end in zip(labels, ends, strict=True)
    ]


def _from_json(text: str) -> list[tuple[bool, str]] | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    if isinstance(content, dict):
        content = next((value for value in content.values() if isinstance(value, list)), [content])
    if not isinstance(content, list):
        return None
    return [said for message in content if isinstance(message, dict) for said in _said(message)]


def _said(message: dict[str, Any]) -> list[tuple[bool, str]]:
    """What a JSON object says: {"question", "answer"}, {"from", "value"} or {"role", "content"}."""
    fields = {str(name).lower(): _tidy(value) for name, value in message.items() if isinstance(value, str)}
    speaker = fields.get("from") or fields.get("role")
    if speaker:
        return [(bool(_IS_QUESTION.match(speaker)), fields.get("value") or fields.get("content") or "")]
    asked = [(True, value) for name, value in fields.items() if _IS_QUESTION.match(name)]
    return asked + [(False, value) for name, value in fields.items() if re.fullmatch(_ANSWER, name)]


def _paired(said: list[tuple[bool, str]]) -> Dialogue:
    exchanges: list[Exchange] = []
    for is_question, text in said:
        if is_question:
            exchanges.append(Exchange(text, ""))
        elif exchanges and not exchanges[-1].answer:
            exchanges[-1] = exchanges[-1]._replace(answer=text)
        else:
            exchanges.append(Exchange("", text))
    return tuple(exchanges)


def _tidy(text: str) -> str:
    """Without the space around lines and the emphasis marks that a whole text stands between."""
    lines = "\n".join(line.strip() for line in text.strip().split("\n"))
    return re.sub(r"\A(\*\*|__)(.*)\1\Z", r"\2", re.sub(r"\n{3,}", "\n\n", lines), flags=re.DOTALL)
