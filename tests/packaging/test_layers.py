"""Which folder may import which: late imports and those under TYPE_CHECKING are counted.

A folder is one room, and so is what lies flat in pikv_ds/ ("ground"). Rooms stand in ORDER, and a file imports rooms before its own. What
does not keep to that yet is listed in ALLOWED, which may only shrink: an entry that nothing needs any more fails here too.
"""

from collections import defaultdict
from pathlib import Path

from tests.packaging.imports import FILES, ROOT, imports_of, module_of

ORDER = [
    "ground", "ops", "codecs", "config", "exchange", "placement", "step", "pages", "routers", "policies", "pools", "selection", "retention",
    "blueprint", "training", "tiers", "migration", "sessions", "cache", "prefix", "bundled", "adapters", "megatron_patch", "launch",
    "examples",
]  # fmt: skip
CORE = ORDER[ORDER.index("ops") + 1 : ORDER.index("bundled")]
FACES = {"pikv_ds", "pikv_ds.plan"}  # public names of other rooms, given to users; nothing of ours imports them
ALLOWED = {
    ("pikv_ds.config.pikv", "pikv_ds.blueprint.reading"),  # to stay: late, a block is refused when it is read
}
MOST_FLOORS, MOST_FLAT_FILES = 9, 8


def room_of(module: str) -> str:
    parts = module.split(".")
    if parts[0] == "examples":
        return "examples"
    return parts[1] if len(parts) > 1 and parts[1] in ORDER else "ground"


def arrows() -> list[tuple[str, str]]:
    """(module, imported name) across rooms."""
    found = []
    for path in FILES:
        module = module_of(path)
        if module in FACES:
            continue
        names = {one.name for one in imports_of(path) if one.name.startswith("pikv_ds.") or one.name == "pikv_ds"}
        found += [(module, name) for name in sorted(names) if room_of(name) != room_of(module)]
    return found


def upward() -> set[tuple[str, str]]:
    return {(module, name) for module, name in arrows() if ORDER.index(room_of(name)) > ORDER.index(room_of(module))}


def test_no_import_points_up():
    found = upward()
    assert not found - ALLOWED, f"imports of a later room than the file's own (order: {', '.join(ORDER)}): {sorted(found - ALLOWED)}"
    assert not ALLOWED - found, f"no longer needed in ALLOWED: {sorted(ALLOWED - found)}"


def test_the_configuration_is_data():
    """It knows no method: of other rooms it imports nothing, but for the one line that asks whether methods combine."""
    own = {(module, name) for module, name in arrows() if room_of(module) == "config" and room_of(name) != "ground"}
    assert own == {("pikv_ds.config.pikv", "pikv_ds.blueprint.reading")}


def test_rooms_have_few_floors():
    """The longest way down from a room of the core through rooms that it imports."""
    below: dict[str, set[str]] = defaultdict(set)
    for module, name in set(arrows()) - ALLOWED:
        below[room_of(module)].add(room_of(name))
    floor = {}
    for room in ORDER:  # every arrow points to an earlier one
        floor[room] = 1 + max((floor[other] for other in below[room] if other in floor and other in ("ground", *CORE)), default=0)
    floors = {room: floor[room] for room in ("ground", *CORE)}
    assert max(floors.values()) <= MOST_FLOORS, floors


def test_every_folder_has_its_place():
    folders = {path.name for path in (ROOT / "pikv_ds").iterdir() if (path / "__init__.py").is_file()}
    assert folders <= set(ORDER), f"name the place of {sorted(folders - set(ORDER))} in ORDER"


def test_few_files_lie_flat():
    flat = sorted(path.name for path in (ROOT / "pikv_ds").glob("*.py"))
    assert len(flat) <= MOST_FLAT_FILES, flat


def test_files_do_not_import_each_other_in_circles():
    assert not circles(), circles()


def circles() -> list[list[str]]:
    """Groups of files that reach each other by imports (Tarjan's strongly connected components)."""
    own = {module_of(path): path for path in FILES if module_of(path) not in FACES}
    graph = {module: _targets(path, own) - {module} for module, path in own.items()}
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for other in graph[module]:
            if other not in number:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], number[other])
        if lowest[module] == number[module]:
            at = stack.index(module)
            found.append(sorted(stack[at:]))
            del stack[at:]

    for module in graph:
        if module not in number:
            visit(module)
    return [group for group in found if len(group) > 1]


def _targets(path: Path, own: dict[str, Path]) -> set[str]:
    """The files that a file imports; of a package its __init__."""
    found = set()
    for one in imports_of(path):
        name = one.name
        while name and name not in own:
            name = name.rpartition(".")[0]
        found |= {name} if name else set()
    return found
