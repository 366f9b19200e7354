"""Who may import whom: the layering of docs/decisions.md, read from the source."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "modelscope_dolly"

#: Module or subpackage -> what lies below it and may be imported. cli may import all, inside functions.
ALLOWED = {
    "errors": "",
    "prompt": "errors",
    "sampling": "",
    "varlen": "errors",
    "hardware": "errors",
    "manifest": "errors",
    "kernels": "",
    "triton_kernels": "kernels",
    "quantize": "errors kernels",
    "neox": "errors kernels varlen",
    "weights": "errors manifest",
    "guess": "",
    "draft": "guess neox sampling",
    "speculation": "draft guess neox sampling",
    "decode": "errors hardware neox sampling triton_kernels",
    "engine": "decode draft errors guess neox sampling speculation",
    "generation": "errors prompt engine guess sampling",
    "checkpoint": "errors manifest neox prompt quantize weights",
    "export": "errors manifest prompt",
    "loading": "checkpoint decode draft engine errors generation hardware kernels neox plan quantize weights",
    "model": "errors generation loading",
    "pipeline": "checkpoint errors generation model",
    "plan": "checkpoint hardware kernels manifest neox quantize",
    "check": "checkpoint errors hardware manifest prompt weights",
    "convert": "checkpoint errors export hardware manifest neox plan quantize weights",
    "evaluation": "checkpoint errors hardware manifest prompt weights",
    "benchmark": "checkpoint engine errors export guess hardware loading manifest neox plan prompt quantize sampling "
    "weights",
}
REGISTRIES = {"__init__", "model", "pipeline"}
HUB_CLIENT = {"checkpoint", "plan"}
HEAVY = {"torch", "transformers", "modelscope", "accelerate", "datasets", "deepspeed", "lm_eval"}


def imports(path: Path, top_level_only: bool = False) -> set[tuple[str, str]]:
    """(top-level package or ours as `.part`, whole dotted name) of each import, those under TYPE_CHECKING left out."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    here = path.relative_to(PACKAGE).parts[:-1] if path.is_relative_to(PACKAGE) else ()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if top_level_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(child, ast.Import):
                found.update((alias.name.split(".")[0], alias.name) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.level:
                base = [*here[: len(here) + 1 - child.level], *(child.module or "").split(".")]
                names = (
                    [[*filter(None, base)]]
                    if child.module
                    else [[*here[: len(here) + 1 - child.level], alias.name] for alias in child.names]
                )
                found.update((f".{name[0]}", "." + ".".join(name)) for name in names)
            elif isinstance(child, ast.ImportFrom):
                found.add((child.module.split(".")[0], child.module))
            visit(child)

    visit(tree)
    return found


def parts() -> dict[str, list[Path]]:
    """Modules, and subpackages with all of their files."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(path.relative_to(PACKAGE).with_suffix("").parts[0], []).append(path)
    return found


def ours(files: list[Path]) -> set[str]:
    names = {name for path in files for name, _ in imports(path) if name.startswith(".")}
    return {name[1:] for name in names if name[1:] in parts()}


def test_every_module_has_a_rule():
    assert set(parts()) == set(ALLOWED) | {"__init__", "cli"}


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_part_imports_only_what_lies_below_it(part):
    assert ours(parts()[part]) - {part} <= set(ALLOWED[part].split())


def test_imports_of_a_subpackage_are_seen():
    assert ours([PACKAGE / "evaluation" / "subject.py"]) >= {"checkpoint", "errors", "hardware"}


def test_the_plugin_never_imports_the_recipe_and_one_module_imports_lm_eval():
    seen = {path: {name for name, _ in imports(path)} for files in parts().values() for path in files}
    assert not set().union(*seen.values()) & {"train", "tests", "deepspeed"}
    assert [path.name for path, names in seen.items() if "lm_eval" in names] == ["harness.py"]


def test_only_some_modules_touch_modelscope():
    for name, path in ((name, path) for name, files in parts().items() for path in files):
        dotted = {whole for top, whole in imports(path) if top.startswith("modelscope")}
        hub = {whole for whole in dotted if ".hub" in whole}
        if hub:
            assert name in HUB_CLIENT, f"{name} imports {hub}"
        if dotted - hub:
            assert name in REGISTRIES, f"{name} imports {dotted - hub}"


LIGHT = ("__init__", "cli", "errors", "prompt", "manifest", "weights", "benchmark/__init__", "benchmark/options",
         "evaluation/__init__", "evaluation/published", "evaluation/results", "evaluation/command", "evaluation/data",
         "evaluation/rows", "evaluation/store")  # fmt: skip


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy_at_the_top(module):
    assert not {name for name, _ in imports(PACKAGE / f"{module}.py", top_level_only=True)} & HEAVY


def test_only_the_prompt_module_spells_a_key():
    spelled = [path for path in PACKAGE.rglob("*.py") if path.stem != "prompt" and "### " in path.read_text()]
    for path in (PACKAGE.parent / "train").rglob("*.py"):
        if "### " in path.read_text():
            spelled.append(path)
    assert spelled == []


def test_no_third_party_import_is_undeclared():
    setup = (PACKAGE.parent / "setup.py").read_text()
    seen = {name for files in parts().values() for path in files for name, _ in imports(path) if name[0] != "."}
    third_party = {name for name in seen if name not in sys.stdlib_module_names}
    assert third_party, "no import was seen"
    for name in third_party:
        assert f'"{name}' in setup or f"'{name}" in setup, f"{name} is imported but not in setup.py"
