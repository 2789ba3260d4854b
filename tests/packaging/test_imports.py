"""`import pikv_ds` is cheap; imports point one way: ops <- core <- adapters, megatron_patch <- launch <- examples."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOSTS = {"deepspeed", "megatron", "transformers"}
HEAVY = HOSTS | {"torch", "pydantic", "numpy", "rich"}
# The bundled model's loader is data access for tests and commands; PiKVOpBuilder is DeepSpeed's side of the ops, loaded on register().
HOST_EXCEPTIONS = {"pikv_ds.bundled", "pikv_ds.ops.build.builder", "pikv_ds.ops.build.deepspeed_builder"}
LAYERS = ["ops", "core", "hosts", "launch", "examples"]
FOLDERS = ("ops", "pikv_ds", "megatron_patch", "launch", "examples")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "code, absent",
    [
        ("import pikv_ds; dir(pikv_ds)", HEAVY),
        ("from pikv_ds import PiKVConfig", HOSTS | {"torch"}),
        ("from pikv_ds.launch.cli import build_parser; build_parser()", HEAVY),
    ],
)
def test_imports_stay_light(code, absent):
    run(f"import sys; {code}; found = {absent!r} & set(sys.modules); assert not found, found")


def test_unknown_names_are_refused():
    import pikv_ds

    with pytest.raises(AttributeError, match="no attribute 'attatch'; public names: PiKVConfig, attach"):
        pikv_ds.attatch  # noqa: B018


@pytest.mark.slow
def test_importing_everything_makes_no_second_copy():
    run(
        "import sys, pkgutil, importlib, pikv_ds\n"
        "for folder in ('ops', 'megatron_patch', 'launch', 'codecs', 'routers', 'policies', 'adapters', 'bundled'):\n"
        "    package = importlib.import_module('pikv_ds.' + folder)\n"
        "    for found in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(found.name)\n"
        f"own = {str(ROOT / 'pikv_ds')!r}\n"
        "for found in pkgutil.iter_modules([own]):\n"
        "    importlib.import_module('pikv_ds.' + found.name)\n"
        "bare = {'ops', 'launch', 'megatron_patch', 'pikv_ds.pikv_ds'} & set(sys.modules)\n"
        "assert not bare, bare\n"
    )


def layer_of(module: str) -> str:
    """Layer of a pikv_ds module by its dotted name."""
    second = (module.split(".") + [""])[1]
    if module.startswith("examples"):
        return "examples"
    return {"ops": "ops", "launch": "launch", "adapters": "hosts", "megatron_patch": "hosts"}.get(second, "core")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    dotted = parts if parts[0] in ("pikv_ds", "examples") else ("pikv_ds", *parts)
    return ".".join(dotted).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Absolute names this file imports, wherever in the file, except under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from pikv_ds import ops` imports pikv_ds.ops
            names |= {f"{source(node, path)}.{alias.name}" for alias in node.names}
    return names


def source(node: ast.ImportFrom, path: Path) -> str:
    """The absolute name of what a (possibly relative) `from ... import` imports from."""
    if node.level == 0:
        return node.module
    package = module_of(path).split(".")[: None if path.name == "__init__.py" else -1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    module = module_of(path)
    own = layer_of(module)
    for name in imported(path):
        top = name.partition(".")[0]
        assert top not in ("ops", "launch", "megatron_patch"), f"{module} imports {name}: write pikv_ds.{name}"
        if top in HOSTS:
            assert own in ("hosts", "launch", "examples") or module in HOST_EXCEPTIONS, f"{module} ({own}) imports {name}"
        if top == "pikv_ds" and name != "pikv_ds.__version__":
            assert LAYERS.index(layer_of(name)) <= LAYERS.index(own), f"{module} ({own}) imports {name} ({layer_of(name)})"


def test_there_are_files_to_check():
    assert len(FILES) > 15


def test_no_merge_conflict_is_committed():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    marks = tuple(mark * 7 + b" " for mark in (b"<", b">"))
    for name in filter(None, listed.stdout.split("\0")):
        lines = (ROOT / name).read_bytes().splitlines()
        assert not any(line.startswith(marks) for line in lines), f"{name} holds a merge conflict"
