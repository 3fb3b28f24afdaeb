"""The settings of a training run: one frozen, self-checking value, saved next to the weights it made."""

import difflib
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from llava_app.checkpoints import OWN, Card
from llava_app.errors import RecipeError

RECIPES = Path(__file__).parent / "recipes"
DESCRIPTION = ("about", "source", "needs", "size")  # what a YAML file says beside the recipe's fields
INHERIT = "inherit"  # the value of a field that is to be as the base was trained
INHERITED = ("template", "image_mode")
TEMPLATES = (  # of `llava_app.prompts`, which imports torch
    "plain",
    "vicuna_v1",
    "llava_v0",
    "llava_v1",
    "mistral_instruct",
    "llava_llama_2",
    "chatml_direct",
    "qwen",
    "mpt",
    "llama_3",
)

CHOICES = {
    "stage": ("align", "instruct"),
    "template": (*TEMPLATES, INHERIT),
    "image_mode": ("pad", "crop", "anyres", INHERIT),
    "precision": ("bfloat16", "float32"),
    "quantise": ("none", "4bit"),
    "optimizer": ("adamw", "adamw8bit"),
    "frozen": ("none", "projector", "language_model"),
}
LIMITS = {  # field: (least, most), both allowed
    "learning_rate": (1e-8, 1.0),
    "projector_learning_rate": (1e-8, 1.0),
    "vision_learning_rate": (1e-8, 1.0),
    "lora_rank": (0, 4_096),
    "lora_alpha": (1, 65_536),
    "lora_dropout": (0.0, 0.9),
    "held_out": (0, 100_000),
    "feature_cache": (0.0, 10_000.0),
    "global_batch": (1, 65_536),
    "micro_batch": (1, 4_096),
    "epochs": (1, 1_000),
    "max_steps": (1, 100_000_000),
    "max_length": (16, 1_000_000),
    "warmup_ratio": (0.0, 1.0),
    "weight_decay": (0.0, 1.0),
    "gradient_clip": (1e-6, 1e6),
    "seed": (0, 2**32 - 1),
    "save_every": (1, 100_000_000),
}


