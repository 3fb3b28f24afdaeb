"""python -m finetune generate: instruction data from captions and boxes, written by a teacher that sees no picture."""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.instruct.budget import Budget, Limit, Prices, Usage
from finetune.instruct.context import Context, read_contexts
from finetune.instruct.dialogue import KINDS
from finetune.instruct.export import describe, export
from finetune.instruct.folder import Folder, Settings, hash_contexts
from finetune.instruct.generation import Generation, Outcome
from finetune.instruct.ledger import Ledger, read_ledger, replies, spent
from finetune.instruct.prompts import Domain, read_domain
from finetune.instruct.teachers import Task, Teacher, TeacherError
from finetune.instruct.template import TemplateTeacher
from finetune.interrupt import StopSignal
from llava_app.errors import DataError

TEMPLATE = "template"  # the teacher that needs no model and reads no prompts
LETTERS_PER_TOKEN = 4  # of English, for the estimate only; what is reserved is a bound


def main(arguments: list[str]) -> int:
    """Ask what is not answered yet, then export; returns 130 when interrupted, 1 when questions are left, else 0."""
    options = _parser().parse_args(arguments)
    folder = Folder(options.out)
    limit = _limit(options)
    if options.export:
        settings = folder.read_settings()
        return _finish(folder, read_domain(settings.domain), limit, options, ended_by="")
    settings, contexts, domain = _settings(options, folder)
    _refuse_kinds(settings)
    tasks = list(_tasks(contexts, settings, domain))
    if options.dry_run:
        folder.refuse_other(settings)
        _show(tasks, _estimate(_left(folder, tasks), limit, settings), as_json=options.json)
        return 0
    teacher = make_teacher(settings, domain, contexts, options)
    folder.begin(settings, contexts)
    if options.memeworld:
        from finetune.instruct.drawn import draw_pictures

        draw_pictures(folder.path, min(options.memeworld, options.limit or options.memeworld))
    return _finish(folder, domain, limit, options, ended_by=_ask(folder, tasks, teacher, settings, options))


def make_teacher(
    settings: Settings, domain: Domain, contexts: Sequence[Context], options: argparse.Namespace
) -> Teacher:
    """The teacher by its name: TEMPLATE, a model's folder, or else a model of the endpoint."""
    if settings.teacher == TEMPLATE:
        categories = [box.category for context in contexts for box in context.boxes]
        return TemplateTeacher(domain.lexicon.also(categories), categories)
    if Path(settings.teacher).is_dir():
        from finetune.instruct.local import LocalTeacher

        return LocalTeacher(Path(settings.teacher), max_tokens=settings.max_tokens)
    from finetune.instruct.endpoint import EndpointTeacher

    return EndpointTeacher(
        settings.teacher, max_tokens=settings.max_tokens, at_once=options.at_once, timeout=options.timeout
    )


def _refuse_kinds(settings: Settings) -> None:
    """DataError where the template teacher shall write what it cannot; every model can be asked for every kind."""
    unknown = set(settings.kinds) - set(TemplateTeacher.kinds)
    if settings.teacher == TEMPLATE and unknown:
        raise DataError(
            f"The teacher {TEMPLATE} cannot write {', '.join(unknown)}. "
            f"Ask it for --kinds {','.join(TemplateTeacher.kinds)}, or take a model with --teacher."
        )


def _settings(options: argparse.Namespace, folder: Folder) -> tuple[Settings, list[Context], Domain]:
    """What to ask for: as given, or without any input what the folder was begun with."""
    if not options.inputs and not options.memeworld:
        settings = folder.read_settings()
        domain = read_domain(settings.domain)
        versions = {kind: domain.version(kind) for kind in settings.kinds}
        return replace(settings, prompts=versions), folder.read_contexts(), domain
    contexts = read_contexts(options.inputs, metadata=options.metadata) if options.inputs else []
    if options.memeworld:
        from finetune.instruct.drawn import drawn_contexts

        contexts += drawn_contexts(options.memeworld)
    contexts = contexts[: options.limit]
    domain = read_domain(options.domain)
    kinds = tuple(options.kinds or domain.openings)
    if options.teacher == TEMPLATE and not options.kinds:
        kinds = tuple(kind for kind in kinds if kind in TemplateTeacher.kinds)
    versions = {kind: domain.version(kind) for kind in kinds}
    where = str(Path(options.domain).resolve()) if Path(options.domain).is_dir() else options.domain
    settings = Settings(kinds, where, versions, options.teacher, options.max_tokens, hash_contexts(contexts))
    return settings, contexts, domain


def _tasks(contexts: Sequence[Context], settings: Settings, domain: Domain) -> Iterator[Task]:
    for context in contexts:
        for kind in settings.kinds:
            version = "" if settings.teacher == TEMPLATE else domain.version(kind)
            yield Task(context, kind, tuple(domain.messages(kind, context)), version)


def _left(folder: Folder, tasks: Sequence[Task]) -> list[Task]:
    """What has no reply yet."""
    answered = replies(read_ledger(folder.ledger))
    return [task for task in tasks if task.key not in answered]


def _ask(
    folder: Folder, tasks: Sequence[Task], teacher: Teacher, settings: Settings, options: argparse.Namespace
) -> str:
    """Ask what is left; returns why questions are left, "" when none is."""
    limit = _limit(options)
    with Ledger(folder.ledger) as ledger, StopSignal() as stop:
        left = _left(folder, tasks)
        budget = Budget(limit, spent(read_ledger(folder.ledger)))
        estimate = _estimate(left, limit, settings)
        if options.json:
            _print_json({"estimate": estimate})
        else:
            print(estimate)
        generation = Generation(teacher, ledger, budget, stop)
        try:
            _watch(generation.run(left), len(tasks) - len(left), len(tasks), budget=budget, as_json=options.json)
        except TeacherError as error:
            return str(error)
        return generation.ended_by


