"""Two pools of pages over process groups, four shards: the unit tests' drivers on every rank, beside the same run on one rank."""

import torch
import torch.distributed as dist

from tests.dist.jobs.report import Report
from tests.harness.checks import Check, Dense
from tests.harness.dense import rel_error
from tests.harness.driver import Driver, layer, ragged
from tests.harness.windowed import KINDS, far_counts, run_mix, tiered

STORAGE = {"num_shards": 4, "requests": "replicated"}
LIGHT = {"light": "none", "heavy": "none", "light_ratio": 0.3}
ROUTING = {"method": "bounds", "budget_pages": 8, "sink_tokens": 2, "recent_tokens": 7, "metadata": "fp32"}
H2O = {"method": "h2o", "budget_tokens": 48, "sink_tokens": 2, "recent_tokens": 3}


class Recorded(Check):
    """Keeps outputs, and what lies in which pool after every forward, over all ranks."""

    def opened(self, driver: Driver) -> None:
        super().opened(driver)
        self.outputs, self.held = [], []

    def layer(self, i: int, q: torch.Tensor, positions: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
        self.outputs.append(torch.where((positions >= 0)[..., None, None], out, 0))

    def after(self, mask: torch.Tensor) -> None:
        exchange = self.driver.cache.exchange
        own = [[[sorted(page) for page in pool.pages(row)] for row in range(len(mask))] for pool in self.driver.probe.all_pools]
        ranks = [own]
        if exchange.size > 1:
            ranks = [None] * exchange.size
            dist.all_gather_object(ranks, own, group=exchange.group)
        self.held.append([[sum((rank[i][row] for rank in ranks), []) for row in range(len(mask))] for i in range(len(own))])


def decode_mix(driver: Driver) -> None:
    driver.prefill([60, 33])
    for mask in (*[ragged([1, 1])] * 5, ragged([9, 20]), *[ragged([1, 1])] * 9):
        driver.forward(mask)


def same_as_alone(run, group, layers, *, dense: bool = True, **options) -> Driver:
    """dense: compare with dense attention besides."""
    drivers, (alone, several) = [], (Recorded(), Recorded())
    for recorded, own in ((alone, None), (several, group)):
        drivers.append(tiered(layers, **STORAGE, group=own, checks=[*[Dense()] * dense, recorded], **options))
        run(drivers[-1])
    assert several.held == alone.held, "what is near and far depends on the number of ranks"
    for one, other in zip(alone.outputs, several.outputs, strict=True):
        assert rel_error(other, one) < 1e-5
    assert sum(map(len, several.held[-1][1])) > 0, "nothing was demoted"
    return drivers[-1]


def main() -> None:
    report = Report()
    dist.init_process_group("gloo")
    group = dist.new_group()
    both, pages = [layer(0), layer(1, latent=True)], {"page_size": 4}
    with report.check("raw"):
        run_mix(tiered(KINDS, group=group, expert_ids="true", **STORAGE, **pages))
        same_as_alone(decode_mix, group, both, **pages)
    with report.check("adaptive"):
        same_as_alone(decode_mix, group, both, codec="adaptive", compression=LIGHT, **pages)
    with report.check("routing") as row:
        driver = same_as_alone(decode_mix, group, both, dense=False, routing=ROUTING, recent=6, placement="position", **pages)
        entries = torch.tensor(driver.probe.read[:2], dtype=torch.float64)
        dist.all_reduce(entries, group=group)
        row["entries"] = entries.tolist()
    with report.check("eviction"):
        same_as_alone(decode_mix, group, both, dense=False, scheduling=H2O, **pages)
    with report.check("collectives"):
        plain, windowed = Driver(both, group=group, **STORAGE, **pages), tiered(both, group=group, **STORAGE, **pages)
        for driver in (plain, windowed):
            driver.prefill([60, 33])
            for _ in range(9):
                driver.decode()
        assert plain.cache.exchange.collectives == windowed.cache.exchange.collectives
    with report.check("distinct"):
        driver = Driver(
            KINDS, group=group, num_shards=4, requests="distinct", seed=report.rank, compression={"raw_recent_tokens": 6}, **pages
        )
        driver.prefill([30 + 8 * report.rank] * (1 + report.rank))
        for _ in range(9):
            driver.decode()
        assert sum(far_counts(driver)) > 0
    with report.check("adaptive, distinct"):
        # The importance of a request's pages is what it is when the request runs alone.
        options = {"num_shards": 4, "codec": "adaptive", "compression": LIGHT, "capacity_tokens": 1000, **pages}
        several, alone = (Driver(both, seed=report.rank, group=g, requests=r, **options) for g, r in ((group, "distinct"), (None, "auto")))
        for driver in (several, alone):
            driver.prefill([40 + 6 * report.rank])
            for _ in range(9):
                driver.decode()
        ranks = [None] * dist.get_world_size()
        own = [[sorted(several.probe.pools(i)[1].pages(row)) for row in range(len(ranks))] for i in range(len(both))]
        dist.all_gather_object(ranks, own, group=group)
        for i in range(len(both)):
            far = sorted(page for rank in ranks for page in rank[i][report.rank])
            assert far == sorted(alone.probe.pools(i)[1].pages(0)) and far, f"layer {i}"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
