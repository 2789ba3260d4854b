"""Hosts, launch and examples use of a core what it offers them: steps, the face of cache/face.py, and what it was built from."""

import ast
from collections import defaultdict

from pikv_ds.cache.face import HostFace
from tests.packaging.imports import FILES, ROOT

STEPS = {"begin_step", "attend", "name_experts", "end_step", "reset"}
GIVEN = {"layers", "config", "codec", "dtype", "device", "num_shards", "blueprint"}
FACE = {name for name in vars(HostFace) if not name.startswith("_")}
HOSTS = ("pikv_ds/adapters", "megatron_patch", "launch", "examples")


def test_hosts_use_no_other_attribute_of_a_core():
    found: dict[str, list[str]] = defaultdict(list)
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(HOSTS):
            for attribute, line in _of_cores(ast.parse(path.read_text(encoding="utf-8"))):
                found[attribute].append(f"{name}:{line}")
    found.pop("__version__")  # of megatron.core
    assert STEPS | {"ranks", "announce_crops"} <= set(found), "nothing was scanned"
    other = {attribute: at for attribute, at in found.items() if attribute not in STEPS | GIVEN | FACE}
    assert not other, f"a host asks a core for what its face does not offer: {other}"


def _of_cores(tree: ast.AST) -> list[tuple[str, int]]:
    """Attributes of everything that is called core: a name, or an attribute of something else."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else None
            found += [(node.attr, node.lineno)] if name == "core" else []
    return found
