"""The user's script and StaticInferenceEngine, before and after the lines of docs/guide/megatron.md. Arguments: module folder, layouts."""

import sys
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state

from pikv_ds.errors import UnsupportedError
from pikv_ds.megatron_patch import PiKVInferenceContext, cpu_compat
from tests.dist.jobs.report import Report
from tests.megatron import documented, hosts
from tests.megatron.layouts import each_layout
from tests.megatron.runs import assert_conserved, dense_is_forbidden, refused

ROOT = Path(__file__).resolve().parents[3]
STEPS = 12


def as_of_0_16(script: str) -> str:
    """The script as Megatron-LM's are at core_v0.16.1, which take the context's limits from the wrapper's configuration."""
    old = "StaticInferenceContext(\n        args.inference_max_requests, args.inference_max_seq_length\n    )"
    assert script.count(old) == 1
    script = script.replace(old, "StaticInferenceContext.from_config(inference_wrapper_config)")
    return script.replace("    wrapper_config = ", "    wrapper_config = inference_wrapper_config = ")


def run(script: str, *arguments: str, part: int | None = None):
    """Tokens and log-probabilities per prompt, and the engine; ranks of one tensor-parallel group have the same prompts."""
    dp_rank = parallel_state.get_data_parallel_rank() if part is None else part
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
    script = (ROOT / "tests" / "megatron" / "static_script.py").read_text()
    spec = documented.code("\nspec = ")
    texts = {
        "in place": documented.patched(script, documented.diffs("constructor")),
    }
    if not hosts.takes_configs():  # from 0.17 on there is no such configuration
        texts["from_config"] = documented.patched(as_of_0_16(script), documented.diffs("from_config"))
    texts["--spec"] = "".join(line for line in texts["in place"].splitlines(keepends=True) if "enable_pikv(model" not in line)
    expected, expected_log_probs, _ = run(script)
    assert [len(tokens) for tokens in expected] == [STEPS] * 3
    for name, text in texts.items():
        arguments = ("--spec", "my_spec", "spec") if name == "--spec" else ()
        with report.check(f"{layout} StaticInferenceEngine, {name}") as row:
            if arguments:
                (folder / f"rank{report.rank}").mkdir(exist_ok=True)
                (folder / f"rank{report.rank}" / "my_spec.py").write_text(spec)
                sys.path.insert(0, str(folder / f"rank{report.rank}"))
            with dense_is_forbidden():
                tokens, log_probs, engine = run(text, *arguments)
            context = engine.controller.inference_wrapped_model.inference_context
            assert isinstance(context, PiKVInferenceContext)
            row["difference"] = max((a - b).abs().max().item() for a, b in zip(log_probs, expected_log_probs, strict=True))
            assert tokens == expected, (tokens, expected)
            assert row["difference"] <= 1e-5, row
            assert_conserved(context, len(context.layers) * context.columns * 3)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1 and parallel_state.get_data_parallel_world_size() > 1:
        check_equal_requests(report, layout, script, texts["in place"])
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:  # the first stage refuses, the next waits for its hidden states
        return
    with report.check(f"{layout} an engine that replaces the context is refused"):
        model = engine.controller.inference_wrapped_model.model
        module = {"__name__": "static_script"}
        exec(compile(script, "static_script.py", "exec"), module)
        module["get_model"] = lambda args: model
        with cpu_compat.cuda_literals_on_cpu():
            arguments = ["--use-legacy-static-engine", "--prompts", "hello"]
            refused(UnsupportedError, "StaticInferenceContext", lambda: module["main"](arguments))


def check_equal_requests(report: Report, layout: str, script: str, text: str) -> None:
    """The same prompts on all ranks: the first stage sees it, later ones are told, or store them once per rank."""
    expected, _, _ = run(script, part=0)
    with report.check(f"{layout} equal requests") as row:
        for requests in ("auto", "replicated"):
            tokens, _, engine = run(text.replace('"auto"', f'"{requests}"'), part=0)
            assert tokens == expected
            row[requests] = engine.controller.inference_wrapped_model.inference_context.stats()["requests"]
        first = parallel_state.is_pipeline_first_stage()
        assert (row["auto"], row["replicated"]) == ("replicated" if first else "distinct", "replicated"), row


if __name__ == "__main__":
    each_layout(partial(check_layout, folder=Path(sys.argv[1])), sys.argv[2:])