def _watch(outcomes: Iterable[Outcome], done: int, total: int, *, budget: Budget, as_json: bool) -> None:
    """Say how far it is after every outcome: a bar, or a line for programs. `done` were answered before."""
    with tqdm(total=total, initial=done, unit=" questions", disable=as_json) as bar:
        for number, outcome in enumerate(outcomes, done + 1):
            bar.update(outcome.reply is not None)
            if as_json:
                _print_json(_progress(number, total, outcome.task.key, outcome.reason, budget))


def _progress(done: int, total: int, key: str, problem: str, budget: Budget) -> dict[str, Any]:
    """A line for programs that watch."""
    cost = f"{budget.limit.prices.cost(budget.spent):f}"
    counts = {"done": done, "total": total, "tokens": budget.spent.tokens, "cost": cost}
    return counts | {"key": key, "problem": problem}


def _finish(folder: Folder, domain: Domain, limit: Limit, options: argparse.Namespace, *, ended_by: str) -> int:
    report = export(folder, domain, limit)
    if options.json:
        _print_json(report | {"ended_by": ended_by})
    else:
        print(describe(report))
        print(f"records: {folder.path / 'records.json'}")
        if report["missing"]:
            reason = (ended_by or "some questions got no answer").rstrip(".")
            command = f"python -m finetune generate --out {folder.path}"
            print(f"{reason[:1].upper()}{reason[1:]}. To go on: {command}")
    if ended_by == "stopped":
        return 130
    return 1 if report["missing"] else 0


def _show(tasks: Sequence[Task], estimate: str, *, as_json: bool) -> None:
    """Print the exact prompts and the estimate; for programs only the prompts for the first picture."""
    if as_json:
        first = [task for task in tasks if task.context == tasks[0].context]
        _print_json({"prompts": "\n".join(map(_prompts, first)), "estimate": estimate})
        return
    for task in tasks:
        print(_prompts(task))
    print(estimate)


def _prompts(task: Task) -> str:
    return "\n".join(f"=== {task.key} · {message['role']} ===\n{message['content']}\n" for message in task.messages)


def _estimate(tasks: Sequence[Task], limit: Limit, settings: Settings) -> str:
    """What these questions would cost, in a sentence."""
    if not tasks:
        return "Nothing is left to ask."
    if settings.teacher == TEMPLATE:
        return f"{len(tasks):,} questions for the template teacher, which costs nothing."
    letters = sum(len(message["content"]) for task in tasks for message in task.messages)
    expected = Usage(letters // LETTERS_PER_TOKEN, settings.max_tokens * len(tasks))
    cost = limit.prices.cost(expected)
    money = f", so about {cost:.2f} in money at most" if cost else ""
    answers = f"at most {expected.answer:,} of answers"
    return f"{len(tasks):,} questions: about {expected.prompt:,} tokens of prompts and {answers}{money}."


def _limit(options: argparse.Namespace) -> Limit:
    if options.budget_money is not None and options.prices is None:
        raise DataError("A budget in money needs prices. Add --prices PROMPT ANSWER, per million tokens.")
    return Limit(options.budget_tokens, options.budget_money, Prices(*options.prices or ()))


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, ensure_ascii=False), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m finetune generate",
        description="Instruction data from captions and boxes. The same command again, or --out alone, goes on.",
    )
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, help="COCO captions_*.json and instances_*.json, or JSON lines (.jsonl)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where everything is kept")
    add("--memeworld", type=_positive, metavar="N", help="draw N pictures of the built-in world and ask about them")
    add("--metadata", metavar="FIELD", help="a further field of the JSON lines that the teacher is told")
    add("--limit", type=_positive, metavar="N", help="only the first N pictures")
    add("--kinds", type=_kinds, help=f"with commas: {','.join(KINDS)} (all that the domain and the teacher know)")
    add("--domain", default="general", help="general, medical, satellite or a folder of prompts (general)")
    add("--teacher", default="template", help="template, a model's folder, or a model at OPENAI_BASE_URL (template)")
    add("--max-tokens", type=_positive, default=1024, help="of one answer (1024)")
    add("--budget-tokens", type=_positive, metavar="N", help="never use more, prompts and answers together")
    add("--budget-money", type=_amount, metavar="X", help="never spend more; needs --prices")
    add("--prices", type=_amount, nargs=2, metavar=("PROMPT", "ANSWER"), help="money per million tokens")
    add("--at-once", type=_positive, default=4, metavar="N", help="questions at the same time (4)")
    add("--timeout", type=float, default=120.0, metavar="S", help="seconds to wait for one answer (120)")
    add("--dry-run", action="store_true", help="print the exact prompts and the estimate, ask nothing")
    add("--export", action="store_true", help="ask nothing, write the records again, with reviews.jsonl")
    add("--json", action="store_true", help="progress and report as JSON lines")
    return parser


def _kinds(text: str) -> list[str]:
    kinds = text.split(",")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no kind; choose of {','.join(KINDS)}")
    return list(dict.fromkeys(kinds))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; give at least 1")
    return number


def _amount(text: str) -> Decimal:
    try:
        amount = Decimal(text)
    except InvalidOperation as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from error
    if not amount.is_finite() or amount < 0:
        raise argparse.ArgumentTypeError(f"{text} is no amount; give 0 or more")
    return amount
