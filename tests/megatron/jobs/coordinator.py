"""Megatron's DynamicInferenceEngine behind its zmq coordinator, asked by its InferenceClient. Arguments: layouts tp,ep,etp."""

import asyncio

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.inference_client import InferenceClient

from pikv_ds.megatron_patch import cpu_compat, disable_pikv, enable_pikv
from tests.dist.jobs.report import Report
from tests.megatron import dynamic_script
from tests.megatron.engines import wrong
from tests.megatron.jobs.dynamic_engine import pikv_engine
from tests.megatron.layouts import each_layout
from tests.megatron.models import tiny_config, tiny_model
from tests.megatron.runs import assert_conserved
from tests.megatron.static_script import Tokenizer

PROMPTS = ["a" * n + "bcd" for n in (3, 90, 11, 25, 7)]
PATIENCE_S = 100


async def converse(engine) -> list[tuple[str, list[int]]] | None:
    """Every rank listens; rank 0 also asks. Returns its prompts with their answers, on the others None."""
    address = await engine.start_listening_to_data_parallel_coordinator(launch_inference_coordinator=True)
    answers = None
    if dist.get_rank() == 0:
        client = InferenceClient(address)
        await client.start()
        asked = [client.add_request(prompt, dynamic_script.sampling(4 + 5 * i)) for i, prompt in enumerate(PROMPTS)]
        records = await asyncio.gather(*asked)
        answers = [(record.merge().prompt, list(record.merge().generated_tokens)) for record in records]
        await client.stop_engines()
        client.stop()
    await engine.engine_loop_task
    return answers


@cpu_compat.cuda_literals_on_cpu()
def check_layout(report: Report, layout: str) -> None:
    group = parallel_state.get_expert_model_parallel_group()
    model = enable_pikv(tiny_model(tiny_config()))
    with report.check(f"{layout} coordinator and client") as row:
        with torch.inference_mode():
            engine = pikv_engine(model, [])
            idle = count_idle(engine)
            with engine.context.serving():
                answers = engine._loop.run_until_complete(asyncio.wait_for(converse(engine), PATIENCE_S))
        row |= {"steps": engine.step_count, "idle": len(idle), "stats": engine.context.stats()}
        engine.stop()
        disable_pikv(model)
        answers = share(answers)
        assert [prompt for prompt, _ in answers] == PROMPTS
        assert [len(tokens) for _, tokens in answers] == [4 + 5 * i for i in range(len(PROMPTS))]
        asked = {i: Tokenizer().tokenize(prompt) for i, prompt in enumerate(PROMPTS)}
        assert wrong(model, asked, {i: tokens for i, (_, tokens) in enumerate(answers)}, group) == []
        assert_conserved(engine.context)


def count_idle(engine) -> list[int]:
    """Grows by one with every dummy forward."""
    seen, original = [], engine.controller.dummy_forward

    def dummy_forward():
        seen.append(engine.step_count)
        return original()

    engine.controller.dummy_forward = dummy_forward
    return seen


def share(answers):
    held = [answers]
    dist.broadcast_object_list(held, src=0)
    return held[0]


if __name__ == "__main__":
    each_layout(check_layout)
