"""MegatronLLM and MegatronAsyncLLM of Megatron-Core >= 0.18 over install(), beside themselves over Megatron's own cache.

Arguments: layouts tp,ep,etp.
"""

import asyncio
from collections.abc import Callable

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.apis import MegatronAsyncLLM, MegatronLLM, SamplingParams

from pikv_ds.megatron_patch import PiKVDynamicInferenceContext, cpu_compat
from tests.dist.jobs.report import Report
from tests.megatron import dynamic_script
from tests.megatron.layouts import each_layout
from tests.megatron.models import tiny_config, tiny_model
from tests.megatron.runs import assert_conserved, installed
from tests.megatron.serving import reference_flash_decode
from tests.megatron.static_script import Tokenizer

PROMPTS = ["a" * n + "bcd" for n in (3, 90, 11, 25, 7)]
MORE = ["the second batch", "of another call"]
SAMPLING = SamplingParams(num_tokens_to_generate=7, top_k=1, termination_id=-1)
BLOCK = {"page_size": 4}
PATIENCE_S = 100

Answers = list[list[int]]


def tokens_of(requests) -> Answers:
    return [list(request.generated_tokens) for request in requests]


def sync_answers(model, look: Callable, *, use_coordinator: bool) -> Answers | None:
    """What a script gets, on ranks that may ask; None on the others. look(context) once all answers are there."""
    given = inference_config(model)
    with MegatronLLM(model=model, tokenizer=Tokenizer(), inference_config=given, use_coordinator=use_coordinator) as llm:
        found = None
        if llm.is_primary_rank:
            found = [tokens_of(llm.generate(PROMPTS, SAMPLING)), tokens_of(llm.generate(MORE[0], SAMPLING))]
            look(llm.context)
    if not llm.is_primary_rank:
        look(llm.context)
    return found and sum(found, [])


async def async_answers(model, look: Callable) -> Answers | None:
    """Two calls at once; then all ranks pause, and go on."""
    given = inference_config(model)
    async with MegatronAsyncLLM(model=model, tokenizer=Tokenizer(), inference_config=given, use_coordinator=True) as llm:
        found = None
        if llm.is_primary_rank:
            several, one = await asyncio.gather(llm.generate(PROMPTS, SAMPLING), llm.generate(MORE[0], SAMPLING))
            found = tokens_of([*several, one])
        await llm.pause()
        await llm.unpause()
        if llm.is_primary_rank:
            found += tokens_of(await llm.generate(MORE, SAMPLING))
            look(llm.context)
    if not llm.is_primary_rank:
        look(llm.context)
    return found


def inference_config(model):
    return dynamic_script.get_inference_config(dynamic_script.parse_args([]), model.config)


def check(report: Report, name: str, answers: Callable) -> None:
    """answers(look): over Megatron's own cache, then over PiKV."""
    seen = []
    with report.check(name) as row:
        with reference_flash_decode():
            expected = answers(lambda context: None)
        with installed(BLOCK):
            found = answers(seen.append)
        (context,) = seen
        row["stats"] = context.stats()
        assert type(context) is PiKVDynamicInferenceContext and context.memory_buffer.numel() == 0
        assert found == expected, (found, expected)
        assert_conserved(context)
        assert row["stats"]["entries_appended"] > 0 or dist.get_rank() > 0


@cpu_compat.cuda_literals_on_cpu()
def check_layout(report: Report, layout: str) -> None:
    model = tiny_model(tiny_config())
    if parallel_state.get_expert_model_parallel_world_size() == 1:  # the host refuses it otherwise
        check(report, f"{layout} MegatronLLM, direct", lambda look: sync_answers(model, look, use_coordinator=False))
    check(report, f"{layout} MegatronLLM, coordinator", lambda look: sync_answers(model, look, use_coordinator=True))
    check(
        report,
        f"{layout} MegatronAsyncLLM, coordinator",
        lambda look: asyncio.run(asyncio.wait_for(async_answers(model, look), PATIENCE_S)),
    )


if __name__ == "__main__":
    each_layout(check_layout)
