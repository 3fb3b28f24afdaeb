"""python -m finetune memeworld STEP: the built-in model from nothing, each step from where it stopped."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

BASE, TUNED = "memeworld-base", "memeworld"


@dataclass(frozen=True)
class Plan:
    """How much of everything. The default is what the shipped model was made with."""

    folder: Path = Path("data/memeworld")
    eyes_pictures: int = 40_000
    eyes_steps: int = 3_200
    text_steps: int = 6_000
    pictures: int = 50_000
    texts: int = 8_000
    align_steps: int = 500
    instruct_steps: int = 2_300
    processes: int = 2


SMOKE = Plan(Path("data/memeworld-smoke"), 256, 8, 8, 128, 32, 2, 2)


def main(arguments: list[str]) -> None:
    """Run the named steps in order; "all" is every one."""
    parser = argparse.ArgumentParser(prog="python -m finetune memeworld", description=__doc__)
    parser.add_argument("step", choices=[*STEPS, "all", *ON_REQUEST])
    parser.add_argument("--smoke", action="store_true", help="a run of a minute that teaches nothing, to try the way")
    parser.add_argument("--folder", type=Path, help="where data and pretrained halves lie (default: data/memeworld)")
    parser.add_argument("--pictures", type=int, help="how many to draw, with a fifth as many dialogues without one")
    options = parser.parse_args(arguments)
    plan = SMOKE if options.smoke else Plan()
    if options.folder:
        plan = replace(plan, folder=options.folder)
    if options.pictures:
        plan = replace(plan, pictures=options.pictures, texts=options.pictures // 5)
    for step in STEPS if options.step == "all" else [options.step]:
        (STEPS | ON_REQUEST)[step](plan)


def _eyes(plan: Plan) -> None:
    from finetune.memeworld.pretrain import Schedule, pretrain_eyes

    schedule = Schedule(plan.eyes_steps, batch=64, learning_rate=1e-3)
    pretrain_eyes(plan.folder / "eyes", schedule, pictures=plan.eyes_pictures, processes=plan.processes)


def _text(plan: Plan) -> None:
    from finetune.memeworld.corpus import train_tokenizer
    from finetune.memeworld.pretrain import Schedule, pretrain_text

    schedule = Schedule(plan.text_steps, batch=16, learning_rate=1.5e-3)
    pretrain_text(plan.folder / "text", train_tokenizer(), schedule)


def _data(plan: Plan) -> None:
    from finetune.memeworld.dataset import make_dataset

    make_dataset(plan.folder, pictures=plan.pictures, texts=plan.texts, processes=plan.processes)


def _assemble(plan: Plan) -> None:
    if not (plan.folder / BASE / "card.json").exists():
        _finetune("assemble", plan.folder / "eyes", plan.folder / "text", plan.folder / BASE)


def _align(plan: Plan) -> None:
    _stage("align", plan, base=plan.folder / BASE, name=f"{plan.folder.name}-align", steps=plan.align_steps)


def _instruct(plan: Plan) -> None:
    aligned = Path("runs") / f"{plan.folder.name}-align"
    _stage("instruct", plan, base=aligned, name=f"{plan.folder.name}-instruct", steps=plan.instruct_steps)


def _ship(plan: Plan) -> None:
    from finetune.memeworld.ship import ship
    from llava_app.checkpoints import DEMO

    ship(plan.folder / BASE, DEMO / BASE)
    ship(Path("runs") / f"{plan.folder.name}-instruct", DEMO / TUNED)


def _show(plan: Plan) -> None:
    from finetune.memeworld.showcase import write_examples, write_sheet
    from llava_app.checkpoints import built_in
    from llava_app.engine.local import LocalEngine
    from llava_app.loading import load

    write_examples(Path("examples"))
    write_sheet(LocalEngine(load(built_in())), Path("examples/memeworld-sheet.png"))


def _stage(stage: str, plan: Plan, *, base: Path, name: str, steps: int) -> None:
    from finetune.memeworld.pretrain import worth_compiling

    settings = [f"max_steps={steps}", f"compile={str(worth_compiling(steps)).lower()}"]
    if (Path("runs") / name / "run.yaml").exists():
        _finetune(stage, "--name", name, "--resume")
    else:
        _finetune(stage, "--name", name, "--base", base, "--data", plan.folder / f"{stage}.json", *settings)


def _finetune(*arguments: str | Path) -> None:
    """The general command line, as anybody would use it on models of their own."""
    subprocess.run([sys.executable, "-m", "finetune", *map(str, arguments)], check=True)


STEPS: dict[str, Callable[[Plan], None]] = {
    "eyes": _eyes,
    "text": _text,
    "data": _data,
    "assemble": _assemble,
    "align": _align,
    "instruct": _instruct,
}
ON_REQUEST: dict[str, Callable[[Plan], None]] = {"ship": _ship, "show": _show}  # replace what lies in the repository
