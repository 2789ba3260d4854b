"""The invariants of a World, after every operation: answers, pages, entries, directories, numbers, bytes, collectives."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.cache.stats import stats
from tests.harness.dense import rel_error
from tests.harness.invariants import check_pages, check_unshared

from .world import TOLERANCE, World


def check_answers(world: World, i: int, answers: list[tuple[Tensor, Tensor]]) -> None:
    """Every real query's answer is the reference's, and ranks that run the same requests have the same bits."""
    spec, number = world.layers[i], 0
    for source, asked in enumerate(world.asked):
        q = asked[i][0]
        ranks = [source] if world.distinct else range(world.size)
        out, lse = answers[ranks[0]]
        for rank in ranks[1:]:
            assert torch.equal(out, answers[rank][0]) and torch.equal(lse, answers[rank][1]), f"layer {i}: rank {rank} answers otherwise"
        for row in range(len(world.rows[source])):
            for column, position in columns_of(world, source, row):
                want = world.reference.attend(i, number, q[row, column], position, q.shape[-1] ** -0.5, spec.window)
                for got, wanted, what in zip((out[row, column], lse[row, column]), want, ("out", "lse"), strict=True):
                    error = rel_error(got, wanted)
                    assert error <= TOLERANCE, f"layer {i}, source {source}, row {row}, position {position}: {what} is off by {error:.2g}"
            number += 1


def columns_of(world: World, source: int, row: int) -> list[tuple[int, int]]:
    """(column, position) of the real tokens of a row in the forward that was just run."""
    positions = world.positions[source][row].tolist()
    return [(column, position) for column, position in enumerate(positions) if position >= 0]


def check(world: World) -> None:
    """Everything that holds between forwards (design: section 3)."""
    check_maps(world)
    for rank, probe in enumerate(world.probes):
        for pool in probe.all_pools:
            check_pages(pool)
            check_unshared(pool)
        assert torch.equal(probe.loads, world.probes[0].loads), f"rank {rank} counts other loads"
    for i in range(len(world.layers)):
        check_entries(world, i)
        check_parked(world, i)
    check_numbers(world)


def check_maps(world: World) -> None:
    """All parts of all ranks know the same map, in which every shard has one home; ranks have made the same collectives."""
    holders = world.caches[0].map.holders
    for cache, probe in zip(world.caches, world.probes, strict=True):
        assert cache.map.holders == holders and all(one is cache.map for one in probe.shard_maps)
    homed = sorted(shard for probe in world.probes for shard in probe.local_shards)
    assert homed == list(range(len(holders))), f"shards are homed {homed}"
    assert len({cache.exchange.collectives for cache in world.caches}) == 1, "ranks have made different numbers of collectives"


def check_entries(world: World, i: int) -> None:
    """Every shard holds the reference's entries, in its order, bit for bit; the directory of every rank says so."""
    reference, spec = world.reference, world.layers[i]
    for row, length in enumerate(reference.lens):
        seen = []
        for shard in range(reference.num_shards):
            entries = reference.shard_entries(i, row, shard)
            probe = world.probes[world.home(shard)]
            positions, k, v = probe.near_pool(i).entries(row, probe.local_shards.index(shard))
            compare(f"layer {i}, row {row}, shard {shard}", entries, positions, k, v, spec.latent)
            seen += positions.tolist()
        assert len(set(seen)) == len(seen), f"layer {i}, row {row}: a position is stored twice"
        missing = set(range(length - spec.tokens_kept(length), length)) - set(seen)
        assert spec.window is None or not missing, f"layer {i}, row {row}: visible positions are gone: {sorted(missing)}"
        if spec.window is None:
            assert len(missing) == reference.lost[i][row], f"layer {i}, row {row}: positions are gone that nobody evicted"
        for probe in world.probes:
            homes = probe.homes(i)[row][[e.position for e in reference.rows[i][row]]].tolist()
            assert homes == [e.shard for e in reference.rows[i][row]], f"layer {i}, row {row}: homes"
    assert world.probes[0].loads[i].tolist() == reference.load(i), f"layer {i}: load"


def check_parked(world: World, i: int) -> None:
    spec, reference = world.layers[i], world.reference
    for row, kept in enumerate(reference.parked[i]):
        for shard in range(reference.num_shards):
            probe = world.probes[world.home(shard)]
            at, pool = probe.local_shards.index(shard), probe.near_pool(i)
            count = int(probe.parked.counts[0][i][row, at])
            index = torch.arange(count)
            page, offset = pool.parked_table[row, at][index // pool.page_size].long(), index % pool.page_size
            k, v, positions = (field[page, :, offset] if field.dim() > 2 else field[page, offset] for field in pool.fields)
            compare(f"layer {i}, parked row {row}, shard {shard}", [e for e in kept if e.shard == shard], positions, k, v, spec.latent)


def compare(where: str, entries: list, positions: Tensor, k: Tensor, v: Tensor, latent: bool) -> None:
    assert positions.tolist() == [e.position for e in entries], f"{where}: {positions.tolist()}"
    if entries:
        assert torch.equal(k, torch.stack([e.k for e in entries])), f"{where}: keys"
        assert latent or torch.equal(v, torch.stack([e.v for e in entries])), f"{where}: values"


def check_numbers(world: World) -> None:
    """Every entry that was appended is live, expired, evicted or cropped; bytes that are reported are those of the storages."""
    numbers = [stats(cache, 1, 1) for cache in world.caches]
    names = ("live", "appended", "expired", "cropped", "forked", "evicted")
    total = {name: sum(of_rank[f"entries_{name}"] for of_rank in numbers) for name in names}
    reference = world.reference
    live = sum(len(row) for rows in reference.held for row in rows)
    want = {"live": live, "appended": reference.appended, "expired": reference.expired, "evicted": reference.evicted}
    assert {name: total[name] for name in want} == want
    assert total["live"] + total["expired"] + total["evicted"] + total["cropped"] == total["appended"] + total["forked"], total
    for of_rank, probe in zip(numbers, world.probes, strict=True):
        assert of_rank["kv_bytes_allocated"] == probe.bytes, "bytes reported are not the bytes held"
        assert of_rank["spilled_group"] == reference.spilled, "spilled entries"


def poison(world: World) -> None:
    """NaN into every slot that holds no live entry, on all ranks."""
    for probe in world.probes:
        for i in range(probe.num_layers):
            pool = probe.near_pool(i)
            live = [pool.slots(row, table) for row in range(len(pool.counts)) for table in range(pool.num_tables)]
            live += parked_slots(probe, i)
            dead = torch.ones(pool.num_pages * pool.page_size, dtype=torch.bool)
            dead[torch.cat([torch.zeros(0, dtype=torch.int64), *live])] = False
            dead = dead.nonzero().squeeze(-1)
            for column in pool.fields[:2]:
                column[dead // pool.page_size, :, dead % pool.page_size] = torch.nan


def parked_slots(probe, i: int) -> list[Tensor]:
    pool, counts = probe.near_pool(i), probe.parked.counts
    index = [torch.arange(n) for n in (counts[0][i].flatten().tolist() if counts else ())]
    tables = pool.parked_table.flatten(0, 1)
    return [(own[at // pool.page_size] * pool.page_size + at % pool.page_size).long() for own, at in zip(tables, index, strict=True)]
