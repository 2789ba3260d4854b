"""Messages for an illegal "pikv" block: the full key, the value given, what is legal."""

from __future__ import annotations

import difflib
import types
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

_TYPE_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "null"}


def illegal(key: str, value: Any, legal: str) -> str:
    """`key` is relative to the block, `legal` completes "legal is ..."."""
    return f"pikv.{key} = {_show(value)}: legal is {legal}"


def gone(key: str, value: Any, instead: str) -> str:
    """Of a value of an earlier version; `instead` says why it is gone and what to use."""
    return f"pikv.{key} = {_show(value)} was removed: {instead}"


def unknown(key: str, value: Any, parent: str, known: list[str]) -> str:
    """Of a key that nobody reads."""
    close = difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown key {key} = {_show(value)}: legal keys of {parent} are {', '.join(known)}{hint}"


def problem(key: str, value: Any, legal: str) -> PydanticCustomError:
    """An error to raise inside a validator of a block, see `illegal`."""
    return PydanticCustomError("pikv", "{text}", {"text": illegal(key, value, legal)})


def removed(key: str, value: Any, instead: str) -> PydanticCustomError:
    """An error to raise inside a validator of a block, see `gone`."""
    return PydanticCustomError("pikv", "{text}", {"text": gone(key, value, instead)})


def legal_words(annotation: Any) -> str:
    """What a value of this type may be, in words."""
    return " or ".join(word for kind in _members(annotation) for word in _words(kind))


def describe(error: ValidationError, block: type[BaseModel]) -> str:
    """All problems of one construction, a line each."""
    lines = []
    for item in error.errors(include_url=False):
        line = _line(item, block)
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def rules_of(error: ValidationError) -> str | tuple[str, ...] | None:
    """The rules (blueprint/rules.py) that refused: a name, several, or None."""
    raised = [item["ctx"]["error"] for item in error.errors(include_url=False) if item["type"] == "value_error"]
    names = tuple(dict.fromkeys(rule for rule in (getattr(one, "rule", None) for one in raised) if rule))
    return names if len(names) > 1 else names[0] if names else None


def _line(item: ErrorDetails, block: type[BaseModel]) -> str:
    if item["type"] == "pikv":
        return item["msg"]
    if item["type"] == "value_error":  # raised by what a check called, with a message of its own
        return str(item["ctx"]["error"])
    model, field, path = _locate(item["loc"], block)
    key = ".".join(["pikv", *path])
    if item["type"] == "extra_forbidden":
        return unknown(key, item["input"], ".".join(["pikv", *path[:-1]]), list(model.model_fields))
    assert field is not None, item
    legal = "a finite number" if item["type"] == "finite_number" else _legal(field)
    return f"{key} = {_show(item['input'])}: legal is {legal}"


def _locate(loc: tuple[int | str, ...], block: type[BaseModel]) -> tuple[type[BaseModel], FieldInfo | None, list[str]]:
    """Follow `loc` into nested blocks; stops at the first field that is not a block."""
    model, field, path = block, None, []
    for part in loc:
        path.append(str(part))
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        if len(path) < len(loc):
            model = field.annotation
    return model, field, path


def _legal(field: FieldInfo) -> str:
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
        return f"an object with the keys {', '.join(field.annotation.model_fields)}"
    words = [word for kind in _members(field.annotation) for word in _words(kind)]
    bounds = " ".join(_bound(item) for item in field.metadata).strip()
    if bounds:
        words[0] = f"{words[0]} {bounds}"
    return " or ".join(words)


def _members(annotation: Any) -> tuple:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _words(kind: Any) -> list[str]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [f"an object with the keys {', '.join(kind.model_fields)}"]
    if get_origin(kind) is dict:
        return ["an object whose keys are layer indices, '0' and up"]
    if get_origin(kind) is tuple and isinstance(get_args(kind)[0], type) and issubclass(get_args(kind)[0], BaseModel):
        return [f"a list of objects, each with the key {' and '.join(repr(key) for key in get_args(kind)[0].model_fields)}"]
    if get_origin(kind) is Literal:
        return ["one of " + ", ".join(repr(value) for value in get_args(kind))]
    return [_TYPE_WORDS.get(kind, "a list [num_layers or 1][num_experts][max_replicas] of integers")]


def _bound(item: Any) -> str:
    if isinstance(item, annotated_types.Ge):
        return f">= {item.ge}"
    if isinstance(item, annotated_types.Gt):
        return f"> {item.gt}"
    if isinstance(item, annotated_types.Le):
        return f"and <= {item.le}"
    if isinstance(item, annotated_types.MinLen):
        return "that is not empty"
    return ""


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
