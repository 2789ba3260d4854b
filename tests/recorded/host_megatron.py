"""Megatron-Core on CPU: a static context fed in pieces, or a dynamic one that serves requests which come and go."""

import torch
from megatron.core import parallel_state

from pikv_ds.megatron_patch import PiKVDynamicInferenceContext, PiKVInferenceContext, cpu_compat, enable_pikv
from tests.megatron.jobs.dynamic import LONGEST, options
from tests.megatron.models import latent_config, start, tiny_config, tiny_model, tokens
from tests.megatron.runs import decode, dense_is_forbidden
from tests.megatron.serving import random_requests, serve
from tests.recorded import probe
from tests.recorded.result import Result

ROWS, LENGTH = 3, 32


def run(config: dict, feed: dict, group, folder) -> Result:
    """feed: layout, (tp, ep, etp); latent, with multi-latent attention; pieces of the prompt, or dynamic: arguments of serve()."""
    cpu_compat.install()
    start(*feed["layout"])
    try:
        model = tiny_model(latent_config() if feed.get("latent") else tiny_config(), max_sequence_length=LONGEST + 20)
        enable_pikv(model)
        with dense_is_forbidden():
            return (_dynamic if "dynamic" in feed else _static)(model, config, feed)
    finally:
        parallel_state.destroy_model_parallel()
        cpu_compat.uninstall()


def _static(model, config: dict, feed: dict) -> Result:
    own = parallel_state.get_data_parallel_rank() if config.get("storage", {}).get("requests") == "distinct" else 0
    context = PiKVInferenceContext(ROWS, LENGTH, model=model, config=config)
    first, second = feed["pieces"]  # ranks bring other numbers of columns, in as many forwards
    logits = decode(model, context, tokens(ROWS, LENGTH, seed=5 + own), [first + own, second - own])
    return _result(context, probe.kept(probe.core_of(context)), [logits], logits.argmax(-1).T.tolist())


def _dynamic(model, config: dict, feed: dict) -> Result:
    """Kept is what is stored in the middle of the run: at its end there are no requests."""
    requests = random_requests(6, 60, seed=11 + parallel_state.get_data_parallel_rank())
    held: list[dict] = []
    with cpu_compat.cuda_literals_on_cpu():
        context = PiKVDynamicInferenceContext(model=model, config=config, **options(model.config, blocks=20, paused=6))
        core = probe.core_of(context)
        watch = lambda: held.append(probe.kept(core))  # noqa: E731
        with context.serving():
            serve(model, context, requests, group=probe.group_of(core), each_step=watch, **feed["dynamic"])
    outputs = [torch.stack(request.logits) for request in requests]
    return _result(context, held[len(held) // 2], outputs, [request.generated for request in requests])


def _result(context, kept: dict, outputs: list[torch.Tensor], generated: list) -> Result:
    numbers = probe.numbers(context)
    context.free()
    after = probe.bytes_after_reset(probe.core_of(context))
    return Result(outputs=outputs, tokens=generated, kept=kept, numbers=numbers, bytes_after_reset=after)
