"""What the README promises: its files exist, its commands are real, and its front matter is what a Space takes."""

import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from finetune.__main__ import VERBS, _training_parser
from finetune.memeworld.cli import STEPS
from finetune.recipe import RECIPES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_file_of_the_tree_exists() -> None:
    tree = README.split("## What is where")[1].split("```")[1].strip().splitlines()
    folder = ROOT
    for line in tree:
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        folder = ROOT if not line.startswith(" ") else folder
        missing = [name for name in names if not (folder / name).exists()]
        assert not missing, line
        folder = ROOT / names[0] if not line.startswith(" ") else folder


def test_every_linked_file_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_verb_exists() -> None:
    assert set(re.findall(r"python -m finetune (\w+)", README)) <= {*VERBS, "VERB"}
    assert set(re.findall(r"`memeworld (\w+)`", README)) == set(STEPS)


def test_every_recipe_is_in_the_table() -> None:
    table = README.split("| recipe | what for |")[1].split("\n\n")[0]
    named = [name.replace("…", "*") for name in re.findall(r"`([\w…]+)`", table)]
    patterns = [f"*{name}" if name.startswith("_") else name for name in named]  # `_12gb` ends the name before it
    stems = [path.stem for path in RECIPES.glob("*.yaml")]
    assert [stem for stem in stems if not any(fnmatch(stem, pattern) for pattern in patterns)] == []


def test_every_training_command_is_complete() -> None:
    commands = re.findall(r"python -m finetune (align|instruct) +(--[^\n#`|…]+)", README.replace("\\\n", ""))
    assert len(commands) > 3
    for stage, arguments in commands:
        options = _training_parser(stage).parse_args(shlex.split(arguments))
        assert options.resume or (options.base and options.data), arguments


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "pip install -r requirements-dev.txt && python -m pytest" in README
    assert "-r requirements-dev.txt" in script
    assert "python -m pytest" in script
    assert ".ci/audit ||" in script  # as the README says, what it finds stops no change


def test_the_front_matter_is_what_a_space_takes() -> None:
    matter = yaml.safe_load(README.split("---")[1])
    assert matter["sdk"] == "gradio"
    assert (ROOT / matter["app_file"]).exists()
    assert len(matter["short_description"]) <= 60
    assert matter["python_version"] == "3.12.12"  # the one on ZeroGPU that the page runs on; the other is 3.10.13


def test_requirements_take_a_torch_that_zero_gpu_has() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    torch = next(Requirement(line.split("#")[0]) for line in lines if line.startswith("torch"))
    newest = max(torch.specifier.filter(["2.8.0", "2.11.0", "2.12.1", "2.13.0", "2.14.0"]), key=Version)
    assert newest == "2.13.0"
