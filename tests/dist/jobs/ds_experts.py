"""AutoEP over all ranks: experts and routers' rows change ranks with the entries; beside engines in which all stay. args: a folder."""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds.adapters.deepspeed.autoep import autoep_layers
from pikv_ds.adapters.deepspeed.autoep_shim import registry_shim
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.errors import MigrationError
from tests.dist.jobs.ds_compare import MICRO, assert_same_text, generate, rank_prompt, ready
from tests.dist.jobs.report import Report
from tests.long_form import LONG
from tests.tiny_models import prompt, tiny_model

FAMILY = "qwen3_moe"
OPTIMIZER = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}}
MAPS = {2: (((1,), (1,), (0,), (0,)), ((1,), (0,), (0,), (1,))), 4: (((2,), (0,), (3,), (1,)), ((1,), (3,), (0,), (2,)))}
STEPS, MOVE_AT = 10, 4
DECODES = (("distinct", "lookahead"), ("replicated", "previous_layer")) if LONG else (("distinct", "lookahead"),)
STAGES = (0, 1, 2) if LONG else (1,)
report = Report()
deepspeed.init_distributed()
WORLD, RANK = dist.get_world_size(), dist.get_rank()
EXPERTS = {"expert_parallel": {"enabled": True, "autoep_size": WORLD}}


def block(requests: str = "distinct", **storage) -> dict:
    return {"pikv": {"page_size": 4, "storage": {"requests": requests, "num_shards": 4, **storage}}}


def weights(engine) -> dict[int, list[torch.Tensor]]:
    """Of all experts, by slot."""
    layers = autoep_layers(engine.module)
    own = {
        RANK * layer.num_local_experts + j: [x[j].detach().clone() for each in layers for x in each.experts.parameters()]
        for layer in layers[:1]
        for j in range(layer.num_local_experts)
    }
    everywhere = [None] * WORLD
    dist.all_gather_object(everywhere, own)
    return {slot: tensors for one in everywhere for slot, tensors in one.items()}


@torch.no_grad()
def decoded(engine, ids: torch.Tensor, holders=None, **options) -> tuple[list[torch.Tensor], object]:
    """Logits of every step; shards move before step MOVE_AT."""
    cache, logits = engine.pikv.new_cache(), []
    for step in range(STEPS):
        if holders is not None and step == MOVE_AT:
            assert cache.rebalance(holders, **options)
        logits.append(engine.module(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1])
        ids = logits[-1].argmax(-1, keepdim=True)
    return logits, cache


for requests, source in DECODES:
    with report.check(f"decode {requests} {source}") as row:
        config = {**MICRO, **EXPERTS, **block(requests, expert_ids=source)}
        stays, engine = (ready(pikv_ds.initialize, model=tiny_model(FAMILY), config=config) for _ in range(2))
        ids, home = rank_prompt(requests), weights(engine)
        plain, stayed = decoded(stays, ids)
        for holders in MAPS[WORLD]:
            moved, cache = decoded(engine, ids, holders)
            row["difference"] = max((a - b).abs().max().item() for a, b in zip(plain, moved, strict=True))
            assert row["difference"] <= 1e-5 and all(torch.equal(a.argmax(-1), b.argmax(-1)) for a, b in zip(plain, moved, strict=True))
            slots = [2 * s + i for rank in range(WORLD) for s, (at,) in enumerate(holders) if at == rank for i in (0, 1)]
            now = weights(engine)
            assert all(torch.equal(a, b) for slot, e in enumerate(slots) for a, b in zip(now[slot], home[e], strict=True))
            shards = CacheProbe(stayed.core).loads.sum(0).tolist()
            loads = [sum(load for load, (at,) in zip(shards, holders, strict=True) if at == rank) for rank in range(WORLD)]
            assert cache.stats()["load_per_rank"] == loads, "entries lie with their experts"
            assert cache.stats()["rebalance_experts_moved"] > 0 and cache.stats()["rebalance_expert_bytes"] > 0
            assert engine.pikv.new_cache().core.map.holders == holders, "a cache that begins now lies as the experts do"
            assert_same_text(row, generate(engine.module, ids), FAMILY, ids)
        moved, cache = decoded(engine, ids, MAPS[WORLD][0], bytes_per_step=16384)
        assert max((a - b).abs().max().item() for a, b in zip(plain, moved, strict=True)) <= 1e-5
        assert cache.core.map.holders == MAPS[WORLD][0] and cache.stats()["rebalance_bytes_ahead"] > 0


def trained(stage: int, moves: bool, *, pikv: bool = True):
    config = {**MICRO, **OPTIMIZER, **EXPERTS, "zero_optimization": {"stage": stage}, **(block() if pikv else {})}
    model = tiny_model(FAMILY)
    with registry_shim():
        engine, *_ = (pikv_ds if pikv else deepspeed).initialize(model=model, model_parameters=model.parameters(), config=config)
    losses = []
    for step in range(2):
        losses.append(train_step(engine, step))
        if moves:
            engine.eval()
            decoded(engine, rank_prompt("distinct"), MAPS[WORLD][step])
    return engine, losses


def train_step(engine, step: int, *, between=None) -> float:
    engine.train()
    ids = prompt(24, seed=100 + 10 * step + RANK)
    loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
    engine.backward(loss)
    if between is not None:
        between()
    engine.step()
    return loss.item()


def close(a: list[float], b: list[float]) -> bool:
    return all(abs(x - y) / y <= 1e-5 for x, y in zip(a, b, strict=True))


def gradients_wait() -> None:
    try:
        moves.pikv.rebalance(MAPS[WORLD][0])
    except MigrationError as error:
        assert "gradients wait" in str(error), error
    else:
        raise AssertionError("experts moved away from their gradients")


for stage in STAGES:
    with report.check(f"training zero{stage}") as row:
        stays, expected = trained(stage, moves=False)
        moves, losses = trained(stage, moves=True)
        expected += [train_step(stays, step) for step in (2, 3, 4)]
        losses += [train_step(moves, 2), train_step(moves, 3, between=gradients_wait), train_step(moves, 4)]
        row |= {"losses": losses, "relative": max(abs(x - y) / y for x, y in zip(losses, expected, strict=True))}
        assert close(losses, expected) and len(set(losses)) == 5, (losses, expected)
    if stage == 2:
        continue
    folder = Path(sys.argv[1]) / f"zero{stage}"
    with report.check(f"checkpoint zero{stage}") as row:
        moves.save_checkpoint(str(folder / "moved"))
        host, _ = trained(stage, moves=False, pikv=False)  # DeepSpeed alone
        host.load_checkpoint(str(folder / "moved"))
        after = [train_step(host, step) for step in (5, 6)]
        assert close(after, [train_step(moves, step) for step in (5, 6)]), "the host goes on where the engine with moved experts was"
        stays.save_checkpoint(str(folder / "natural"))
        moves.load_checkpoint(str(folder / "natural"))
        again = [train_step(moves, step) for step in (5, 6)]
        row["again"] = again
        assert close(again, [train_step(stays, step) for step in (5, 6)]), "and the other way round"
        moves.eval()
        stays.eval()
        ids = rank_prompt("distinct")
        a, b = decoded(moves, ids, MAPS[WORLD][0])[0], decoded(stays, ids)[0]
        assert max((x - y).abs().max().item() for x, y in zip(a, b, strict=True)) <= 1e-5

dist.barrier()
dist.destroy_process_group()
