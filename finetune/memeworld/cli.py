"""python -m finetune memeworld STEP: the built-in model from nothing, each step from where it stopped."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from llava_app.checkpoints import CARD_NAME

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
    small_print: int = 1_200
    pairs: int = 6_000
    clips: int = 1_500
    rehearsal: int = 1_500
    questions: int | None = None  # of each measurement of "anyres" and "several"; None: as many as the suite has
    processes: int = 2


SMOKE = Plan(Path("data/memeworld-smoke"), 256, 3, 3, 128, 32, 2, 2, 16, 5, 5, 5, 4)


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


def _anyres(plan: Plan) -> None:
    """Small print, learned in tiles by one copy of the shipped model and in one squeezed picture by another."""
    from finetune.memeworld.small_print import with_tiles, write_small_print
    from llava_app.checkpoints import DEMO, built_in

    data = write_small_print(plan.folder, count=plan.small_print)
    tiled = plan.folder / "memeworld-tiles"
    if not (tiled / "card.json").exists():
        with_tiles(built_in(), tiled)
    for base, name in ((tiled, "tiles"), (DEMO / TUNED, "squeezed")):
        run = f"{plan.folder.name}-{name}"
        _train("instruct", run, "--base", base, "--data", data, "--recipe", "memeworld_anyres")
        _measure(run, plan, "small-print")


def _several(plan: Plan) -> None:
    """Pairs and clips, learned by a copy of the shipped model that rehearses what it knew."""
    from finetune.memeworld.several import write_several
    from llava_app.checkpoints import DEMO

    data = write_several(
        plan.folder, pairs=plan.pairs, clips=plan.clips, rehearsal=plan.rehearsal, processes=plan.processes
    )
    run = f"{plan.folder.name}-several"
    _train("instruct", run, "--base", DEMO / TUNED, "--data", data, "--recipe", "memeworld_several")
    for asking in ("pairs", "clips", "suite"):
        _measure(run, plan, asking)


def _stage(stage: str, plan: Plan, *, base: Path, name: str, steps: int) -> None:
    from finetune.memeworld.pretrain import worth_compiling

    settings = [f"max_steps={steps}", f"compile={str(worth_compiling(steps)).lower()}"]
    _train(stage, name, "--base", base, "--data", plan.folder / f"{stage}.json", *settings)


def _train(stage: str, name: str, *settings: str | Path) -> None:
    """Start the run of this name, or go on with it, unless it is finished."""
    if (Path("runs") / name / CARD_NAME).exists():
        return
    begun = (Path("runs") / name / "run.yaml").exists()
    _finetune(stage, "--name", name, *(["--resume"] if begun else settings))


def _measure(run: str, plan: Plan, asking: str) -> None:
    fewer = ["--limit", str(plan.questions)] if plan.questions else []
    _finetune("evaluate", Path("runs") / run, "memeworld", "--ask", asking, *fewer)


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
ON_REQUEST: dict[str, Callable[[Plan], None]] = {
    "anyres": _anyres,
    "several": _several,
    "ship": _ship,  # this and the next replace what lies in the repository
    "show": _show,
}
