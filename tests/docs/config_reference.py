"""docs/reference/config.md, from the schema that `pikv config --schema` prints."""

import json
from typing import Any

from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.config.presets import PRESETS

from .tables import MADE, table

HEAD = f"""# The "pikv" block

{MADE}
Every key is optional. `pikv config --check FILE` checks a file and prints the block with all defaults filled in. Unknown keys, values out
of range and combinations that cannot work are refused when the configuration is read, with the key, the value and what is legal.

Options of a codec, a router or a policy stand beside its `method` in the same block: [methods.md](methods.md).
"""
LIMITS = {"minimum": ">= {}", "exclusiveMinimum": "> {}", "maximum": "<= {}", "exclusiveMaximum": "< {}"}


def written() -> str:
    schema = PiKVConfig.model_json_schema()
    known = schema["$defs"]
    parts = [HEAD, *_block("pikv", schema, known)]
    for key, value in schema["properties"].items():
        if name := _reference(value):
            parts += _block(f"pikv.{key}", known[name], known)
            inner = {field: _reference(of) for field, of in known[name]["properties"].items()}
            for field, name in inner.items():
                if name and name != "CodecConfig":
                    parts += _block(f"pikv.{key}.{field}", known[name], known)
    rows = [(f"`{name}`", preset.what) for name, preset in PRESETS.items()]
    parts += ["## Presets\n", "A preset stands for a whole configuration; keys given beside it win.\n", table(("preset", "what"), rows)]
    return "\n".join(parts)


def _block(path: str, block: dict[str, Any], known: dict[str, Any]) -> list[str]:
    rows = []
    for key, value in block["properties"].items():
        default = "its defaults" if "default" not in value or isinstance(value["default"], dict) else f"`{json.dumps(value['default'])}`"
        rows.append((f"`{key}`", _legal(value, known), default, value.get("description", "")))
    said = [" ".join(block["description"].split()) + "\n"] if "description" in block else []
    return [f"## `{path}`\n", *said, table(("key", "legal", "default", "what"), rows)]


def _reference(value: dict[str, Any]) -> str | None:
    for one in (value, *value.get("anyOf", ()), *value.get("allOf", ())):
        if "$ref" in one:
            return one["$ref"].rpartition("/")[2]
    return None


def _legal(value: dict[str, Any], known: dict[str, Any]) -> str:
    if "anyOf" in value:
        return " or ".join(_legal(one, known) for one in value["anyOf"])
    if name := _reference(value):
        return "a codec: `method`, `rotate`, `rotate_seed` and its options" if name == "CodecConfig" else "a block"
    if "enum" in value or "const" in value:
        return ", ".join(f"`{json.dumps(one)}`" for one in value.get("enum", [value.get("const")]))
    if value.get("type") == "array":
        return f"list of {_legal(value['items'], known)}" if "items" in value else "list"
    if value.get("type") == "object" and isinstance(value.get("additionalProperties"), dict):
        return f"keys to {_legal(value['additionalProperties'], known)}"
    limits = [shown.format(value[limit]) for limit, shown in LIMITS.items() if limit in value]
    return " ".join([value.get("type", "any"), *([", ".join(limits)] if limits else [])])
