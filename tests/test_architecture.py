"""Which module may import what. The rules are those of the design: heavy libraries only where they are used."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in (ROOT / "app.py", *ROOT.glob("llava_app/**/*.py"), *ROOT.glob("finetune/**/*.py"))
    if file.exists()
}
LIGHT = ("llava_app.errors", "llava_app.conversation", "llava_app.chat", "finetune.recipe")


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All of them, also inside functions, but for those that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not only_for_types(child):
            yield from import_statements(child)


@cache
def imports(module: str) -> frozenset[str]:
    """What a module names in its imports: `from a import b` may mean the module a.b, so it gives a and a.b."""
    names: set[str] = set()
    for statement in import_statements(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            names.update(alias.name for alias in statement.names)
        else:
            assert statement.level == 0, f"{module} has a relative import"
            names.add(statement.module or "")
            names.update(f"{statement.module}.{alias.name}" for alias in statement.names)
    return frozenset(names)


def packages(module: str) -> set[str]:
    """A module's own name and those of the packages around it, which Python runs before it."""
    parts = module.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts) + 1)}


def reached(module: str) -> set[str]:
    """Everything that importing a module may import, through our own modules."""
    seen: set[str] = set()
    waiting = packages(module)
    while waiting:
        name = waiting.pop()
        seen.add(name)
        if name in MODULES:
            waiting |= set().union(*map(packages, imports(name))) - seen
    return seen


def imports_any(module: str, library: str) -> bool:
    return any(name.split(".")[0] == library for name in imports(module))


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("llava_app")])
def test_the_app_never_imports_the_training(module: str) -> None:
    assert not imports_any(module, "finetune")


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith(("app", "llava_app.ui"))])
def test_only_the_page_imports_gradio(module: str) -> None:
    assert not imports_any(module, "gradio")


@pytest.mark.parametrize("module", [name for name in LIGHT if name in MODULES])
def test_light_modules_reach_neither_torch_nor_transformers(module: str) -> None:
    assert not {name for name in reached(module) if name.split(".")[0] in ("torch", "transformers")}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_named_for_nothing(module: str) -> None:
    assert not {"utils", "common", "helpers"} & set(module.split("."))


def test_the_rules_see_imports_in_functions_and_through_modules() -> None:
    assert "pillow_heif" in imports("llava_app.images")
    assert "PIL" in reached("llava_app.conversation")
    assert "torch" in reached("llava_app.prompts")
