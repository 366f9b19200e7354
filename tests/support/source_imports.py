"""Imports of a source file, read with `ast`."""

from __future__ import annotations

import ast
from pathlib import Path


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names that a file imports: `from a.b import c` is a.b.c. Those under TYPE_CHECKING are left out.

    Args:
        path: of the source.
        top_level_only: leave out what is imported inside functions.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if top_level_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: imports are absolute, so that a name can be searched for"
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file of every module below a package's folder; a package is its __init__.py."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def module_imports(package: Path, top_level_only: bool = False) -> dict[str, set[str]]:
    """Each module of a package -> the modules of the same package that it imports."""
    known = modules(package)
    found = {}
    for name, path in known.items():
        wanted = imports(path, top_level_only)
        found[name] = {(dotted if dotted in known else dotted.rpartition(".")[0]) for dotted in wanted} & set(known)
    return found
