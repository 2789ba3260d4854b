"""Megatron's own DynamicInferenceEngine over PiKV, beside the same engine over Megatron's cache. Arguments: layouts tp,ep,etp."""

from megatron.core import parallel_state

from pikv_ds.megatron_patch import PiKVDynamicInferenceContext, cpu_compat, disable_pikv, enable_pikv
from tests.dist.jobs.report import Report
from tests.megatron import dynamic_script
from tests.megatron.engines import prompts, serve, wrong
from tests.megatron.layouts import each_layout
from tests.megatron.models import latent_config, tiny_config, tiny_model
from tests.megatron.runs import assert_conserved
from tests.megatron.serving import reference_flash_decode

TOKENS = 6
BLOCK = {"page_size": 4}


def own_requests(seed: int) -> dict[int, list[int]]:
    """Uneven shares: the second data-parallel rank is done long before the first. Tensor-parallel peers have the same."""
    count = [6, 2][parallel_state.get_data_parallel_rank() % 2]
    return dict(enumerate(prompts(count, seed=seed + parallel_state.get_data_parallel_rank())))


def pikv_engine(model, argv: list[str]):
    """The script's engine, its DynamicInferenceContext replaced by hand."""
    script = {name: getattr(dynamic_script, name) for name in ("parse_args", "get_engine")}
    original = dynamic_script.DynamicInferenceContext
    dynamic_script.DynamicInferenceContext = lambda *args, **options: PiKVDynamicInferenceContext(
        *args, model=model, config=BLOCK, **options
    )
    try:
        return script["get_engine"](script["parse_args"](argv), model)
    finally:
        dynamic_script.DynamicInferenceContext = original


@cpu_compat.cuda_literals_on_cpu()
def check_layout(report: Report, layout: str) -> None:
    group = parallel_state.get_expert_model_parallel_group()
    model, asked = tiny_model(tiny_config()), own_requests(seed=7)
    argv = ["--return-log-probs"]
    args = dynamic_script.parse_args(argv)
    with report.check(f"{layout} Megatron's own cache") as row, reference_flash_decode():
        dense = serve(dynamic_script.get_engine(args, model), asked, TOKENS, group, args)
        row["how"] = dense.how
        assert wrong(model, asked, dense.answers, group) == []
    with report.check(f"{layout} chunked prefill, idle ranks") as row:
        enable_pikv(model)
        engine = pikv_engine(model, argv)
        with engine.context.serving():
            served = serve(engine, asked, TOKENS, group, args)
        row |= {"how": served.how, "stats": engine.context.stats()}
        assert engine.context.memory_buffer.numel() == 0
        assert served.answers == dense.answers, (served.answers, dense.answers)
        assert served.how == dense.how, "the engine took other steps than over Megatron's own cache"
        row["difference"] = max(abs(a - b) for n in asked for a, b in zip(served.log_probs[n], dense.log_probs[n], strict=True))
        assert row["difference"] <= 1e-4, row
        assert_conserved(engine.context)
        disable_pikv(model)
        assert wrong(model, asked, served.answers, group) == []
    with report.check(
        f"{layout} multi-latent attention"
    ) as row:  # Megatron's own needs a kernel for it: only a full forward to compare with
        model = enable_pikv(tiny_model(latent_config()))
        engine = pikv_engine(model, [])
        with engine.context.serving():
            served = serve(engine, asked, TOKENS, group)
        row["how"] = served.how
        disable_pikv(model)
        assert wrong(model, asked, served.answers, group) == []


if __name__ == "__main__":
    each_layout(check_layout)
