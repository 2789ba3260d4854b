"""The newest Megatron-Core, which asks for another Python than the tests may run on: in the environment that launch/dev.sh makes for it."""

import os
import subprocess
from pathlib import Path

import megatron.core
import pytest

from pikv_ds.launch.ranks import free_port
from tests.dist.launcher import run_commands
from tests.megatron import JOBS
from tests.megatron.marks import on_cpu

ROOT = Path(__file__).resolve().parents[2]
PINNED = next(
    line.partition("==")[2] for line in (ROOT / "constraints-3.12.txt").read_text().splitlines() if line.startswith("megatron-core==")
)


def environment() -> Path:
    """Where it lies; skips the test, with what to do, where it is not there."""
    if megatron.core.__version__ == PINNED:
        pytest.skip(f"this is an environment with megatron-core {PINNED}: the other tests run on it")
    home = Path(os.environ.get("PIKV_MEGATRON_NEWEST", ROOT / ".venv-megatron-newest"))
    if not (home / "bin" / "python").exists():
        pytest.skip(f"no Python 3.12 with megatron-core {PINNED} in {home}: 'bash launch/dev.sh megatron-newest' makes one")
    question = "import importlib.metadata as m; print(m.version('megatron-core'))"
    found = subprocess.run([home / "bin" / "python", "-c", question], capture_output=True, text=True, timeout=60)
    version = found.stdout.strip() or "none"
    if version != PINNED:
        pytest.skip(f"{home} has megatron-core {version}, not {PINNED}: 'bash launch/dev.sh megatron-newest' renews it")
    return home


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(240)
@on_cpu
def test_static_batching():
    home = environment()
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", **port} for rank in range(2)]
    job = [str(home / "bin" / "python"), str(JOBS / "newest.py"), "1,2,1", PINNED]
    own = {"TORCH_EXTENSIONS_DIR": str(home / "extensions"), "VIRTUAL_ENV": str(home)}
    run_commands([job] * 2, ranks=2, timeout_s=200, env=own, per_process_env=ranks).check("static batching")
