"""Static batching on the Megatron-Core of the Python that runs this: decode steps and StaticInferenceEngine. Arguments: layout, version."""

import sys

import megatron.core
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.transformer.enums import AttnBackend

from pikv_ds.megatron_patch import PiKVInferenceContext, cpu_compat, enable_pikv
from tests.dist.jobs.report import Report
from tests.megatron.hosts import inference_wrapper
from tests.megatron.models import start, tiny_config, tiny_model, tokens
from tests.megatron.runs import assert_conserved, decode, dense_is_forbidden
from tests.megatron.static_script import Tokenizer

ROWS, LENGTH = 3, 20


def generated(model, context) -> list[list[int]]:
    with cpu_compat.cuda_literals_on_cpu():
        controller = TextGenerationController(inference_wrapper(model, context), Tokenizer())
        engine = StaticInferenceEngine(controller, legacy=True)
        sampling = SamplingParams(temperature=1.0, top_k=1, num_tokens_to_generate=8)
        prompts = [["hello", "world!!x"], ["be quick", "as it"]][parallel_state.get_data_parallel_rank() % 2]
        return [result.generated_tokens.tolist() for result in engine.generate(prompts=prompts, sampling_params=sampling)]


def main() -> None:
    report = Report()
    cpu_compat.install()
    start(*map(int, sys.argv[1].split(",")))
    model = tiny_model(tiny_config(attention_backend=AttnBackend.local))
    ids = tokens(ROWS, LENGTH, seed=5 + parallel_state.get_data_parallel_rank())
    reference, expected = decode(model, StaticInferenceContext(ROWS, LENGTH), ids, [9]), generated(model, StaticInferenceContext(4, 64))
    with report.check("static batching") as row, dense_is_forbidden():
        assert megatron.core.__version__ == sys.argv[2]
        enable_pikv(model, {"page_size": 4})
        context = PiKVInferenceContext(ROWS, LENGTH, model=model)
        row["difference"] = (decode(model, context, ids, [9]) - reference).abs().max().item()
        assert row["difference"] <= 1e-5, row
        assert_conserved(context, len(model.decoder.layers) * ids.numel())
        assert generated(model, PiKVInferenceContext(4, 64, model=model)) == expected
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
