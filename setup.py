import re
from pathlib import Path

from setuptools import find_packages, setup

# Top-level folders that are imported as subpackages of pikv_ds.
GRAFTS = {"pikv_ds.ops": "ops", "pikv_ds.megatron_patch": "megatron_patch", "pikv_ds.launch": "launch"}

packages = find_packages(include=["pikv_ds", "pikv_ds.*"])
for name, folder in GRAFTS.items():
    packages += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]

setup(
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
        "pikv_ds.bundled": ["PROVENANCE.md", "haystack.txt", "model/*"],
        "pikv_ds.ops": [f"csrc/**/*.{ext}" for ext in ("cu", "cuh", "cpp", "h")],
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19",
        "transformers>=5.0",
        "megatron-core>=0.16",
        "numpy",
        "pydantic>=2",
        "rich",
        "safetensors",
    ],
    extras_require={
        "cuda": ["cupy-cuda13x"],
        "test": ["pytest", "pytest-timeout", "hypothesis", "matplotlib"],
    },
    entry_points={"console_scripts": ["pikv=pikv_ds.launch.cli:main"]},
)
