"""python -m finetune VERB: assemble, align, instruct, evaluate, score, compare, memeworld."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.recipe import load_recipe
from llava_app.errors import RecipeError, UserError

if TYPE_CHECKING:
    from finetune.checkpoint import Run

RUNS = Path("runs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2 after an error that a person can mend, 130 after an interruption."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verb = arguments[0] if arguments else "--help"
    if verb not in VERBS:
        print("usage: python -m finetune VERB …")
        print(*(f"  {name:10} {about}" for name, (_, about) in VERBS.items()), sep="\n")
        return 0 if verb in ("-h", "--help") else 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's processes are forked
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads that spin starve a busy machine
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of every small file that is read or written
    try:
        return VERBS[verb][0](arguments[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _assemble(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m finetune assemble")
    parser.add_argument("vision", type=Path, help="folder of a CLIP or SigLIP model")
    parser.add_argument("language", type=Path, help="folder of a causal language model with its tokenizer")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--projector", choices=("mlp2x_gelu", "linear"), default="mlp2x_gelu")
    parser.add_argument("--image-mode", choices=("pad", "crop"), default="pad")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    options = parser.parse_args(arguments)

    import torch

    from finetune.assemble import assemble

    assemble(
        options.vision,
        options.language,
        options.out,
        projector=options.projector,
        image_mode=options.image_mode,
        dtype=getattr(torch, options.dtype),
    )
    print(f"{options.out} is assembled. Next: python -m finetune align --base {options.out} --data FILE --name NAME")
    return 0


def _align(arguments: list[str]) -> int:
    return _train("align", arguments)


def _instruct(arguments: list[str]) -> int:
    return _train("instruct", arguments)


def _train(stage: str, arguments: list[str]) -> int:
    options = _training_parser(stage).parse_intermixed_args(arguments)
    folder = RUNS / options.name

    from finetune.checkpoint import is_finished, load_run, refuse_taken
    from finetune.interrupt import Interrupted
    from finetune.train import train

    run = load_run(folder) if options.resume else _new_run(stage, options)
    if options.resume and (options.base or options.data or options.recipe or options.overrides):
        raise RecipeError("A resumed run keeps its own base, data and recipe. Give --name and --resume only.")
    if run.recipe.stage != stage:
        raise RecipeError(f"This is a recipe for stage {run.recipe.stage}. Use python -m finetune {run.recipe.stage}.")
    if not options.resume:
        refuse_taken(folder)
    elif is_finished(folder):
        print(f"{folder} is finished already.")
        return 0
    try:
        train(run, folder, resume=options.resume)
    except Interrupted as error:
        print(f"Stopped after step {error.step}. To go on: python -m finetune {stage} --name {options.name} --resume")
        return 130
    return 0


def _new_run(stage: str, options: argparse.Namespace) -> "Run":
    from finetune.checkpoint import Run

    if not re.fullmatch(r"\w[\w.-]*", options.name):
        raise RecipeError(f"The name {options.name!r} is no folder name. Give letters, digits, dots, dashes.")
    if options.base is None or options.data is None:
        raise RecipeError("A new run needs --base and --data. To go on with an interrupted one, add --resume.")
    recipe = load_recipe(options.recipe or f"memeworld_{stage}", options.overrides)
    images = options.images or options.data.parent
    return Run(options.name, options.base, options.data, images, recipe, options.allow_refused)


def _training_parser(stage: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m finetune {stage}")
    parser.add_argument("--name", required=True, help="of the run: it is written to runs/NAME")
    parser.add_argument("--base", help="model to start from: a folder, a name of the model list or a Hub id")
    parser.add_argument("--data", type=Path, help="LLaVA records, JSON or JSON lines")
    parser.add_argument("--images", type=Path, help="folder of the records' pictures (default: the data file's)")
    parser.add_argument("--recipe", help=f"name or YAML file (default: memeworld_{stage}, for small models)")
    parser.add_argument("--allow-refused", type=float, default=0.01, metavar="FRACTION", help="of the records (0.01)")
    parser.add_argument("--resume", action="store_true", help="go on with the run NAME, with its own settings")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="changes to the recipe")
    return parser


def _evaluate(arguments: list[str]) -> int:
    import_module("finetune.evaluate.cli").main(arguments)
    return 0


def _score(arguments: list[str]) -> int:
    import_module("finetune.evaluate.score").main(arguments)
    return 0


def _compare(arguments: list[str]) -> int:
    import_module("finetune.evaluate.compare").main(arguments)
    return 0


def _memeworld(arguments: list[str]) -> int:
    import_module("finetune.memeworld.cli").main(arguments)
    return 0


VERBS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "assemble": (_assemble, "a vision tower and a language model become a LLaVA"),
    "align": (_align, "stage 1: the projector learns on captions"),
    "instruct": (_instruct, "stage 2: projector and language model learn on dialogues"),
    "evaluate": (_evaluate, "measure a model"),
    "score": (_score, "score answers and reviews that were made elsewhere"),
    "compare": (_compare, "measured models side by side, with intervals and a paired test"),
    "memeworld": (_memeworld, "make the built-in world and its model from nothing"),
}


if __name__ == "__main__":
    sys.exit(main())
