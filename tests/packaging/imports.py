"""Every import of the project's files, read from their text."""

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("ops", "pikv_ds", "megatron_patch", "launch", "examples")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


class Import(NamedTuple):
    """An absolute dotted name that a file imports; from a module the module and the name."""

    name: str
    for_types: bool  # under `if TYPE_CHECKING`
    late: bool  # inside a function


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    dotted = parts if parts[0] in ("pikv_ds", "examples") else ("pikv_ds", *parts)
    return ".".join(dotted).removesuffix(".__init__")


@cache
def imports_of(path: Path) -> list[Import]:
    """All of them, wherever in the file."""
    found: list[Import] = []
    _collect(ast.parse(path.read_text(encoding="utf-8")), path, False, False, found)
    return found


def _collect(node: ast.AST, path: Path, for_types: bool, late: bool, found: list[Import]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found += [Import(alias.name, for_types, late) for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            # `from pikv_ds import ops` imports pikv_ds.ops
            found += [Import(f"{_source(child, path)}.{alias.name}", for_types, late) for alias in child.names]
        else:
            types = for_types or (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING")
            _collect(child, path, types, late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda), found)


def _source(node: ast.ImportFrom, path: Path) -> str:
    """The absolute name of what a (possibly relative) `from ... import` imports from."""
    if node.level == 0:
        return node.module
    package = module_of(path).split(".")[: None if path.name == "__init__.py" else -1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)
