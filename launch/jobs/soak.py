"""One rank of `pikv bench soak`. Arguments: the options as JSON, a folder for files, the result file, which rank 0 writes."""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pikv_ds.launch.ranks import gather

STORAGE = {"requests": "replicated", "rebalance": {"every": 24, "threshold": 1.02, "bytes_per_step": 16384}}
BLOCKS = {
    "exact": {"page_size": 8, "timeout_s": 300},
    "tiers": {
        "page_size": 32, "timeout_s": 300, "compression": {"method": "int8", "group": 32, "raw_sink_tokens": 4, "raw_recent_tokens": 32},
    },
}  # fmt: skip
IN, GONE = ("appended", "forked", "loaded"), ("live", "expired", "evicted", "cropped")
MOST_STEPS = 1 << 20
CHECKED = 0.2  # share of the exact model's answers that an ordinary cache gives too


class Steps:
    """Wall times of decode steps of one model, in memory that does not grow."""

    def __init__(self) -> None:
        self.ms, self.migrating = np.zeros(MOST_STEPS, dtype=np.float32), np.zeros(MOST_STEPS, dtype=bool)
        self.ms.fill(1), self.migrating.fill(True)  # so that all of it is resident from the start
        self.count, self._began, self._moves = 0, 0.0, False

    def watch(self, model: Any) -> None:
        model.register_forward_pre_hook(self._begins, with_kwargs=True)
        model.register_forward_hook(self._ends, with_kwargs=True)

    def _begins(self, module: Any, args: tuple, given: dict) -> None:
        cache = given.get("past_key_values")
        self._moves = hasattr(cache, "conversation") and cache.conversation.core.moving
        self._began = time.perf_counter()

    def _ends(self, module: Any, args: tuple, given: dict, output: Any) -> None:
        if given["input_ids"].shape[1] == 1 and self.count < MOST_STEPS:
            self.ms[self.count], self.migrating[self.count] = 1e3 * (time.perf_counter() - self._began), self._moves
            self.count += 1

    def numbers(self) -> dict[str, float | int | None]:
        ms, moves = self.ms[: self.count], self.migrating[: self.count]
        at = lambda x, q: float(np.percentile(x, q)) if len(x) else None  # noqa: E731
        return {
            "steps": self.count, "steps_migrating": int(moves.sum()), "step_ms_p50": at(ms, 50), "step_ms_p99": at(ms, 99),
            "step_ms_p99_migrating": at(ms[moves], 99),
        }  # fmt: skip


