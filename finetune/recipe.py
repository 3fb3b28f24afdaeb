"""The settings of a training run: one frozen, self-checking value, saved next to the weights it made."""

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from llava_app.errors import RecipeError

RECIPES = Path(__file__).parent / "recipes"

CHOICES = {
    "stage": ("align", "instruct"),
    "image_mode": ("pad", "crop", "anyres"),
    "precision": ("bfloat16", "float32"),
}
LIMITS = {  # field: (least, most), both allowed
    "learning_rate": (1e-8, 1.0),
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
    `gradient_checkpointing` saves memory for a third more computing. `compile` makes a small model 1.5 times as fast
    on a CPU, after a minute of compiling, and needs a C++ compiler there.
    """

    stage: str
    template: str
    image_mode: str
    learning_rate: float
    global_batch: int
    micro_batch: int
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


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name in finetune/recipes, or of that YAML file, with `field=value` overrides applied.

    Raises RecipeError for an unknown recipe, a misspelt field (the nearest is named) or a value out of its limits.
    """
    path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
        raise RecipeError(f"There is no recipe {name_or_path!r}. Give a YAML file or one of: {known}.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise RecipeError(f"{path} holds no `field: value` lines.")
    return recipe_from({**settings, **_parsed(overrides)})


def recipe_from(settings: dict[str, Any]) -> Recipe:
    """A recipe from a mapping of its fields. Raises RecipeError, and names the nearest field for a misspelt one."""
    known = [field.name for field in fields(Recipe)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise RecipeError(f"A recipe has no field {name!r}. Did you mean {near}? Fields: {', '.join(known)}.")
    try:
        return Recipe(**settings)
    except TypeError as error:
        raise RecipeError(f"The recipe is not complete: {error}".removesuffix(".") + ".") from error


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe so that `load_recipe` reads it back equal."""
    path.write_text(yaml.safe_dump(asdict(recipe), sort_keys=False), encoding="utf-8")


def _parsed(overrides: Sequence[str]) -> dict[str, Any]:
    settings = {}
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"{override!r} is not an override; write field=value, such as learning_rate=1e-3.")
        settings[name.strip()] = yaml.safe_load(value)
    return settings


def _typed(name: str, value: Any, wanted: Any) -> Any:
    """YAML reads 1e-3 as text and 1 as a whole number: both are floats where a float is wanted."""
    if value is None and wanted == (int | None):
        return None
    kind = int if wanted == (int | None) else wanted
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not kind:
        raise RecipeError(f"{name} is {value!r}; it must be {_KINDS[kind]}.")
    return value


_KINDS = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}
