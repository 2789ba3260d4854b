"""Hybrid stacks, whose experts are layers of their own: exact, and entries homed by the MoE layer that follows. Arguments: layouts."""

import contextlib
import warnings

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext

from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.errors import UnsupportedError
from pikv_ds.megatron_patch import PiKVDynamicInferenceContext, PiKVInferenceContext, cpu_compat, disable_pikv, enable_pikv, pikv_layer_spec
from pikv_ds.megatron_patch.layers import find_layers
from pikv_ds.megatron_patch.subclass import is_pikv
from tests.dist.jobs.report import Report
from tests.long_form import LONG
from tests.megatron.hybrid import hybrid_model, hybrid_spec
from tests.megatron.jobs.dynamic import options, own_requests, worst_difference
from tests.megatron.layouts import each_layout
from tests.megatron.models import tokens
from tests.megatron.runs import assert_conserved, decode, dense_is_forbidden, refused
from tests.megatron.serving import serve

ROWS, LENGTH = 3, 20
SOURCES = ("previous_layer", "true", "lookahead")
PATTERNS = {  # the MoE layer that homes each attention layer's entries, by its place in the stack; None: no MoE layer follows
    "*E*E": [1, 3],
    "E*-E*EE": [3, 5],
    "*E**E*": [1, None, 4, None],
}
SHORT = ["*E**E*"]


@contextlib.contextmanager
def warned(*words: str):
    """Exactly one warning of PiKV's, with these words; without words, none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    own = [str(w.message) for w in caught if "pikv" in str(w.message)]
    assert len(own) == bool(words) and all(word in own[0] for word in words), own


def warning_of(homes: list, source: str) -> tuple[str, ...]:
    if None not in homes:
        return ()
    where = (
        "by the router of the nearest earlier layer that has one, else by position" if source == "previous_layer" else "homed by position"
    )
    return "attention of layers 3, 6 before", where


def check_pattern(report: Report, layout: str, pattern: str, ids: torch.Tensor) -> None:
    model, homes = hybrid_model(pattern), PATTERNS[pattern]
    reference = decode(model, StaticInferenceContext(ROWS, LENGTH), ids, [9])
    for source in SOURCES if LONG else SOURCES[:2]:
        with report.check(f"{layout} {pattern}, ids {source}") as row:
            assert [layer.moe for layer in find_layers(model)] == [None if at is None else model.decoder.layers[at].mlp for at in homes]
            chosen = watch(model)
            enable_pikv(model, {"page_size": 4, "storage": {"expert_ids": source, "num_shards": 8, "capacity_tokens": 1000}})
            with warned(*warning_of(homes, source)):
                context = PiKVInferenceContext(ROWS, LENGTH, model=model)
            with dense_is_forbidden():
                logits = decode(model, context, ids, [9])
            row["difference"] = (logits - reference).abs().max().item()
            assert row["difference"] <= 1e-5, row
            assert_conserved(context, len(homes) * ids.numel())
            if source != "lookahead":
                check_homes(context, homes, chosen, source)
            disable_pikv(model)


def watch(model) -> dict[int, list[torch.Tensor]]:
    """By place in the stack: experts [ROWS, columns] that each call of a router chose."""
    chosen: dict[int, list[torch.Tensor]] = {}
    for i, layer in enumerate(model.decoder.layers):
        if hasattr(layer.mlp, "router"):
            taken = chosen[i] = []
            layer.mlp.router.register_forward_hook(lambda _m, _a, out, taken=taken: taken.append(out[0].argmax(-1).view(-1, ROWS).T))
    return chosen


def check_homes(context, homes: list, chosen: dict, source: str) -> None:
    """With a shard per expert every entry lies in the shard of the expert that the router named, token by token."""
    probe, earlier = CacheProbe(context.core), None
    for i, at in enumerate(homes):
        named = at if source == "true" else earlier
        expected = torch.arange(LENGTH).expand(ROWS, -1) % 8 if named is None else torch.cat(chosen[named], 1)
        held = probe.homes(i)
        own = held.view(-1, ROWS, held.shape[1])[dist.get_rank() % (held.shape[0] // ROWS), :, :LENGTH]
        assert torch.equal(own, expected), f"attention {i}"
        earlier = earlier if at is None else at


def check_specification(report: Report, layout: str, ids: torch.Tensor) -> None:
    with report.check(f"{layout} a model built from the specification of a stack"):
        model, untouched = hybrid_model("*E*E"), repr(hybrid_spec())
        reference = decode(model, StaticInferenceContext(ROWS, LENGTH), ids, [9])
        spec = hybrid_spec()
        built = hybrid_model("*E*E", pikv_layer_spec(spec, {"page_size": 4, "storage": {"expert_ids": "true"}}))
        assert type(spec)(**vars(spec)).submodules is spec.submodules and len(repr(spec)) == len(untouched), "the given spec was changed"
        assert list(built.state_dict()) == list(model.state_dict()) and all(is_pikv(layer.router) for layer in find_layers(built))
        with dense_is_forbidden():
            logits = decode(built, PiKVInferenceContext(ROWS, LENGTH, model=built), ids, [9])
        assert (logits - reference).abs().max() <= 1e-5
    with report.check(f"{layout} attention enabled without the router that homes it"):
        spec = hybrid_spec()
        spec.submodules.attention_layer = pikv_layer_spec(spec.submodules.attention_layer)
        half = hybrid_model("*E*E", spec)
        refused(UnsupportedError, "but not the router (TopKRouter)", lambda: PiKVInferenceContext(ROWS, LENGTH, model=half))
        PiKVInferenceContext(ROWS, LENGTH, model=half, config={"storage": {"expert_ids": "hash"}})


def check_dynamic(report: Report, layout: str) -> None:
    with report.check(f"{layout} dynamic batching") as row, cpu_compat.cuda_literals_on_cpu():
        model, own = hybrid_model("*E*E"), own_requests(6, 40, seed=3)
        enable_pikv(model, {"page_size": 4, "storage": {"expert_ids": "true"}})
        context = PiKVDynamicInferenceContext(model=model, **options(model.config, 30, 6))
        with context.serving():
            serve(model, context, own, group=context.core.exchange.group)
        disable_pikv(model)
        row["difference"] = worst_difference(model, own)
        assert row["difference"] <= 1e-5, row


def check_layout(report: Report, layout: str) -> None:
    ids = tokens(ROWS, LENGTH, seed=5 + parallel_state.get_data_parallel_rank())
    for pattern in PATTERNS if LONG else SHORT:
        check_pattern(report, layout, pattern, ids)
    check_specification(report, layout, ids)
    if LONG:
        check_dynamic(report, layout)


if __name__ == "__main__":
    each_layout(check_layout)
