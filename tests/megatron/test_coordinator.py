"""What Megatron-Core builds around DynamicInferenceEngine, unedited over install(): its zmq coordinator and client, MegatronLLM, and with a
checkout of Megatron-LM the engine of its tools. Tokens are those of Megatron's own cache, or of a full forward.

0.16 is run in the long form, where no rank has tensor-parallel peers: those subscribe while the first messages are sent, and one run in six
of Megatron's own cache hangs at the start too. From 0.17 on they wait for each other.
"""

import importlib.util
import os
import re
import subprocess

import megatron.core
import pytest
from packaging.version import Version

from tests.long_form import LONG, short_or_long
from tests.megatron import JOBS, hosts
from tests.megatron.launched import launched
from tests.megatron.marks import on_cpu

pytest.importorskip("zmq", reason="Megatron's coordinator needs pyzmq")

CHECKOUT = os.environ.get("PIKV_MEGATRON_LM")  # a git checkout of Megatron-LM with the tag of the installed Megatron-Core
FOLDERS = (
    "megatron/inference",
    "megatron/training",
    "megatron/legacy",
    "megatron/post_training",
)  # what get_dynamic_inference_engine imports
LAYOUTS = {"EP2": "1,2,1", "TP2": "2,1,1", "PP2": "1,1,1,2"}  # tp,ep,etp,pp on two ranks
RUN = short_or_long(["EP2"], list(LAYOUTS))
SINCE_18 = importlib.util.find_spec("megatron.core.inference.apis") is not None

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600), on_cpu]
needs_pauses = pytest.mark.skipif(not hosts.pauses(), reason="ranks behind the coordinator pause from megatron-core 0.17 on")


def rows_of(job: str, check: str, layouts: list[str], **how) -> list[dict]:
    return launched(f"{job}.py", *layouts, timeout_s=540, **how).check(check)


@pytest.mark.skipif(not LONG and not hosts.pauses(), reason="long form on megatron-core 0.16: the coordinator is an interpreter of its own")
def test_coordinator_and_client():
    rows = rows_of("coordinator", "1,2,1 coordinator and client", ["1,2,1"])
    assert sum(row["idle"] for row in rows) > 0, rows


@needs_pauses
@pytest.mark.parametrize("mode", ["persist", "recompute"])
def test_ranks_are_suspended_with_requests_under_way(mode: str):
    rows_of("coordinator", f"1,2,1 suspended, {mode}", ["1,2,1"])


@pytest.mark.skipif(not SINCE_18, reason="megatron.core.inference.apis came with megatron-core 0.18")
@pytest.mark.parametrize("layout", RUN)
@pytest.mark.parametrize("check", ["MegatronLLM, direct", "MegatronLLM, coordinator", "MegatronAsyncLLM, coordinator"])
def test_megatron_llm(check: str, layout: str):
    if check == "MegatronLLM, direct" and layout == "EP2":
        pytest.skip("with expert parallelism the host asks for the coordinator")
    rows_of("apis", f"{LAYOUTS[layout]} {check}", [LAYOUTS[name] for name in RUN])


@pytest.fixture(scope="module")
def megatron_lm(tmp_path_factory) -> str:
    """A folder with what lies outside of megatron.core at the tag of the installed version, or at the last before it."""
    if CHECKOUT is None:
        pytest.skip("needs PIKV_MEGATRON_LM=CHECKOUT, a git checkout of Megatron-LM with its tags")

    def git(*words: str) -> bytes:
        return subprocess.run(["git", "-C", CHECKOUT, *words], capture_output=True, timeout=60, check=True).stdout

    installed = Version(megatron.core.__version__)
    tags = [tag for tag in git("tag", "--list", "core_v*").decode().split() if re.fullmatch(r"core_v\d+\.\d+\.\d+", tag)]
    of_line = [tag for tag in tags if Version(tag[6:]).release[:2] == installed.release[:2] and Version(tag[6:]) <= installed]
    if not of_line:
        pytest.skip(f"{CHECKOUT} has no tag core_v* of {installed}")
    tag = max(of_line, key=lambda one: Version(one[6:]))
    there = git("ls-tree", "--name-only", tag, *FOLDERS, ".").decode().split()
    folder = tmp_path_factory.mktemp(tag)
    archive = git("archive", tag, *(path for path in there if path in FOLDERS or path.endswith(".py")))
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, timeout=60, check=True)
    return str(folder)


@needs_pauses
@pytest.mark.parametrize("tool", ["run_inference_performance_test", "run_dynamic_text_generation_server", "megatron/rl"])
def test_the_engine_of_megatron_lm(tool: str, megatron_lm: str):
    path = os.pathsep.join(filter(None, [megatron_lm, str(JOBS.parents[2]), os.environ.get("PYTHONPATH")]))
    rows_of("tools", f"1,2,1 {tool}", ["1,2,1"], env=(("PYTHONPATH", path),))
