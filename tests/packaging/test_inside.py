"""How often tests, launch and examples reach into a cache. They look through CacheProbe; what is left may only shrink."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOOKING = ["tests", "launch", "examples"]
ANYWHERE = {"allocator", "directory", "counters", "refcount", "free_stack", "free_top", "summaries"}
OF_A_CACHE = {"pages", "selection", "retention", "window", "bases", "writer", "reader", "agreement", "step", "ways"}
OWN_CLASS = {  # tests of one class by itself, and what makes its objects or damages them
    "tests/harness/pools.py", "tests/pages/test_pool.py", "tests/pages/test_recycle.py", "tests/placement/test_directory.py",
    "tests/tiers/test_bases.py", "tests/pages/test_events.py", "tests/harness/offloading.py", "tests/tiers/test_offload.py",
    "tests/faults/simulated.py", "tests/pages/test_allocator.py", "tests/cache/test_plain.py",
}  # fmt: skip
LEFT = {  # file -> how often
    "tests/kvpress/test_parity.py": 1,
    "tests/cache/test_reset.py": 1,
    "tests/routers/test_shard_routers.py": 1,
    "tests/cache/test_stats.py": 1,
    "tests/tiers/test_window.py": 2,
}


def name_of(node: ast.expr) -> str | None:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def reaches(source: str) -> int:
    """Attributes of a cache's parts that are read or written."""
    attributes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    return sum(node.attr in ANYWHERE or (node.attr in OF_A_CACHE and name_of(node.value) in ("cache", "core")) for node in attributes)


def test_a_reach_is_seen():
    assert reaches("driver.cache.pages.layers[0].nearest.allocator") == 2
    assert reaches("cache.core.selection.choose = recording") == reaches("core.agreement.mode") == 1
    assert reaches("probe.near_pool(0).counts; self.bases.maps(0); cache.stats()") == 0


def test_the_rest_only_shrinks():
    found = {}
    for path in sorted(path for folder in LOOKING for path in (ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name not in OWN_CLASS and (count := reaches(path.read_text())):
            found[name] = count
    more = {name: count for name, count in found.items() if count > LEFT.get(name, 0)}
    assert not more, f"these reach into a cache more often than before; ask CacheProbe, or give it what it lacks: {more}"
    assert found == LEFT, "fewer than LEFT says: lower it"
