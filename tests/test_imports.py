"""Who may import whom: the layering of docs/decisions.md, read from the source."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "modelscope_dolly"

#: module -> modules of ours it may import. cli may import all, inside functions.
ALLOWED = {
    "errors": set(),
    "prompt": {"errors"},
    "sampling": set(),
    "hardware": {"errors"},
    "manifest": {"errors"},
    "neox": {"errors"},
    "weights": {"errors", "manifest"},
    "engine": {"errors", "neox", "sampling"},
    "generation": {"errors", "prompt", "engine", "sampling"},
    "checkpoint": {"errors", "manifest", "neox", "prompt", "weights"},
    "export": {"errors", "manifest", "prompt"},
    "loading": {"checkpoint", "engine", "errors", "generation", "hardware", "neox", "weights"},
    "model": {"errors", "generation", "loading"},
    "pipeline": {"checkpoint", "errors", "generation", "model"},
    "plan": {"checkpoint", "hardware", "neox"},
    "check": {"checkpoint", "errors", "manifest", "neox", "prompt", "weights"},
}
REGISTRIES = {"__init__", "model", "pipeline"}
HUB_CLIENT = {"checkpoint", "plan"}
HEAVY = {"torch", "transformers", "modelscope", "accelerate", "datasets", "deepspeed", "lm_eval"}


def imports(path: Path, top_level_only: bool = False) -> set[tuple[str, str]]:
    """(`.module` or top-level package, whole dotted name) of each import, those under TYPE_CHECKING left out."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if top_level_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(child, ast.Import):
                found.update((alias.name.split(".")[0], alias.name) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.level:
                modules = [child.module] if child.module else [alias.name for alias in child.names]
                found.update((f".{module}", f".{module}") for module in modules)
            elif isinstance(child, ast.ImportFrom):
                found.add((child.module.split(".")[0], child.module))
            visit(child)

    visit(tree)
    return found


def modules() -> dict[str, Path]:
    return {path.stem: path for path in PACKAGE.glob("*.py")}


def ours(path: Path) -> set[str]:
    return {name[1:] for name, _ in imports(path) if name.startswith(".") and name[1:] in modules()}


def test_every_module_has_a_rule():
    assert set(modules()) == set(ALLOWED) | {"__init__", "cli"}


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_module_imports_only_what_lies_below_it(module):
    assert ours(modules()[module]) <= ALLOWED[module]


def test_the_plugin_never_imports_the_recipe_or_lm_eval():
    seen = {name for path in modules().values() for name, _ in imports(path)}
    assert not seen & {"train", "tests", "lm_eval", "deepspeed"}


def test_only_some_modules_touch_modelscope():
    for name, path in modules().items():
        dotted = {whole for top, whole in imports(path) if top.startswith("modelscope")}
        hub = {whole for whole in dotted if ".hub" in whole}
        if hub:
            assert name in HUB_CLIENT, f"{name} imports {hub}"
        if dotted - hub:
            assert name in REGISTRIES, f"{name} imports {dotted - hub}"


@pytest.mark.parametrize("module", ["__init__", "cli", "errors", "prompt", "manifest", "weights"])
def test_light_modules_import_nothing_heavy_at_the_top(module):
    assert not {name for name, _ in imports(modules()[module], top_level_only=True)} & HEAVY


def test_only_the_prompt_module_spells_a_key():
    spelled = [path for path in PACKAGE.glob("*.py") if path.stem != "prompt" and "### " in path.read_text()]
    for path in (PACKAGE.parent / "train").rglob("*.py"):
        if "### " in path.read_text():
            spelled.append(path)
    assert spelled == []


def test_no_third_party_import_is_undeclared():
    setup = (PACKAGE.parent / "setup.py").read_text()
    seen = {name for path in modules().values() for name, _ in imports(path) if not name.startswith(".")}
    third_party = {name for name in seen if name not in sys.stdlib_module_names}
    assert third_party, "no import was seen"
    for name in third_party:
        assert f'"{name}' in setup, f"{name} is imported but not in setup.py"
