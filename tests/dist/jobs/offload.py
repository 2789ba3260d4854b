"""Pages in tiers over several ranks, beside the same ranks without tiers: the same answers, whichever rank has which pages below."""

import torch
import torch.distributed as dist

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.stats import stats
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.spec import LayerSpec
from pikv_ds.step.step import LocalStep
from tests.dist.jobs.report import Report
from tests.harness.offloading import tiers

HEADS, KV_HEADS, DIM, EXPERTS = 4, 2, 16, 8
LAYERS = [LayerSpec(layer_idx=i, num_kv_heads=KV_HEADS, k_dim=DIM, v_dim=DIM, window=20 if i == 1 else None) for i in range(3)]
STEPS = [10] * 9 + [1] * 6 + [7] + [1] * 3


class Side:
    def __init__(self, requests: str, rows: list[int], routing: dict, offload: dict) -> None:
        block = {"page_size": 4, "routing": routing, "offload": offload, "storage": {"num_shards": 4, "requests": requests}}
        config, device = PiKVConfig(**block), torch.device("cpu")
        self.cache = PiKVCache(LAYERS, config, num_experts=EXPERTS, dtype=torch.float32, device=device, group=GROUP)
        self.rows, self.len, self.forwards = rows, 0, 0

    def forward(self, columns: int) -> list[torch.Tensor]:
        count, fresh = len(self.rows), self.forwards == 0
        positions = (self.len + torch.arange(columns)).expand(count, -1)
        self.cache.begin_step(
            LocalStep(
                num_rows=count, num_columns=columns, num_new=[columns] * count, parent=[-1] * count if fresh else list(range(count)),
                keep=[self.len] * count, positions=positions.to(torch.int32), digest=self.forwards, identity=not fresh, fresh=fresh,
            )
        )  # fmt: skip
        outs = []
        for layer in range(len(LAYERS)):
            made = []
            for row in self.rows:
                generator = torch.Generator().manual_seed(1000 * row + 10 * self.forwards + layer)
                made.append([torch.randn(columns, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)])
                made[-1].append(torch.randint(EXPERTS, (columns,), generator=generator))
            q, k, v, ids = (torch.stack(side) for side in zip(*made, strict=True))
            outs.append(self.cache.attend(layer, q, k, v, scale=0.25, v_dim=DIM, expert_ids=ids.flatten()).out)
        self.cache.end_step()
        self.len, self.forwards = self.len + columns, self.forwards + 1
        return outs


dist.init_process_group("gloo")
report = Report()
GROUP = dist.group.WORLD
rank, size = dist.get_rank(), dist.get_world_size()
ROUTING = {"all": {"method": "all"}, "bounds": {"method": "bounds", "budget_pages": 10, "sink_tokens": 4, "recent_tokens": 8}}
for name, routing in ROUTING.items():
    for requests in ("replicated", "distinct"):
        with report.check(f"{name} {requests}") as row:
            rows = [0, 1] if requests == "replicated" else [rank]
            plain, tiered = Side(requests, rows, routing, {}), Side(requests, rows, routing, tiers(LAYERS, 26, 8))
            for columns in STEPS:
                for want, got in zip(plain.forward(columns), tiered.forward(columns), strict=True):
                    assert (want - got).abs().max() < 2e-6
            numbers = stats(tiered.cache, 1, tiered.len)
            row |= {name: value for name, value in numbers.items() if name.startswith("offload_")}
            assert numbers["offload_far_bytes"] > 0 and numbers["offload_pages_missed"] > 0, numbers
            assert numbers["exchange_collectives"] == stats(plain.cache, 1, plain.len)["exchange_collectives"]
dist.barrier()
dist.destroy_process_group()
