import importlib
import os
import re
import sys
import types
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

# Top-level folders that are imported as subpackages of pikv_ds.
GRAFTS = {"pikv_ds.ops": "ops", "pikv_ds.megatron_patch": "megatron_patch", "pikv_ds.launch": "launch"}

packages = find_packages(include=["pikv_ds", "pikv_ds.*"])
for name, folder in GRAFTS.items():
    packages += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]

AHEAD = os.environ.get("DS_BUILD_PIKV") == "1"


class BuildWithOps(build_py):
    """DS_BUILD_PIKV=1 compiles the ops at install (needs torch: pip install --no-build-isolation); else they are built on first use.

    The CPU ops, and where torch is one for CUDA the CUDA ops, which need nvcc.
    """

    def run(self) -> None:
        super().run()
        if AHEAD:
            building = _module("compile")
            folder = building.PREBUILT if self.editable_mode else Path(self.build_lib).absolute() / "pikv_ds" / "ops" / "prebuilt"
            building.build_ahead(building.cpu_library(), folder)
            if torch_has_cuda():
                building.build_ahead(_module("cuda_build").cuda_library(), folder)


def torch_has_cuda():
    import torch

    return torch.version.cuda is not None


def _module(name):
    """ops/build/<name>.py without the package around it, which imports more than a build has."""
    if "pikv_build" not in sys.modules:
        sys.modules["pikv_build"] = package = types.ModuleType("pikv_build")
        package.__path__ = [str(Path(__file__).parent / "ops")]  # ops/build and ops/format, without ops/__init__.py
    return importlib.import_module(f"pikv_build.build.{name}")


class WithOps(Distribution):
    def has_ext_modules(self) -> bool:  # a wheel with a library in it is for one platform
        return AHEAD


setup(
    cmdclass={"build_py": BuildWithOps},
    distclass=WithOps,
    name="pikv-ds",
    version=re.search(r'__version__ = "(.+?)"', Path("pikv_ds/__init__.py").read_text()).group(1),
    description="Expert-sharded KV cache for Mixture-of-Experts models under DeepSpeed and Megatron-Core",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=packages,
    package_dir=GRAFTS,
    package_data={
        "pikv_ds": ["py.typed"],
        "pikv_ds.bundled": ["PROVENANCE.md", "haystack.txt", "wikitext2_test.txt", "wikitext2_valid.txt", "kv_gate.safetensors", "model/*"],
        "pikv_ds.launch": ["sweeps/*.json"],
        "pikv_ds.launch.serving.http": ["page.html"],
        "pikv_ds.ops": [f"csrc/**/*.{ext}" for ext in ("cu", "cuh", "cpp", "h")],
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.2,<0.20",
        "transformers>=5.19,<5.25",
        "megatron-core>=0.16,<0.17; python_version < '3.12'",
        "megatron-core>=0.16,<0.20; python_version >= '3.12'",
        "triton; python_version >= '3.12' and sys_platform == 'linux'",  # 0.18 and later import it without asking for it
        "numpy",
        "packaging",
        "pydantic>=2",
        "rich",
        "safetensors",
    ],
    extras_require={
        "cuda": ["cupy-cuda13x"],
        "eval": ["lm-eval[hf]>=0.4.9,<0.5"],
        "serve": ["fastapi>=0.115", "uvicorn>=0.30", "openai>=2", "httpx>=0.27", "prometheus_client>=0.20"],
        "test": [
            "lm-eval[api]",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "matplotlib",
            "ruff",
            "mypy",
            "nvidia-cuda-nvdisasm; sys_platform == 'linux'",  # tests/ops/sass.py, where nvcc is
            "pyzmq",
            "pikv-ds[eval,serve,weights]",
        ],
        "weights": ["accelerate", "peft", "torchao", "optimum-quanto", "bitsandbytes"],  # what wraps or packs them, for tests
    },
    entry_points={"console_scripts": ["pikv=pikv_ds.launch.cli:main"]},
)
