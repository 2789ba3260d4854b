"""Unedited scripts over install(): static and dynamic engines, and everything back afterwards. Arguments: layouts."""

import threading
import time
import warnings
from pathlib import Path
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.transformer.enums import AttnBackend

from pikv_ds.errors import ConfigError, UnsupportedError
from pikv_ds.megatron_patch import (
    PiKVDynamicInferenceContext,
    PiKVInferenceContext,
    cpu_compat,
    disable_pikv,
    drop_in,
    enable_pikv,
    install,
    uninstall,
)
from tests.dist.jobs.report import Report
from tests.megatron import documented, dynamic_script, static_script
from tests.megatron.engines import prompts, serve, wrong
from tests.megatron.layouts import each_layout
from tests.megatron.models import tiny_config, tiny_model, tokens
from tests.megatron.runs import assert_conserved, dense_is_forbidden, full_forward, installed, refused
from tests.megatron.serving import reference_flash_decode

ROOT = Path(__file__).resolve().parents[3]
BLOCK = {"page_size": 4, "storage": {"requests": "auto"}}
ARGUMENTS = ["--use-legacy-static-engine", "--num-tokens-to-generate", "8", "--prompts", "hello", "world!!x", "abcdef"]


def check_static(report: Report, layout: str) -> None:
    engine, expected = static_script.main(ARGUMENTS)
    with report.check(f"{layout} an unedited static script"):
        with installed(BLOCK), dense_is_forbidden():
            engine, results = static_script.main(ARGUMENTS)
            context = engine.controller.inference_wrapped_model.inference_context
            assert type(context) is PiKVInferenceContext
            assert_conserved(context, len(context.layers) * context.columns * 3)
        assert [r.generated_tokens.tolist() for r in results] == [r.generated_tokens.tolist() for r in expected]
    with report.check(f"{layout} a static engine that wants CUDA graphs goes back to the static context"):
        # As tools/run_text_generation_server.py does, which does not pass legacy=True on: the host itself falls back, and says why.
        with installed(BLOCK), dense_is_forbidden(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine, results = static_script.main([a for a in ARGUMENTS if a != "--use-legacy-static-engine"])
            assert isinstance(engine, StaticInferenceEngine) and engine.legacy
            assert type(engine.controller.inference_wrapped_model.inference_context) is PiKVInferenceContext
        assert any("num_cuda_graphs = 1" in str(w.message) and "using legacy static engine" in str(w.message) for w in caught)
        assert [r.generated_tokens.tolist() for r in results] == [r.generated_tokens.tolist() for r in expected]


def check_dynamic(report: Report, layout: str) -> None:
    group = parallel_state.get_expert_model_parallel_group()
    model, args = tiny_model(tiny_config(attention_backend=AttnBackend.local)), dynamic_script.parse_args([])
    rank = parallel_state.get_data_parallel_rank()
    asked = dict(enumerate(prompts([5, 2][rank % 2], seed=31 + rank)))
    classes = [type(module) for module in model.modules()]
    with report.check(f"{layout} an unedited dynamic script") as row:
        with installed(BLOCK):
            engine = dynamic_script.get_engine(args, model)
            assert type(engine.context) is PiKVDynamicInferenceContext and engine.context.memory_buffer.numel() == 0
            served = serve(engine, asked, 5, group)  # without serving(): idle ranks join by themselves
            row["how"] = served.how
            assert_conserved(engine.context)
        assert [type(module) for module in model.modules()] == classes, "uninstall() must disable what install() enabled"
        assert wrong(model, asked, served.answers, group) == []
    with report.check(f"{layout} a dynamic script with the documented lines"):
        text = documented.patched((ROOT / "tests" / "megatron" / "dynamic_script.py").read_text(), documented.diffs("install"))
        script = {"__name__": "dynamic_script"}
        try:
            exec(compile(text, "dynamic_script.py", "exec"), script)
            assert serve(script["get_engine"](args, model), asked, 5, group).answers == served.answers
        finally:
            assert uninstall()
    with report.check(f"{layout} everything is the host's again"):
        with reference_flash_decode():
            engine = dynamic_script.get_engine(args, model)
            assert type(engine.context) is DynamicInferenceContext
            again = serve(engine, asked, 5, group)
        assert again.answers == served.answers
        assert type(StaticInferenceContext(2, 9)) is StaticInferenceContext
    check_edges(report, layout, model, args)


def check_edges(report: Report, layout: str, model, args) -> None:
    with report.check(f"{layout} installed twice, contexts from before, models enabled by hand"):
        before = {(patch.owner, patch.name): getattr(patch.owner, patch.name) for patch in drop_in.patches()}
        dense = dynamic_script.get_inference_context(args, model.config)
        with installed(BLOCK):
            assert not install(BLOCK), "a second install must change nothing"
            refused(ConfigError, "another configuration", lambda: install({"page_size": 8}))
            refused(UnsupportedError, "before install()", lambda: dynamic_script.get_inference_controller(model, dense))
            unbound = dynamic_script.get_inference_context(args, model.config)
            refused(UnsupportedError, "has no model yet", unbound.stats)
            refused(UnsupportedError, "has no model yet", unbound.free)
            enable_pikv(model, {"page_size": 8})
            dynamic_script.get_inference_controller(model, unbound)
            assert unbound.core.page_size == 8, "a model that was enabled by hand keeps its configuration"
            refused(UnsupportedError, "has its model already", lambda: unbound.bind(model))
        assert unbound.has_model and not uninstall()
        full_forward(disable_pikv(model), tokens(1, 5, seed=1))
        assert {(owner, name): getattr(owner, name) for owner, name in before} == before
    with report.check(f"{layout} names that others replace, threads that install"):
        check_names()
    with report.check(f"{layout} a context's class by hand"):
        enable_pikv(model)
        config = mock.Mock(inference_max_requests=3, inference_max_seq_length=40)
        context = PiKVInferenceContext.from_config(config, model=model, pikv={"page_size": 8})
        assert (context.max_batch_size, context.max_sequence_length, context.core.page_size) == (3, 40, 8)
        later = PiKVInferenceContext.from_config(config)
        later.bind(model, {"page_size": 8})
        assert later.core.page_size == 8
        refused(UnsupportedError, "go with model", lambda: PiKVInferenceContext.from_config(config, pikv={"page_size": 8}))
        disable_pikv(model)


def check_names() -> None:
    host = StaticInferenceContext.__init__
    with installed(BLOCK):
        ours = StaticInferenceContext.__init__
        with mock.patch.object(StaticInferenceContext, "__init__", lambda self, *args: ours(self, *args)):
            later = StaticInferenceContext.__init__
            refused(RuntimeError, "StaticInferenceContext.__init__ was replaced again after PiKV replaced it", uninstall)
            assert StaticInferenceContext.__init__ is later, "a refusal must leave names as they are"
    assert StaticInferenceContext.__init__ is host
    made, names = [], drop_in.patches

    def slowly() -> list:
        found = names()
        time.sleep(0.05)
        return found

    with mock.patch.object(drop_in, "patches", slowly):
        threads = [threading.Thread(target=lambda: made.append(install(BLOCK))) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert sorted(made) == [False, False, False, True] and uninstall() and StaticInferenceContext.__init__ is host


@cpu_compat.cuda_literals_on_cpu()
@torch.no_grad()
def check_layout(report: Report, layout: str) -> None:
    check_static(report, layout)
    check_dynamic(report, layout)


if __name__ == "__main__":
    each_layout(check_layout)
