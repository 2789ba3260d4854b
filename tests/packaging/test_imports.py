"""`import pikv_ds` is cheap; imports point one way: ops <- core <- adapters, megatron_patch <- launch <- examples."""

import subprocess
import sys

import pytest

from tests.packaging.imports import FILES, ROOT, imports_of, module_of

HOSTS = {"deepspeed", "megatron", "transformers"}
HEAVY = HOSTS | {"torch", "pydantic", "numpy", "rich"}
# The bundled model's loader is data access for tests and commands; PiKVOpBuilder is DeepSpeed's side of the ops, loaded on register().
HOST_EXCEPTIONS = {"pikv_ds.bundled", "pikv_ds.ops.build.builder", "pikv_ds.ops.build.deepspeed_builder"}
LAYERS = ["ops", "core", "hosts", "launch", "examples"]


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

    with pytest.raises(AttributeError, match="no attribute 'attatch'; public names: PiKVConfig, Cache, attach"):
        pikv_ds.attatch  # noqa: B018


@pytest.mark.slow
def test_importing_everything_makes_no_second_copy():
    run(
        "import sys, pkgutil, importlib, pikv_ds\n"
        "for folder in ('ops', 'megatron_patch', 'launch'):\n"
        "    package = importlib.import_module('pikv_ds.' + folder)\n"
        "    for found in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(found.name)\n"
        f"own = {str(ROOT / 'pikv_ds')!r}\n"
        "for found in pkgutil.walk_packages([own], 'pikv_ds.'):\n"
        "    importlib.import_module(found.name)\n"
        "bare = {'ops', 'launch', 'megatron_patch', 'pikv_ds.pikv_ds'} & set(sys.modules)\n"
        "assert not bare, bare\n"
    )


def layer_of(module: str) -> str:
    """Layer of a pikv_ds module by its dotted name."""
    second = (module.split(".") + [""])[1]
    if module.startswith("examples"):
        return "examples"
    return {"ops": "ops", "launch": "launch", "adapters": "hosts", "megatron_patch": "hosts"}.get(second, "core")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    module = module_of(path)
    own = layer_of(module)
    for name in {one.name for one in imports_of(path) if not one.for_types}:
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
