"""One of three ranks kills itself; the others make a group of their own and go on. args: victim, when ("decoding" or "vote").

"decoding": in a generate of a tiny model. "vote": in the vote of a move of shards.
"""

import os
import signal
import sys

import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds.cache import PiKVCache
from pikv_ds.config import PiKVConfig
from pikv_ds.errors import PeerError, UnsupportedError
from pikv_ds.exchange.survivors import regroup
from pikv_ds.migration.aftermath import settle
from pikv_ds.migration.migration import VOTE
from tests.dist.jobs.exact import generate
from tests.dist.jobs.failures import expect
from tests.dist.jobs.report import Report
from tests.recorded import host_core
from tests.tiny_models import prompt, tiny_model

TIMEOUT_S = 4.0
NEW_TOKENS = 12


class DiesAt:
    """A streamer of generate() that ends this process at its n-th token."""

    def __init__(self, token: int) -> None:
        self.left = token

    def put(self, _) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)

    def end(self) -> None: ...


def decoding(report: Report, rank: int, victim: int) -> None:
    model, group = tiny_model("qwen3_moe"), dist.new_group()
    ids = prompt(24, seed=3)
    expected = generate(model, ids, new_tokens=NEW_TOKENS)
    block = {"timeout_s": TIMEOUT_S, "page_size": 4}
    with pikv_ds.attach(model, block, group), expect(PeerError, "died"):
        model.generate(
            ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, streamer=DiesAt(5) if rank == victim else None
        )  # fmt: skip
    with report.check("survivors"):
        left = regroup(group, wait_s=3 * TIMEOUT_S)
        assert dist.get_world_size(left) == 2
        with pikv_ds.attach(model, block, left) as cache:
            found = generate(model, ids, new_tokens=NEW_TOKENS)
            assert torch.equal(found.tokens, expected.tokens), "other tokens"
            assert found.difference(expected) <= 1e-5
            assert sum(cache.stats()["load_per_rank"]) == 2 * (24 + NEW_TOKENS - 1)
        with expect(UnsupportedError, "has not failed"):
            regroup(left)


def vote(report: Report, rank: int, victim: int) -> None:
    config = PiKVConfig(page_size=4, timeout_s=TIMEOUT_S, storage={"requests": "distinct", "num_shards": 6})
    specs = [host_core.spec(i, kind) for i, kind in enumerate(["full", "window"])]
    cache = PiKVCache(specs, config, num_experts=host_core.EXPERTS, dtype=torch.float32, device=torch.device("cpu"), group=dist.group.WORLD)
    host = host_core.Run(cache, config, dist.group.WORLD)
    host.prefill([30, 20, 40])
    host.decode(2)
    if rank == victim:
        run = cache.exchange._run

        def dies(what, *args, **how):
            run(what, *args, **how)
            if what == VOTE:
                os.kill(os.getpid(), signal.SIGKILL)

        cache.exchange._run = dies
    with expect(PeerError):
        cache.rebalance(((1,), (0,), (2,), (0,), (1,), (2,)))
        host.decode(4)
    with report.check("survivors") as row:
        left = regroup(dist.group.WORLD, wait_s=3 * TIMEOUT_S)
        row["moved"] = settle(cache.migration, left)
        assert row["moved"] == (cache.map.holders[0] == (1,)) and cache.migration.in_doubt is None
        again = PiKVCache(specs, config, num_experts=host_core.EXPERTS, dtype=torch.float32, device=torch.device("cpu"), group=left)
        run = host_core.Run(again, config, left)
        run.prefill([30, 20])
        run.decode(4)
        assert len(run.outputs) == 2 * 2 * 5


def main() -> None:
    victim, when = int(sys.argv[1]), sys.argv[2]
    if victim == 0:  # a store that outlives rank 0
        store = dist.FileStore(os.path.join(os.environ["PIKV_TEST_RESULTS"], "store"), int(os.environ["WORLD_SIZE"]))
        dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    else:
        dist.init_process_group("gloo")
    {"decoding": decoding, "vote": vote}[when](Report(), dist.get_rank(), victim)
    os._exit(0)  # the first group is closed


if __name__ == "__main__":
    main()
