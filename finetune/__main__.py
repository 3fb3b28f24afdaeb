"""python -m finetune VERB; without one it lists them."""

import argparse
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.recipe import INHERIT, inherit, listing, load_recipe, named_recipe, show
from llava_app.checkpoints import find
from llava_app.errors import RecipeError, UserError

if TYPE_CHECKING:
    from finetune.checkpoint import Run

RUNS = Path("runs")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, none for this user, none for so large a file
DATA = "LLaVA records (JSON, JSON lines), a folder with metadata.jsonl, a Hugging Face dataset, or a mixture (YAML)"
IMAGES = "folder or archive (.zip, .tar) of the records' pictures (default: the data file's folder)"


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
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for an optional package wherever it is imported
    try:
        return VERBS[verb][0](arguments[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(
            f"The disk is full ({error}). Make room, then run the command again; add --resume to go on with a run.",
            file=sys.stderr,
        )
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
    modes = ("pad", "crop", "anyres", "anyres_max_9")
    parser.add_argument("--image-mode", choices=modes, default="pad", help="anyres: LLaVA-1.6; anyres_max_9: OneVision")
    parser.add_argument("--template", help="of the chats to come (default: the language model's own, or vicuna_v1)")
    parser.add_argument("--class-token", action="store_true", help="keep a CLIP tower's class token as a feature")
    parser.add_argument("--feature-layer", type=int, default=-2, help="of the tower, from its end (-2)")
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
        template=options.template,
        class_token=options.class_token,
        feature_layer=options.feature_layer,
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
    folder = options.runs / options.name

    from finetune.checkpoint import is_finished, load_run, refuse_taken
    from finetune.interrupt import Interrupted
    from finetune.train import train

    run = load_run(folder) if options.resume else _new_run(stage, options)
    kept = (options.base, options.data, options.images, options.recipe, options.track, options.overrides)
    if options.resume and any(kept):
        raise RecipeError(
            "A resumed run keeps its own base, data, pictures, recipe and tracker. Give --name and --resume only; "
            "--allow-refused can be changed."
        )
    if options.allow_refused is not None:
        run = replace(run, allow_refused=options.allow_refused)
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
    from finetune.data.mixture import picture_root
    from llava_app.loading import described

    if not re.fullmatch(r"\w[\w.-]*", options.name):
        raise RecipeError(f"The name {options.name!r} is no folder name. Give letters, digits, dots, dashes.")
    if options.base is None or options.data is None:
        raise RecipeError("A new run needs --base and --data. To go on with an interrupted one, add --resume.")
    recipe, base = load_recipe(options.recipe or f"memeworld_{stage}", options.overrides), find(options.base)
    recipe, told = inherit(recipe, described(base) if INHERIT in (recipe.template, recipe.image_mode) else base)
    if told:
        print(told)
    images = picture_root(options.data, options.images)
    return Run(options.name, options.base, options.data, images, recipe, track=options.track)


def _training_parser(stage: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m finetune {stage}")
    parser.add_argument("--name", required=True, help="of the run: it is written to runs/NAME")
    parser.add_argument("--base", help="model to start from: a folder, a name of the model list or a Hub id")
    parser.add_argument("--data", type=Path, help=DATA)
    parser.add_argument("--images", type=Path, help=IMAGES)
    parser.add_argument("--recipe", help=f"name or YAML file (default: memeworld_{stage}, for small models)")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the runs (runs)")
    parser.add_argument("--allow-refused", type=float, metavar="FRACTION", help="of the records (0.01)")
    parser.add_argument("--track", metavar="TOOL", help="show the log in tensorboard, trackio or wandb as well")
    parser.add_argument("--resume", action="store_true", help="go on with the run NAME, with its own settings")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="changes to the recipe")
    return parser


def _export(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m finetune export")
    parser.add_argument("run", type=Path, help="folder of a finished run, such as runs/NAME")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload it to this repository of the Hub, private at first"
    )
    options = parser.parse_args(arguments)

    from finetune.export import export, push

    export(options.run, options.out)
    print(f"{options.out} is a whole model, with README.md as its card. Read that before you hand it on.")
    if options.push:
        print(f"It is at {push(options.out, options.push)}, where only you can see it.")
    return 0


def _import(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m finetune import")
    parser.add_argument("source", type=Path, help="folder of a checkpoint of the original LLaVA code")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--vision", type=Path, required=True, help="folder of its vision tower, a CLIP model")
    parser.add_argument("--language", type=Path, help="folder of its language model, for a projector or an adapter")
    parser.add_argument("--template", default="vicuna_v1", help="chat template it was trained with (vicuna_v1)")
    options = parser.parse_args(arguments)

    from finetune.exchange import import_original

    import_original(
        options.source, options.out, vision=options.vision, language=options.language, template=options.template
    )
    print(f"{options.out} is a standard model folder: python app.py --model {options.out}")
    return 0


def _recipes(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m finetune recipes")
    parser.add_argument("name", nargs="?", help="the recipe to show whole (default: a list of all)")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="changes to it")
    options = parser.parse_args(arguments)
    print(show(named_recipe(options.name, options.overrides)) if options.name else listing())
    return 0


def _check(arguments: list[str]) -> int:
    code: int = import_module("finetune.check").main(arguments)
    return code


def _plan(arguments: list[str]) -> int:
    code: int = import_module("finetune.plan").main(arguments)
    return code


def _generate(arguments: list[str]) -> int:
    return int(import_module("finetune.instruct.cli").main(arguments))


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
    "recipes": (_recipes, "list the recipes, or show one whole"),
    "check": (_check, "look at data: what is wrong with it, how long, how varied"),
    "plan": (_plan, "memory and time of a recipe, before anything is loaded"),
    "assemble": (_assemble, "a vision tower and a language model become a LLaVA"),
    "align": (_align, "stage 1: the projector learns on captions"),
    "instruct": (_instruct, "stage 2: projector and language model learn on dialogues"),
    "export": (_export, "a finished run becomes one whole model with a model card"),
    "import": (_import, "a checkpoint of the original LLaVA code becomes a standard folder"),
    "generate": (_generate, "write dialogues from captions and boxes, by a teacher that sees no picture"),
    "evaluate": (_evaluate, "measure a model"),
    "score": (_score, "score answers and reviews that were made elsewhere"),
    "compare": (_compare, "measured models side by side, with intervals and a paired test"),
    "memeworld": (_memeworld, "make the built-in world and its model from nothing"),
}


if __name__ == "__main__":
    sys.exit(main())
