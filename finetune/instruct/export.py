"""Ledger and reviews → LLaVA records, what was refused, and a report. Can be made again at any time."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.instruct import filters
from finetune.instruct.budget import Limit, Usage
from finetune.instruct.context import Context
from finetune.instruct.dialogue import Dialogue, Exchange, parse_description, parse_dialogue
from finetune.instruct.filters import Refused, fingerprint, refusal
from finetune.instruct.folder import Folder, write_json
from finetune.instruct.ledger import read_ledger, replies, spent
from finetune.instruct.objects import Lexicon
from finetune.instruct.prompts import Domain
from llava_app.conversation import IMAGE_MARK

REJECTED = "rejected in review"


@dataclass(frozen=True)
class Judged:
    """A reply as a dialogue; `refused` says why it is not kept."""

    context: Context
    kind: str
    line: dict[str, Any]  # of the ledger
    dialogue: Dialogue
    refused: Refused | None
    review: str = ""  # "" | "accept" | "edit" | "reject"

    def record(self) -> dict[str, Any]:
        """The LLaVA record, with where it comes from."""
        return {
            "id": self.line["key"],
            "image": self.context.image,
            "conversations": [
                {"from": speaker, "value": f"{IMAGE_MARK}\n{text}" if place == 0 and speaker == "human" else text}
                for place, exchange in enumerate(self.dialogue)
                for speaker, text in zip(("human", "gpt"), exchange, strict=True)
            ],
            "provenance": {
                "kind": self.kind,
                **{name: self.line[name] for name in ("teacher", "prompt", "context")},
                "review": self.review,
            },
        }


def export(folder: Folder, domain: Domain, limit: Limit) -> dict[str, Any]:
    """Write records.json, refused.json and report.json; returns the report."""
    judged = list(judge(folder, domain))
    kept = [item.record() for item in judged if item.refused is None]
    refused = [
        {"id": item.line["key"], "image": item.context.image, "kind": item.kind, "text": item.line["text"]}
        | {"dialogue": item.dialogue, "reason": item.refused.reason, "details": item.refused.details}
        for item in judged
        if item.refused
    ]
    report = _report(folder, judged, limit)
    for name, content in (("records", kept), ("refused", refused), ("report", report)):
        write_json(folder.path / f"{name}.json", content)
    return report


def judge(folder: Folder, domain: Domain) -> Iterator[Judged]:
    """Every reply in the order of the pictures, parsed and filtered; what a person decided goes before."""
    contexts, kinds = folder.read_contexts(), folder.read_settings().kinds
    lexicon = domain.lexicon.also(box.category for context in contexts for box in context.boxes)
    replied = replies(read_ledger(folder.ledger))
    reviews = {line["key"]: line for line in read_ledger(folder.reviews)}
    seen: set[str] = set()
    for context in contexts:
        for kind in kinds:
            line = replied.get(f"{context.id}/{kind}")
            if line:
                judged = _judge(context, kind, line, domain, lexicon=lexicon, seen=seen)
                yield _reviewed(judged, reviews.get(line["key"]))


def read_dialogue(text: str, kind: str, detail_question: str) -> Dialogue:
    """What a teacher wrote as a dialogue; to a description belongs the question that it answers."""
    if kind == "detail":
        description = parse_description(text)
        return (Exchange(detail_question, description),) if description else ()
    dialogue = parse_dialogue(text)
    return dialogue[:1] if kind == "reasoning" else dialogue


def describe(report: Mapping[str, Any]) -> str:
    """The report for a person."""
    kept = sum(report["kept"].values())
    by_kind = ", ".join(f"{count:,} {kind}" for kind, count in report["kept"].items())
    lines = [f"kept {kept:,} of {report['wanted']:,}" + (f": {by_kind}" if kept else "")]
    lines += [
        f"  refused {found['count']:,}: {reason} ({found['first']})" for reason, found in report["refused"].items()
    ]
    if report["missing"]:
        lines.append(f"  missing {report['missing']:,}: not answered yet")
    tokens = report["tokens"]
    cost = f", {report['cost']} in money" if report["cost"] != "0" else ""
    lines.append(f"tokens: {tokens['prompt']:,} of prompts, {tokens['answer']:,} of answers{cost}")
    return "\n".join(lines)


def _judge(
    context: Context, kind: str, line: dict[str, Any], domain: Domain, *, lexicon: Lexicon, seen: set[str]
) -> Judged:
    question = domain.detail_question(context) if kind == "detail" else ""
    dialogue = read_dialogue(line["text"], kind, question)
    found = refusal(dialogue, kind, line["finish"], known=lexicon.known(context), lexicon=lexicon)
    mark = fingerprint(dialogue[-1:] if kind == "detail" else dialogue)
    if found is None and mark in seen:
        found = Refused(filters.DUPLICATE, "the same words for another picture")
    if found is None:
        seen.add(mark)
    return Judged(context, kind, line, dialogue, found)


def _reviewed(judged: Judged, review: dict[str, Any] | None) -> Judged:
    if review is None:
        return judged
    verdict = review["verdict"]
    dialogue = judged.dialogue
    if verdict == "edit":
        dialogue = tuple(Exchange(question, answer) for question, answer in review["dialogue"])
    refused = Refused(REJECTED, "") if verdict == "reject" else None
    return Judged(judged.context, judged.kind, judged.line, dialogue, refused, verdict)


def _report(folder: Folder, judged: list[Judged], limit: Limit) -> dict[str, Any]:
    usage: Usage = spent(read_ledger(folder.ledger))
    pictures, kinds = len(folder.read_contexts()), folder.read_settings().kinds
    reasons = Counter(item.refused.reason for item in judged if item.refused)
    first = {item.refused.reason: item for item in reversed(judged) if item.refused}
    return {
        "pictures": pictures,
        "wanted": pictures * len(kinds),
        "kept": {kind: sum(item.kind == kind and not item.refused for item in judged) for kind in kinds},
        "questions": sum(len(item.dialogue) for item in judged if not item.refused),
        "refused": {
            reason: {"count": count, "first": _first(first[reason])} for reason, count in reasons.most_common()
        },
        "missing": pictures * len(kinds) - len(judged),
        "reviewed": dict(Counter(item.review for item in judged if item.review)),
        "tokens": {"prompt": usage.prompt, "answer": usage.answer},
        "cost": f"{limit.prices.cost(usage):f}",
    }


def _first(item: Judged) -> str:
    details = item.refused.details if item.refused else ""
    return f"{item.line['key']} {details}".strip()
