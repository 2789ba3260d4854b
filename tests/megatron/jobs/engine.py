"""The user's script and StaticInferenceEngine, before and after the lines of docs/guide/megatron.md. Arguments: module folder, layouts."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pikv_ds.errors import UnsupportedError
from pikv_ds.megatron_patch import PiKVInferenceContext, cpu_compat
from tests.dist.jobs.report import Report
from tests.megatron import documented
from tests.megatron.models import start
from tests.megatron.runs import assert_conserved, dense_is_forbidden, refused

ROOT = Path(__file__).resolve().parents[3]
STEPS = 12


def patched(script: str, diffs: list[str]) -> str:
    for diff in diffs:
        lines = diff.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert script.count(old) == 1, f"the script has no place, or several, for\n{diff}"
        script = script.replace(old, new)
    return script


def run(script: str, *arguments: str):
    """Tokens and log-probabilities per prompt, and the engine; ranks of one tensor-parallel group have the same prompts."""
    dp_rank = parallel_state.get_data_parallel_rank()
    # Ragged; a row that is fed its prompt while another generates. All ranks run the same number of forwards, as expert parallelism needs.
    prompts = [["hello", "world!!x", "abcdef"], ["be quick", "to a point.", "as it is!"]][dp_rank % 2]
    module = {"__name__": "static_script"}
    exec(compile(script, "static_script.py", "exec"), module)
    with cpu_compat.cuda_literals_on_cpu():
        engine, results = module["main"](
            ["--use-legacy-static-engine", "--num-tokens-to-generate", str(STEPS), *arguments, "--prompts", *prompts]
        )
    tokens = [result.generated_tokens.tolist() for result in results]
    return tokens, [torch.tensor(result.generated_log_probs) for result in results], engine


def check_layout(report: Report, layout: str, folder: Path) -> None:
    start(*map(int, layout.split(",")))
    script = (ROOT / "tests" / "megatron" / "static_script.py").read_text()
    diffs, spec = documented.diffs(), documented.code("\nspec = ")
    expected, expected_log_probs, _ = run(script)
    assert [len(tokens) for tokens in expected] == [STEPS] * 3
    for name, arguments in (("in place", ()), ("--spec", ("--spec", "my_spec", "spec"))):
        with report.check(f"{layout} StaticInferenceEngine, {name}") as row:
            text = patched(script, diffs)
            if arguments:
                (folder / f"rank{report.rank}").mkdir(exist_ok=True)
                (folder / f"rank{report.rank}" / "my_spec.py").write_text(spec)
                sys.path.insert(0, str(folder / f"rank{report.rank}"))
                text = "".join(line for line in text.splitlines(keepends=True) if "enable_pikv(model" not in line)
            with dense_is_forbidden():
                tokens, log_probs, engine = run(text, *arguments)
            context = engine.controller.inference_wrapped_model.inference_context
            assert isinstance(context, PiKVInferenceContext)
            row["difference"] = max((a - b).abs().max().item() for a, b in zip(log_probs, expected_log_probs, strict=True))
            assert tokens == expected, (tokens, expected)
            assert row["difference"] <= 1e-5, row
            assert_conserved(context, len(context.layers) * context.columns * 3)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:  # the first stage refuses, the next waits for its hidden states
        leave()
        return
    with report.check(f"{layout} an engine that replaces the context is refused"):
        model = engine.controller.inference_wrapped_model.model
        module = {"__name__": "static_script"}
        exec(compile(script, "static_script.py", "exec"), module)
        module["get_model"] = lambda args: model
        with cpu_compat.cuda_literals_on_cpu():
            arguments = ["--use-legacy-static-engine", "--prompts", "hello"]
            refused(UnsupportedError, "StaticInferenceContext", lambda: module["main"](arguments))
    leave()


def leave() -> None:
    dist.barrier()
    parallel_state.destroy_model_parallel()


def main() -> None:
    report = Report()
    cpu_compat.install()
    for layout in sys.argv[2:]:
        check_layout(report, layout, Path(sys.argv[1]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
