"""Scripts that take PiKV without an edit, or by the diffs of docs/guide/megatron.md; and everything back afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.long_form import LONG
from tests.megatron import documented
from tests.megatron.launched import launched
from tests.megatron.marks import on_cpu

CHECKOUT = os.environ.get("PIKV_MEGATRON_LM")  # a git checkout of Megatron-LM that has these tags
EXAMPLES = "examples/inference/gpt/"
SCRIPTS = {  # what each diff of the guide was taken from
    "from_config": {"core_v0.16.1": [f"{EXAMPLES}gpt_static_inference.py", "tools/run_text_generation_server.py"]},
    "constructor": {
        "core_v0.17.1": [f"{EXAMPLES}gpt_static_inference.py"],
        "core_v0.18.2": ["examples/inference/advanced/gpt_static_inference.py"],
        "core_v0.19.0": ["examples/inference/advanced/gpt_static_inference.py"],
    },
    "install": {
        "core_v0.16.1": [
            *(
                f"{EXAMPLES}{name}.py"
                for name in ("gpt_dynamic_inference", "gpt_dynamic_inference_with_coordinator", "gpt_static_inference")
            ),
            "tools/run_text_generation_server.py",
            "tools/run_inference_performance_test.py",
        ],
        "core_v0.19.0": [
            "examples/inference/advanced/gpt_dynamic_inference.py",
            "examples/inference/advanced/gpt_dynamic_inference_with_coordinator.py",
            "tools/run_inference_performance_test.py",
        ],
    },
}
CASES = [(name, tag, path) for name, tags in SCRIPTS.items() for tag, paths in tags.items() for path in paths]


@pytest.mark.dist
@pytest.mark.timeout(240)
@on_cpu
@pytest.mark.parametrize(
    "check",
    [
        "an unedited static script",
        "a static engine that wants CUDA graphs goes back to the static context",
        "an unedited dynamic script",
        "a dynamic script with the documented lines",
        "everything is the host's again",
        "installed twice, contexts from before, models enabled by hand",
        "names that others replace, threads that install",
        "a context's class by hand",
    ],
)
def test_drop_in(check: str):
    launched("drop_in.py", "1,2,1").check(f"1,2,1 {check}")


@pytest.mark.parametrize("name, tag, path", CASES)
def test_the_diffs_fit_the_real_scripts(name: str, tag: str, path: str):
    if CHECKOUT is None:
        pytest.skip(
            "needs PIKV_MEGATRON_LM=CHECKOUT, a git checkout of Megatron-LM with its tags; the jobs apply the diffs to small scripts"
        )
    command = ["git", "-C", CHECKOUT, "show", f"{tag}:{path}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert shown.returncode == 0, shown.stderr
    compile(documented.patched(shown.stdout, documented.diffs(name)), path, "exec")


@pytest.mark.skipif(not LONG, reason="long form: an interpreter of its own")
def test_import_replaces_nothing():
    code = (
        "import sys, pikv_ds.megatron_patch as m; assert 'megatron' not in sys.modules; "
        "from megatron.core.inference.contexts import StaticInferenceContext as C; before = C.__init__; "
        "m.install, m.PiKVInferenceContext; assert C.__init__ is before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_runner(tmp_path: Path, monkeypatch, capfd):
    from pikv_ds.launch import megatron_run
    from pikv_ds.megatron_patch import uninstall

    script, block = tmp_path / "script.py", tmp_path / "pikv.json"
    script.write_text(
        "import sys\nfrom megatron.core.inference.contexts import StaticInferenceContext\n"
        "print(__name__, type(StaticInferenceContext(2, 8)).__name__, sys.argv[1:], sys.path[0])\n"
    )
    block.write_text(json.dumps({"page_size": 8}))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["megatron_run", str(block), str(script), "--x", "2"])
    try:
        megatron_run.main()
        assert capfd.readouterr().out.split("\n")[0] == f"__main__ PiKVInferenceContext ['--x', '2'] {tmp_path}"
    finally:
        assert uninstall()
    for argv in ([], [str(script)], ["--help", str(script)], [str(block), str(tmp_path / "none.py")]):
        monkeypatch.setattr(sys, "argv", ["megatron_run", *argv])
        with pytest.raises(SystemExit, match="usage: torchrun -m pikv_ds.launch.megatron_run"):
            megatron_run.main()
    assert not uninstall(), "nothing was installed by a call that was refused"
