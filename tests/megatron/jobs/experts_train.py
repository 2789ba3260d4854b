"""Training goes on after experts have changed ranks, and dist checkpoints know experts by their numbers. Arguments: folder, layouts."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from pikv_ds.errors import MigrationError, UnsupportedError
from pikv_ds.megatron_patch import PiKVInferenceContext, enable_pikv
from pikv_ds.megatron_patch.checkpoint import load_checkpoint, save_checkpoint
from pikv_ds.megatron_patch.cpu_compat import cuda_literals_on_cpu
from tests.dist.jobs.report import Report
from tests.megatron.jobs.experts_move import LENGTH, MAPS, equal, generation, of_all, weights_of_experts
from tests.megatron.layouts import each_layout
from tests.megatron.megatron_lm import queue_from_a_fork
from tests.megatron.models import positions, tiny_config, tiny_model, tokens
from tests.megatron.runs import full_forward, refused

BLOCK = {"storage": {"requests": "distinct", "num_shards": 4}, "page_size": 4}
# With a load-balancing bias and an auxiliary loss, which sum over experts in the order of their slots.
CHANGES = dict(
    moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=1e-2, moe_router_enable_expert_bias=True,
    moe_router_score_function="sigmoid",
)  # fmt: skip


class Training:
    """Megatron's DDP and Adam around a model."""

    def __init__(self, model, *, distributed: bool = False) -> None:
        with cuda_literals_on_cpu():
            self.model = DistributedDataParallel(model.config, DistributedDataParallelConfig(use_distributed_optimizer=distributed), model)
            self.optimizer = get_megatron_optimizer(
                OptimizerConfig(optimizer="adam", lr=1e-2, weight_decay=0.01, clip_grad=1.0, use_distributed_optimizer=distributed),
                [self.model],
            )

    def steps(self, ids: torch.Tensor, count: int) -> list[float]:
        losses = []
        with cuda_literals_on_cpu():
            self.model.train()
            for _ in range(count):
                self.model.zero_grad_buffer()
                self.optimizer.zero_grad()
                loss = self.model(ids, positions(ids), None, labels=ids.roll(-1, 1)).mean()
                loss.backward()
                finalize_model_grads([self.model])
                assert self.optimizer.step()[0]
                losses.append(loss.item())
            self.model.eval()
        return losses

    def state(self) -> dict:
        """Sharded, of the model and its optimizer."""
        with cuda_literals_on_cpu():
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            state = self.model.module.sharded_state_dict(metadata={"dp_cp_group": group})
            return {"model": state, "optimizer": self.optimizer.sharded_state_dict(state, is_loading=True)}

    def load(self, folder: Path) -> None:
        with cuda_literals_on_cpu():
            state = dist_checkpointing.load(self.state(), str(folder))
            self.model.module.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])

    def moments(self) -> dict:
        """Adam's, of experts by number and of routers' rows by number; of this rank."""
        inner = {id(p): s for one in self.optimizer.chained_optimizers for p, s in one.optimizer.state.items()}
        found: dict = {}
        size = parallel_state.get_expert_model_parallel_world_size()
        rank = dist.get_rank(parallel_state.get_expert_model_parallel_group())
        for i, layer in enumerate(self.model.module.decoder.layers):
            router, experts = layer.mlp.router, layer.mlp.experts.local_experts
            order = list(range(size * len(experts)))
            slots = order if getattr(router, "pikv_slots", None) is None else router.pikv_slots.tolist()
            found[f"router {i}"] = {key: x[slots] for key, x in inner[id(router.weight)].items() if x.dim()}
            found[f"router {i}"] |= {"bias": router.expert_bias[slots].clone(), "weight": router.weight.detach()[slots].clone()}
            for j, expert in enumerate(experts):
                number = getattr(expert, "pikv_expert", rank * len(experts) + j)
                for name, parameter in expert.named_parameters():
                    found[f"expert {number} {i} {name}"] = dict(inner[id(parameter)])
        return found


def built() -> torch.nn.Module:
    return tiny_model(tiny_config(**CHANGES))