class Soak:
    """Every rank draws the same program. Collective throughout."""

    def __init__(self, options: dict[str, Any], folder: Path, group: dist.ProcessGroup) -> None:
        import pikv_ds
        from pikv_ds.bundled import load

        self.options, self.folder, self.group = options, folder, group
        self.draw = random.Random(options["seed"])
        self.dense = load()[0]
        self.vocabulary = self.dense.config.vocab_size
        self.steps, self.did = Steps(), Counter()
        self.lost = self.appended = self.moves = self.wrong = self.checked = 0
        self.models, self.caches, self.said = {}, {}, {}
        for name, block in BLOCKS.items():
            self.models[name] = load()[0]
            self.steps.watch(self.models[name])
            storage = STORAGE | {"num_shards": 2 * dist.get_world_size()}
            self.caches[name] = pikv_ds.attach(self.models[name], block | {"storage": storage}, group)
            self.said[name] = {}
        self.opened = 0

    # ---- one thing after the other -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self) -> None:
        name = self.draw.choice(list(BLOCKS))
        said = self.said[name]
        long = [one for one, ids in said.items() if ids.shape[1] >= self.options["tokens"]]
        if long or len(said) >= self.options["sessions"]:
            what, which = "free", self.draw.choice(long or list(said))
        elif not said:
            what, which = "begin", None
        else:
            kinds = {"begin": 2, "turn": 8, "plain": 2, "fork": 1, "rewind": 1, "save": 1, "move": 2}
            what = self.draw.choices(list(kinds), list(kinds.values()))[0]
            which = self.draw.choice(list(said))
        self.did[what] += 1
        getattr(self, f"_{what}")(name, which)

    def _begin(self, name: str, which: str | None) -> None:
        self.opened += 1
        self._answer(name, f"{self.opened}", self._tokens(4, 60))

    def _turn(self, name: str, which: str) -> None:
        self._answer(name, which, torch.cat([self.said[name][which], self._tokens(1, 24)], 1))

    def _plain(self, name: str, which: str) -> None:
        rows = self.draw.randint(1, 3)
        self._generate(self.models[name], torch.cat([self._tokens(17, 17) for _ in range(rows)]), self.draw.randint(2, 8))
        self.did["requests"] += rows
        cache = self.caches[name]
        self._account(cache)
        cache.begin_generation()
        cache.reset()

    def _fork(self, name: str, which: str) -> None:
        self.opened += 1
        session = self.caches[name].session(which)
        session.core.cancel_rebalance()  # a fork while shards change ranks is refused
        session.fork(f"{self.opened}")
        self.said[name][f"{self.opened}"] = self.said[name][which]

    def _rewind(self, name: str, which: str) -> None:
        """Of the exact model alone: entries of the other may have been encoded."""
        if name != "exact":
            return self._turn(name, which)
        ids = self.said[name][which]
        other = torch.cat([ids[:, : self.draw.randint(1, ids.shape[1] - 1)], self._tokens(1, 9)], 1)
        self.caches[name].session(which).rewind(other)
        return self._answer(name, which, other)

    def _save(self, name: str, which: str) -> None:
        """And load, which takes the place of what was saved."""
        session, path = self.caches[name].session(which), self.folder / f"{name}.session"
        session.core.cancel_rebalance()
        session.save(path)
        self._account(session)
        session.load(path)

    def _move(self, name: str, which: str) -> None:
        """Shards of a session to ranks at random, now or beside the forwards that follow."""
        session, ranks = self.caches[name].session(which), dist.get_world_size()
        session.core.cancel_rebalance()
        holders = [[shard % ranks] for shard in range(2 * ranks)]
        self.draw.shuffle(holders)
        self.moves += session.rebalance(holders, bytes_per_step=self.draw.choice((None, 16384)))

    def _free(self, name: str, which: str) -> None:
        session = self.caches[name].session(which)
        self._account(session)
        session.close()
        del self.said[name][which]

    # ---- what they are made of -----------------------------------------------------------------------------------------------

    def _tokens(self, least: int, most: int) -> torch.Tensor:
        return torch.tensor([[self.draw.randrange(3, self.vocabulary) for _ in range(self.draw.randint(least, most))]])

    def _generate(self, model: Any, ids: torch.Tensor, new: int, **given: Any) -> torch.Tensor:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **given
        )

    def _answer(self, name: str, which: str, ids: torch.Tensor) -> None:
        new, session = self.draw.randint(2, 12), self.caches[name].session(which)
        out = self._generate(self.models[name], ids, new, past_key_values=session)
        self.did["requests"] += 1
        self.said[name][which] = out
        if self.draw.random() < CHECKED and name == "exact":
            self.checked += 1
            self.wrong += not torch.equal(out, self._generate(self.dense, ids, new))

    def _account(self, cache: Any) -> None:
        """Of a cache whose entries are about to go: what came in, less what is there and what its counters say has left."""
        stats = cache.stats()
        self.appended += stats["entries_appended"]
        self.lost += sum(stats[f"entries_{name}"] for name in IN) - sum(stats[f"entries_{name}"] for name in GONE)

    def end(self) -> None:
        for name in BLOCKS:
            for which in list(self.said[name]):
                self._free(name, which)
        for cache in self.caches.values():
            cache.detach()


def rss_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def run(options: dict[str, Any], folder: Path, group: dist.ProcessGroup) -> dict[str, Any]:
    """The row of rank 0's result: sums over ranks, times of the slowest."""
    soak = Soak(options, folder, group)
    started, memory, more = time.monotonic(), [], torch.ones(1)
    cpu = time.process_time()
    while more.item():
        soak.act()
        memory.append((time.monotonic() - started, rss_bytes()))
        more.fill_(time.monotonic() - started < options["seconds"])
        dist.broadcast(more, 0)  # the first rank's clock
    cpu = time.process_time() - cpu
    soak.end()
    seconds = memory[-1][0]
    third = lambda n: [rss for at, rss in memory if n * seconds <= 3 * at <= (n + 1) * seconds]  # noqa: E731
    own = {
        "entries_appended": soak.appended, "entries_lost": soak.lost, "cpu_s": cpu, "rss_start": memory[0][1], "rss_end": memory[-1][1],
        "rss_middle_third": float(np.median(third(1) or [memory[-1][1]])), "rss_last_third": float(np.median(third(2) or [memory[-1][1]])),
    }  # fmt: skip
    of_ranks = gather(own)
    times = gather(soak.steps.numbers())
    total = {name: sum(rank[name] for rank in of_ranks) for name in own}
    slowest = {name: max((rank[name] for rank in times if rank[name] is not None), default=None) for name in times[0]}
    return {
        "wall_s": seconds, "requests": soak.did.pop("requests"), **total, **slowest, "moves": soak.moves, "wrong_answers": soak.wrong,
        "answers_checked": soak.checked, "did": dict(soak.did), "rss_growth": total["rss_last_third"] / total["rss_middle_third"] - 1,
    }  # fmt: skip


def main() -> None:
    from pikv_ds.ops.build import load

    torch.set_num_threads(1)
    load.ensure("cpu")
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    row = run(json.loads(sys.argv[1]), Path(sys.argv[2]), dist.new_group())
    if dist.get_rank() == 0:
        Path(sys.argv[3]).write_text(json.dumps(row), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
