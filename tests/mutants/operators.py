"""Small edits that a program makes of named functions: comparisons, constants, operators, arguments. By positions in the text, so that
what is not edited keeps its bytes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from .mutant import ROOT, Mutant, Place

COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
SIGNS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}
ARITHMETIC = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&")}
CALLS = {
    "min": "max", "max": "min", "any": "all", "all": "any", "clamp_min": "clamp_max", "minimum": "maximum", "cumsum": "cumprod",
    "amin": "amax", "amax": "amin",
}  # fmt: skip


def edits(place: Place, functions: tuple[str, ...]) -> Iterator[Mutant]:
    """One mutant for every place in these functions, "Class.method" or "function", where an operator applies."""
    text = (ROOT / place.file).read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    data = text.encode()
    found = dict(_functions(ast.parse(text)))
    for function in functions:
        if function not in found:
            raise ValueError(f"{place.file} has no function {function}: bring the list up to date")
        for number, (node, begin, end, new) in enumerate(_of_function(found[function], data, starts)):
            old = data[begin:end].decode()
            mutated = (data[:begin] + new.encode() + data[end:]).decode()
            line = data[starts[node.lineno - 1] : starts[node.end_lineno]].decode().strip()
            yield Mutant(
                name=f"{Path(place.file).stem}/{function}/{number}", place=place, what=f"{old} -> {new} in: {line[:160]}", text=mutated
            )


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{child.name}", child) for child in node.body if isinstance(child, ast.FunctionDef))


def _of_function(function: ast.FunctionDef, data: bytes, starts: list[int]) -> Iterator[tuple[ast.AST, int, int, str]]:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, (ast.Assert, ast.Raise, ast.JoinedStr)):
                continue
            for begin, end, new in _of_node(node, data, starts):
                if not _within_message(node, statement):
                    yield node, begin, end, new


def _within_message(node: ast.AST, statement: ast.stmt) -> bool:
    """What is part of an error's text or of an assertion is no behaviour."""
    return any(
        isinstance(outer, (ast.Assert, ast.Raise, ast.JoinedStr)) and any(inner is node for inner in ast.walk(outer))
        for outer in ast.walk(statement)
    )


def _of_node(node: ast.AST, data: bytes, starts: list[int]) -> Iterator[tuple[int, int, str]]:
    def at(one: ast.AST) -> tuple[int, int]:
        return starts[one.lineno - 1] + one.col_offset, starts[one.end_lineno - 1] + one.end_col_offset

    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        begin, end = at(node.left)[1], at(node.comparators[0])[0]
        yield from _swap(data, begin, end, SIGNS[type(node.ops[0])], COMPARISONS[type(node.ops[0])])
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        begin, end = at(node.left)[1], at(node.right)[0]
        yield from _swap(data, begin, end, *ARITHMETIC[type(node.op)])
    elif isinstance(node, ast.BoolOp):
        sign = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        yield from _swap(data, at(node.values[0])[1], at(node.values[1])[0], *sign)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.Invert)):
        begin, _ = at(node)
        yield begin, at(node.operand)[0], ""
    elif isinstance(node, ast.AugAssign) and isinstance(node.op, (ast.Add, ast.Sub)):
        begin, end = at(node.target)[1], at(node.value)[0]
        sign = ("+=", "-=") if isinstance(node.op, ast.Add) else ("-=", "+=")
        yield from _swap(data, begin, end, *sign)
    elif isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if name in CALLS:
            end = at(node.func)[1]
            yield end - len(name), end, CALLS[name]


def _swap(data: bytes, begin: int, end: int, old: str, new: str) -> Iterator[tuple[int, int, str]]:
    """Between two operands there are only the sign, blanks and brackets."""
    offset = data[begin:end].decode().find(old)
    if offset >= 0:
        yield begin + offset, begin + offset + len(old), new