def check_training(report: Report, layout: str, ids: torch.Tensor, holders) -> None:
    with report.check(f"{layout} losses") as row:
        stays = Training(enable_pikv(built(), BLOCK))
        expected = stays.steps(ids, 6)
        moves = Training(enable_pikv(built(), BLOCK))
        losses = moves.steps(ids, 2)
        before, weights = of_all(moves.moments()), of_all(weights_of_experts(moves.model.module))
        context = PiKVInferenceContext(2, LENGTH, model=moves.model)
        refused(MigrationError, "rebalance(optimizer=...)", lambda: context.rebalance(holders))
        generated, context = generation(moves.model, ids, {3: holders}, optimizer=moves.optimizer)
        assert equal(of_all(moves.moments()), before) and equal(of_all(weights_of_experts(moves.model.module)), weights)
        losses += moves.steps(ids, 2)
        again, context = generation(moves.model, ids, {5: MAPS[context.core.exchange.size]["blocks"]})  # the optimizer is remembered
        assert context.stats()["rebalance_expert_bytes"] > 0
        losses += moves.steps(ids, 2)
        row["relative"] = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
        assert row["relative"] <= 1e-5 and losses[-1] < losses[0], (losses, expected)
    with report.check(f"{layout} distributed optimizer"):
        sharded = Training(enable_pikv(built(), BLOCK), distributed=True)
        context = PiKVInferenceContext(2, LENGTH, model=sharded.model)
        words = "DistributedOptimizer has the state of experts and routers in pieces"
        refused(UnsupportedError, words, lambda: context.rebalance(holders, optimizer=sharded.optimizer))
        assert context.rebalance(holders, experts=False)


def check_checkpoints(report: Report, layout: str, ids: torch.Tensor, holders, folder: Path) -> None:
    """The host alone loads what a model with moved experts has saved, and the other way round, with the optimizer's state."""
    queue_from_a_fork()
    moved, natural = Training(enable_pikv(built(), BLOCK)), Training(built())
    moved.steps(ids, 2)
    context = PiKVInferenceContext(2, LENGTH, model=moved.model)
    assert context.rebalance(holders, optimizer=moved.optimizer)
    for folder_of in (folder / "moved", folder / "natural"):
        if dist.get_rank() == 0:
            folder_of.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    with report.check(f"{layout} saved moved, loaded by the host"):
        with cuda_literals_on_cpu():
            dist_checkpointing.save(moved.state(), str(folder / "moved"))
        natural.load(folder / "moved")
        assert equal(of_all(natural.moments()), of_all(moved.moments()))
        assert equal(of_all(weights_of_experts(natural.model.module)), of_all(weights_of_experts(moved.model.module)))
        assert (full_forward(natural.model.module, ids) - full_forward(moved.model.module, ids)).abs().max() <= 1e-5
    with report.check(f"{layout} saved by the host, loaded moved"):
        natural.steps(ids, 1)
        assert not equal(of_all(natural.moments()), of_all(moved.moments()))
        with cuda_literals_on_cpu():
            dist_checkpointing.save(natural.state(), str(folder / "natural"))
        moved.load(folder / "natural")
        assert equal(of_all(natural.moments()), of_all(moved.moments()))
        assert equal(of_all(weights_of_experts(natural.model.module)), of_all(weights_of_experts(moved.model.module)))
        losses = natural.steps(ids, 2), moved.steps(ids, 2)
        assert all(abs(a - b) / a <= 1e-5 for a, b in zip(*losses, strict=True)), losses
    with report.check(f"{layout} one key for each expert"):
        metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True), "singleton_local_shards": True}
        names = [
            (value.key, int(name.split("local_experts.")[1].split(".")[0]))
            for name, value in moved.model.module.sharded_state_dict(metadata=metadata).items()
            if "local_experts." in name and hasattr(value, "key")
        ]
        first = moved.model.module.decoder.layers[0].mlp.experts.pikv_first
        slots = context.core.migration.along[0].expert_of_slot
        assert names and all(f".experts.{slots[first + j]}." in key for key, j in names), (names, slots)
    with report.check(f"{layout} weights alone"):
        save_checkpoint(moved.model.module, folder / "weights")
        fresh = built()
        load_checkpoint(fresh, folder / "weights")
        assert equal(of_all(weights_of_experts(fresh)), of_all(weights_of_experts(moved.model.module)))
        assert (full_forward(fresh, ids) - full_forward(moved.model.module, ids)).abs().max() <= 1e-5


def check_layout(report: Report, layout: str, folder: Path) -> None:
    ids = tokens(2, LENGTH, 5 + parallel_state.get_data_parallel_rank())
    holders = MAPS[parallel_state.get_expert_model_parallel_world_size()]["mixed"]
    check_training(report, layout, ids, holders)
    check_checkpoints(report, layout, ids, holders, folder / layout)


if __name__ == "__main__":
    each_layout(lambda report, layout: check_layout(report, layout, Path(sys.argv[1])), sys.argv[2:])
