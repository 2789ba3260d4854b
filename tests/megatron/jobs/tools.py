"""get_dynamic_inference_engine of a checkout of Megatron-LM over install(), used as its tools and megatron/rl use it.

PYTHONPATH has megatron/inference and megatron/training of the checkout; megatron.core is the installed one. Arguments: layouts tp,ep,etp.
"""

import argparse
from unittest import mock

import megatron.inference.utils as megatron_lm
import torch
from megatron.core import parallel_state
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.transformer import enums
from megatron.training.arguments import add_megatron_arguments

from pikv_ds.megatron_patch import PiKVDynamicInferenceContext, cpu_compat
from tests.dist.jobs.report import Report
from tests.megatron.engines import prompts, wrong
from tests.megatron.jobs.coordinator import check
from tests.megatron.layouts import each_layout
from tests.megatron.models import tiny_config, tiny_model
from tests.megatron.runs import installed
from tests.megatron.serving import reference_flash_decode
from tests.megatron.static_script import Tokenizer

ARGUMENTS = "--inference-max-seq-length 160 --inference-dynamic-batching-buffer-size-gb 0.02 --inference-dynamic-batching-max-requests 8"


def arguments(*more: str) -> argparse.Namespace:
    """What a tool is given, and the defaults of all that it is not."""
    parser = megatron_lm.add_inference_args(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    args = parser.parse_args([*ARGUMENTS.split(), *more])
    if hasattr(enums, "InferenceCudaGraphScope"):
        args.inference_cuda_graph_scope = enums.InferenceCudaGraphScope.none  # of cuda_graph_impl "none", once arguments are validated
    return args


def get_engine(model, *more: str):
    args = arguments(*more)
    with (
        mock.patch.object(megatron_lm, "get_args", lambda: args),
        mock.patch.object(megatron_lm, "build_tokenizer", lambda args: Tokenizer()),
    ):
        return megatron_lm.get_dynamic_inference_engine(model=model)


@torch.inference_mode()
def performance_test(model, asked: list[list[int]]) -> tuple[list[list[int]], object]:
    """tools/run_inference_performance_test.py --engine-type dynamic: a warm-up, then all prompts at once; every rank has the same."""
    engine = get_engine(model)
    engine.generate(prompts=["warmup"], sampling_params=SamplingParams(num_tokens_to_generate=10, termination_id=-1))
    sampling = SamplingParams(top_k=1, num_tokens_to_generate=6, termination_id=-1)
    sampling.add_attributes({"no_early_termination": True})
    records = engine.generate(prompts=asked, sampling_params=sampling)
    return [list(record.merge().generated_tokens) for record in records], engine.context


@cpu_compat.cuda_literals_on_cpu()
def check_layout(report: Report, layout: str) -> None:
    group, model, asked = parallel_state.get_expert_model_parallel_group(), tiny_model(tiny_config()), prompts(5, seed=3)
    with report.check(f"{layout} run_inference_performance_test"):
        with reference_flash_decode():
            expected, _ = performance_test(model, asked)
        with installed({"page_size": 4}):
            found, context = performance_test(model, asked)
        assert type(context) is PiKVDynamicInferenceContext and context.stats()["entries_appended"] > 0
        assert found == expected and wrong(model, dict(enumerate(asked)), dict(enumerate(found)), group) == []
    check(report, f"{layout} run_dynamic_text_generation_server", model, lambda: get_engine(model, "--return-log-probs"))
    check(report, f"{layout} megatron/rl", model, lambda: get_engine(model, "--return-log-probs", "--skip-prompt-log-probs"), suspend=True)


if __name__ == "__main__":
    each_layout(check_layout)
