"""Megatron's DynamicInferenceEngine over install() behind its zmq coordinator, asked by its InferenceClient. Arguments: layouts tp,ep,etp.

From 0.17 on ranks pause before they stop, and are suspended and resumed in between, with requests under way, as megatron/rl does it.
"""

import asyncio
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.inference_client import InferenceClient

from pikv_ds.megatron_patch import cpu_compat
from tests.dist.jobs.report import Report
from tests.megatron import dynamic_script, hosts
from tests.megatron.engines import wrong
from tests.megatron.layouts import each_layout
from tests.megatron.models import tiny_config, tiny_model
from tests.megatron.runs import assert_conserved, installed
from tests.megatron.static_script import Tokenizer

PROMPTS = ["a" * n + "bcd" for n in (3, 90, 11, 25, 7)]
PATIENCE_S = 100


def lengths(i: int) -> int:
    return 4 + 5 * i


async def converse(engine, suspend: bool) -> list[tuple[str, list[int]]] | None:
    """Every rank listens; rank 0 also asks. Returns its prompts with their answers, on the others None."""
    address = await engine.start_listening_to_data_parallel_coordinator(launch_inference_coordinator=True)
    client = None
    if dist.get_rank() == 0:
        client = InferenceClient(address, deserialize=True) if hosts.pauses() else InferenceClient(address)
        started = client.start()
        await (asyncio.sleep(0) if started is None else started)
        asked = [client.add_request(prompt, dynamic_script.sampling(lengths(i))) for i, prompt in enumerate(PROMPTS)]
    if suspend:
        await interrupt(engine, client, asked if client else [])
    answers = None
    if client:
        answers = [(done.prompt, list(done.generated_tokens)) for done in map(hosts.merged, await asyncio.gather(*asked))]
    await stop(engine, client)
    return answers


async def interrupt(engine, client, asked: list) -> None:
    """Pause, suspend and resume with requests under way; all ranks."""
    from megatron.core.inference.engines.dynamic_engine import EngineState

    async def all_get(signal: str, state: str) -> None:
        if client:
            getattr(client, signal)()
        await engine.wait_until(EngineState[state])

    while client and engine.context.step_count < 3:
        await asyncio.sleep(0.001)
    await all_get("pause_engines", "PAUSED")
    assert not client or not all(future.done() for future in asked), "nothing was under way"
    held = engine.context.stats()["kv_bytes_allocated"]
    await all_get("suspend_engines", "SUSPENDED")
    kept = engine.context.stats()["kv_bytes_allocated"]
    if client:  # the others may have been suspended by the time they look
        assert held > 0 and (kept == held if engine.context.kv_cache_management_mode == "persist" else kept == 0), (held, kept)
    await all_get("resume_engines", "RESUMED")
    await all_get("unpause_engines", "RUNNING")


async def stop(engine, client) -> None:
    """The engine's loop ends on all ranks, then the coordinator."""
    if not hosts.pauses():
        if client:
            await client.stop_engines()
            client.stop()
        await engine.engine_loop_task
        return
    from megatron.core.inference.engines.dynamic_engine import EngineState

    if client:
        client.pause_engines()
    await engine.wait_until(EngineState.PAUSED)
    if client:
        client.stop_engines()
    await engine.wait_until(EngineState.STOPPED)
    if client:
        client.shutdown_coordinator()
        client.stop()
    await engine.engine_loop_task


def check(report: Report, name: str, model, get_engine: Callable, *, suspend: bool = False) -> None:
    group = parallel_state.get_expert_model_parallel_group()
    with report.check(name) as row:
        with torch.inference_mode(), installed({"page_size": 4}):
            engine = get_engine()
            idle = count_idle(engine)
            answers = engine._loop.run_until_complete(asyncio.wait_for(converse(engine, suspend), PATIENCE_S))
            row |= {"steps": engine.context.step_count if hosts.pauses() else engine.step_count, "idle": len(idle)}
            row["stats"] = engine.context.stats()
            if not hosts.pauses():
                engine.stop()
        answers = share(answers)
        assert [prompt for prompt, _ in answers] == PROMPTS
        assert [len(tokens) for _, tokens in answers] == [lengths(i) for i in range(len(PROMPTS))]
        asked = {i: Tokenizer().tokenize(prompt) for i, prompt in enumerate(PROMPTS)}
        assert wrong(model, asked, {i: tokens for i, (_, tokens) in enumerate(answers)}, group) == []
        assert_conserved(engine.context)


def count_idle(engine) -> list[int]:
    """Grows by one with every dummy forward."""
    seen, original = [], engine.controller.dummy_forward

    def dummy_forward():
        seen.append(1)
        return original()

    engine.controller.dummy_forward = dummy_forward
    return seen


def share(answers):
    held = [answers]
    dist.broadcast_object_list(held, src=0)
    return held[0]


@cpu_compat.cuda_literals_on_cpu()
def check_layout(report: Report, layout: str) -> None:
    model = tiny_model(tiny_config())
    args = dynamic_script.parse_args([])
    check(report, f"{layout} coordinator and client", model, partial(dynamic_script.get_engine, args, model))
    for mode in ("persist", "recompute") if hosts.pauses() else ():
        engine = partial(dynamic_script.get_engine, args, model, kv_cache_management_mode=mode)
        check(report, f"{layout} suspended, {mode}", model, engine, suspend=True)


if __name__ == "__main__":
    each_layout(check_layout)
