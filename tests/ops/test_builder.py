"""The build cache, and DeepSpeed's view of the ops."""

import os
import platform
import re
import shutil
import subprocess
import sys

import pytest

from pikv_ds import ops
from pikv_ds.ops.build import compile as building
from pikv_ds.ops.build import load


def test_register_and_unregister():
    pytest.importorskip("deepspeed")
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    accelerator = get_accelerator()
    before, names = dict(vars(accelerator)), list(ALL_OPS)
    ops.register()
    ops.register()
    try:
        builder = accelerator.create_op_builder("PiKVOpBuilder")
        assert builder.name == "pikv" and builder.is_compatible() and accelerator.get_op_builder("PiKVOpBuilder") is type(builder)
        assert builder.load() is ops and all(os.path.isfile(path) for path in builder.sources())
        assert ALL_OPS["pikv"].name == "pikv" and installed_ops["pikv"] is False
        assert accelerator.create_op_builder("CPUAdamBuilder") is not None
    finally:
        ops.unregister()
    ops.unregister()
    assert vars(accelerator) == before and list(ALL_OPS) == names and "pikv" not in installed_ops


def test_under_a_cuda_accelerator_it_is_the_cuda_library(monkeypatch):
    pytest.importorskip("deepspeed")
    from pikv_ds.ops.build.deepspeed_builder import PiKVOpBuilder

    builder = PiKVOpBuilder()
    assert not [path for path in builder.sources() if path.endswith(".cu")]
    monkeypatch.setattr(PiKVOpBuilder, "device", "cuda")
    assert [path for path in builder.sources() if path.endswith("attend_kernels.cu")] and "-DUSE_CUDA" in builder.nvcc_args()
    monkeypatch.setattr(PiKVOpBuilder, "_loaded_ops", {})
    monkeypatch.setattr(load, "_loaded", {})
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    monkeypatch.setattr("pikv_ds.ops.nvrtc.compiler.compiler", lambda: (_ for _ in ()).throw(building.ToolMissing("no cupy")))
    assert not builder.is_compatible()
    with pytest.raises(RuntimeError, match="nothing is here to build cuda or nvrtc with"), pytest.warns(UserWarning, match="plain torch"):
        builder.load()


def test_ds_report_lists_it():
    pytest.importorskip("deepspeed")
    code = "from pikv_ds import ops; ops.register(); from deepspeed.env_report import op_report; op_report()"
    env = os.environ | {"PYTHONPATH": os.getcwd(), "DS_ACCELERATOR": "cpu"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=True)
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("pikv ")]
    assert "OKAY" in line


def test_the_key_follows_sources_flags_and_compiler(tmp_path, monkeypatch):
    first = building.library_key(building.cpu_library())
    assert first == building.library_key(building.cpu_library())
    assert first != building.library_key(building.cpu_library(("-DSOMETHING",)))
    monkeypatch.setattr(building, "compiler_version", lambda command: "another")
    assert first != building.library_key(building.cpu_library())


@pytest.mark.skipif(shutil.which("objdump") is None or platform.machine() != "x86_64", reason="needs objdump on x86-64")
def test_what_files_share_runs_on_the_oldest_cpu():
    """Of a function that several files instantiate, one copy is kept: it must not be the one compiled for AVX."""
    path = str(building.build(building.cpu_library()))
    listed = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout.splitlines()
    shared = {line.split()[-1] for line in listed if line.split()[-2] == "W"}
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True).stdout
    functions = {text.partition(">:")[0].partition("<")[2]: text for text in code.split("\n\n")}
    wide = re.compile(r"%[yz]mm|\tv[a-z]")
    assert any(name.startswith("_ZNSt6vector") for name in shared)
    assert wide.search(next(text for name, text in functions.items() if "attend_avx512" in name))
    assert not [name for name in shared & set(functions) if wide.search(functions[name])]


def _tiny(tmp_path, monkeypatch, text="int f() { return 1; }"):
    source = tmp_path / "src"
    source.mkdir(exist_ok=True)
    (source / "tiny.cpp").write_text(text)
    monkeypatch.setattr(building, "CSRC", source)
    return building.Library("tiny", "g++", ("-fPIC",), (building.Source("tiny.cpp"),))


def test_built_once_and_found_again(tmp_path, monkeypatch, capfd):
    library = _tiny(tmp_path, monkeypatch)
    path = building.build(library, tmp_path)
    assert "built tiny" in capfd.readouterr().err
    assert building.build(library, tmp_path) == path and not capfd.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"src", "tiny.lock", path.name}


def test_an_installed_library_needs_no_compiler(tmp_path, monkeypatch):
    library = _tiny(tmp_path, monkeypatch)
    path = building.build_ahead(library, tmp_path / "prebuilt")
    monkeypatch.setattr(building, "compiler_version", None)
    assert building.prebuilt(library, tmp_path / "prebuilt") == path


def test_an_install_finds_the_libraries_without_the_package():
    """setup.py builds before anything of the package can be imported."""
    code = (
        "import setuptools, sys; setuptools.setup = lambda **options: None; sys.argv = ['setup.py'];"
        "import runpy; made = runpy.run_path('setup.py'); names = [made['_module']('compile').cpu_library().name,"
        "made['_module']('cuda_build').cuda_library().name]; assert not [m for m in sys.modules if m.startswith('pikv_ds')]; print(names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "['pikv_cpu', 'pikv_cuda']", done.stderr


def test_a_failed_build_shows_the_error_and_leaves_nothing(tmp_path, monkeypatch):
    library = _tiny(tmp_path, monkeypatch, "int f() { return undeclared; }")
    with pytest.raises(building.BuildError, match=r"g\+\+ failed .*\n.*undeclared"):
        building.build(library, tmp_path)
    assert not list(tmp_path.glob("*.so")) and sorted(p.name for p in tmp_path.iterdir()) == ["src", "tiny.lock"]


def test_cache_directories(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert building.cache_dir() == tmp_path / "pikv_ds"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ext"))
    assert building.cache_dir() == tmp_path / "ext" / "pikv_ds"


def test_pikv_build(tmp_path):
    report = tmp_path / "build.json"
    command = [sys.executable, "-m", "pikv_ds.launch.cli", "build", "cpu", "--json", str(report)]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert '"status": "ok"' in report.read_text()