@dataclass(frozen=True)
class Recipe:
    """How one stage trains. Raises RecipeError when a field has a wrong type or lies outside its limits.

    A batch counts examples: `global_batch` per optimiser step over all processes, `micro_batch` per forward pass
    of one process. `max_length` counts tokens, the picture's included. `max_steps` ends a run before its epochs do.
    `projector_learning_rate` is `learning_rate` where it is not given; the vision tower learns only if
    `vision_learning_rate` is. `frozen` keeps one of the stage's parts from learning. With a `lora_rank` above 0 the
    language model learns through adapters of that rank (`lora_alpha` / `lora_rank` is their weight), and `quantise`
    can keep the rest of it in 4 bits (QLoRA).
    `packing` puts the examples of a micro-batch behind each other in one row instead of padding them.
    `held_out` counts examples that are not learned from but measured at every save, at most a twentieth of the data.
    `feature_cache` is how many GB of the frozen vision tower's features are kept on disk, for runs of several epochs.
    `gradient_checkpointing` saves memory for a third more computing. `compile` makes a small model 1.5 times as fast
    on a CPU, after a minute of compiling, and needs a C++ compiler there. `template` and `image_mode` may be "inherit".
    """

    stage: str
    template: str
    image_mode: str
    learning_rate: float
    global_batch: int
    micro_batch: int
    projector_learning_rate: float | None = None
    vision_learning_rate: float | None = None
    frozen: str = "none"
    lora_rank: int = 0
    lora_alpha: int = 256
    lora_dropout: float = 0.05
    quantise: str = "none"
    packing: bool = True
    optimizer: str = "adamw"
    held_out: int = 16
    feature_cache: float = 0.0
    epochs: int = 1
    max_steps: int | None = None
    max_length: int = 2048
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    precision: str = "bfloat16"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    save_every: int = 500

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _typed(field.name, getattr(self, field.name), field.type))
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise RecipeError(f"{name} is {getattr(self, name)!r}; it can be {' or '.join(choices)}.")
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise RecipeError(f"{name} is {value}; it must lie between {least} and {most}.")
        if self.quantise != "none" and not self.lora_rank:
            raise RecipeError(f"quantise is {self.quantise}: quantised weights cannot learn. Give a lora_rank too.")
        if self.quantise != "none" and self.precision == "float32":
            raise RecipeError(f"quantise is {self.quantise}, which computes in bfloat16. Set precision=bfloat16.")
        if self.lora_rank and self.stage == "align":
            raise RecipeError("Stage align trains the projector only, so lora_rank has nothing to do. Take it away.")
        if self.lora_rank and self.frozen == "language_model":
            raise RecipeError("frozen is language_model, which lora_rank lets learn. Take one of them away.")
        if self.lora_rank and self.vision_learning_rate:
            raise RecipeError("An adapter holds no vision tower. Take vision_learning_rate away, or set lora_rank=0.")
        if (self.stage, self.frozen) == ("align", "projector") and not self.vision_learning_rate:
            raise RecipeError("frozen is projector, and stage align trains nothing else. Take frozen away.")
        if self.lora_rank and self.image_mode == "anyres":
            raise RecipeError("image_mode is anyres, whose row ends no adapter holds. Set lora_rank=0 or another mode.")
        if self.feature_cache and self.vision_learning_rate:
            raise RecipeError("feature_cache needs a frozen vision tower. Take vision_learning_rate away, or it.")

    @property
    def accumulation(self) -> int:
        """Forward passes of one process alone for each step of the optimiser."""
        return -(-self.global_batch // self.micro_batch)


@dataclass(frozen=True)
class Named:
    """A recipe as its YAML file tells it: for whom it is, where its figures come from, and what it needs."""

    name: str
    recipe: Recipe
    about: str = ""
    source: str = ""
    needs: str = ""
    size: str = "7b"  # of the model that it is for, as `plan --base` takes it


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name in finetune/recipes, or of that YAML file, with `field=value` overrides applied.

    Raises RecipeError for an unknown recipe, a misspelt field (the nearest is named) or a value out of its limits.
    """
    return named_recipe(name_or_path, overrides).recipe


def named_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Named:
    """As `load_recipe`, with what the YAML file says about itself."""
    path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        raise RecipeError(_unknown(name_or_path))
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # the second: no UTF-8, or a date that there is not
        raise RecipeError(f"{path} is not YAML: {_sentence(error)} Give a file of `field: value` lines.") from error
    if not isinstance(settings, dict):
        raise RecipeError(f"{path} holds no `field: value` lines.")
    description = {name: str(settings.pop(name)) for name in DESCRIPTION if name in settings}
    return Named(path.stem, recipe_from({**settings, **_parsed(overrides)}), **description)


def all_recipes() -> list[Named]:
    """The recipes of the project, by name."""
    return [named_recipe(path.stem) for path in sorted(RECIPES.glob("*.yaml"))]


def listing() -> str:
    """All recipes of the project, a line each."""
    return "\n".join(f"{named.name:22} {named.about}" for named in all_recipes())


def show(named: Named) -> str:
    """One recipe whole, as YAML that can be saved, changed and given to --recipe."""
    recipe = named.recipe
    description = {name: getattr(named, name) for name in DESCRIPTION}
    steps = f"# On one device: {recipe.micro_batch} examples at a time, {recipe.accumulation} times for each step."
    return yaml.safe_dump(description | asdict(recipe), sort_keys=False, allow_unicode=True, width=110) + steps


def inherit(recipe: Recipe, base: Card) -> tuple[Recipe, str]:
    """Fill the fields that say "inherit" from the base's card; the text says what was inherited and overridden.

    Raises RecipeError where stage 2 would inherit stage 1's template, which knows no dialogue, and where the base
    brings no card that says what to inherit.
    """
    taken = {name: getattr(base, name) for name in INHERITED if getattr(recipe, name) == INHERIT}
    if "template" in taken and (recipe.stage, base.stage) == ("instruct", "align"):
        raise RecipeError(
            f"{base.name} has only stage 1 behind it, whose template {base.template} knows no questions. "
            "Give a template (template=vicuna_v1), or start from a model that has stage 2 behind it."
        )
    if unknown := [name for name, value in taken.items() if value == OWN]:
        choices = " and ".join(f"{name}= one of {', '.join(CHOICES[name])}" for name in unknown)
        raise RecipeError(
            f"{base.name} has no card, and its files do not show with which {' and '.join(unknown)} it was trained. "
            f"Give {choices.replace(f', {INHERIT}', '')}."
        )
    lines = [f"inherited from {base.name}: {name} {value}" for name, value in taken.items()]
    for name in INHERITED:
        mine, theirs = getattr(recipe, name), getattr(base, name)
        if mine not in (INHERIT, theirs) and theirs != OWN:
            lines.append(f"overrides {base.name}: {name} {mine} instead of {theirs}")
    return replace(recipe, **taken), "\n".join(lines)


def recipe_from(settings: dict[str, Any]) -> Recipe:
    """A recipe from a mapping of its fields. Raises RecipeError: misspelt, missing and wrong fields are named."""
    known = [field.name for field in fields(Recipe)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise RecipeError(f"A recipe has no field {name!r}. Did you mean {near}? Fields: {', '.join(known)}.")
    needed = [field.name for field in fields(Recipe) if field.default is MISSING]
    if missing := [name for name in needed if name not in settings]:
        raise RecipeError(f"The recipe lacks {', '.join(missing)}. Give each as a line `field: value`.")
    return Recipe(**settings)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe so that `load_recipe` reads it back equal."""
    path.write_text(yaml.safe_dump(asdict(recipe), sort_keys=False), encoding="utf-8")


def _unknown(name: str) -> str:
    known = [path.stem for path in sorted(RECIPES.glob("*.yaml"))]
    near = difflib.get_close_matches(name, known, n=1)
    guess = f" Did you mean {near[0]}?" if near else ""
    return f"There is no recipe {name!r}.{guess} Give a YAML file or one of: {', '.join(known)}."


def _parsed(overrides: Sequence[str]) -> dict[str, Any]:
    settings = {}
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"{override!r} is not an override; write field=value, such as learning_rate=1e-3.")
        try:
            settings[name.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise RecipeError(f"{override!r} is not YAML: {_sentence(error)} Write field=value.") from error
    return settings


def _sentence(error: Exception) -> str:
    """What YAML found, in one line: its own errors draw the place over several."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    place = f"line {mark.line + 1}: " if mark else ""
    return f"{place}{problem or error}".splitlines()[0].removesuffix(".") + "."


def _typed(name: str, value: Any, wanted: Any) -> Any:
    """YAML reads 1e-3 as text and 1 as a whole number: both are floats where a float is wanted."""
    if value is None and wanted in (int | None, float | None):
        return None
    kind = {int | None: int, float | None: float}.get(wanted, wanted)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not kind:
        raise RecipeError(f"{name} is {value!r}; it must be {_KINDS[kind]}.")
    return value


_KINDS = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}
