"""Migration: shards of a cache move to other ranks, as a whole on all ranks or not at all. Owned by the cache, one at a time.

A move runs at once, or beside the forwards: then full pages are copied ahead, so many bytes after each forward, while their own rank
serves them, and what is missing or has changed follows at the commit. Every rank says by a checksum of each shard what it has; if all
agree, all take over the new map, else all keep the old one and give back what they had taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from pikv_ds.errors import MigrationError, PeerError
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.pages.layers import RankPages
from pikv_ds.placement.shard_map import ShardMap

from .ahead import Arrivals, Ledger, Place
from .along import Along, Claim, carry
from .moves import Move, Progress, moves
from .transaction import Leaving, Prepared, arrived, commit, leaving, prepare, roll_back
from .wire import Unpacked, packed, swap

VOTE = "moving shards: what every rank has"


class Migration:
    """Owns what was copied ahead and the numbers; borrows pages and exchange. All ranks call alike, between the layers of two forwards."""

    def __init__(self, pages: RankPages, exchange: Exchange, moved: Callable[[ShardMap], None]) -> None:
        """moved: told of the new map once all ranks have agreed on it."""
        self.pages, self.exchange, self.told = pages, exchange, moved
        self.along: list[Along] = []
        """What moves with the shards unless a move is begun without."""
        self.alone = "this cache was not made by an adapter of a host with expert parallelism"
        """Why `along` is empty, for those who ask for it."""
        self.taken: tuple[Along, ...] = ()
        """Of these, what moves in the commit that runs, or in the one that is in doubt."""
        self.progress = Progress()
        self.wanted: ShardMap | None = None
        """Where shards move to; None: no move is under way."""
        self.in_doubt: Prepared | None = None
        """A move broke off in its vote or after it: only the other ranks can know whether it was committed (`resolve`)."""
        self.phase = "idle"
        """What this rank last began to do of a move, for errors: idle, ahead, leaving, arriving, vote, commit."""

    @property
    def nbytes(self) -> int:
        """Bytes of pages that were copied here ahead and are in no pool yet."""
        return 0 if self.wanted is None else self.arrivals.nbytes

    def follow(self, along: Along | str) -> None:
        """What moves with the shards from now on; or why nothing does."""
        if isinstance(along, str):
            self.alone = along
        else:
            self.along.append(along)

    # ---- calls -----------------------------------------------------------------------------------------------------------------

    def begin(self, holders: tuple[tuple[int, ...], ...], bytes_per_step: int | None = None, along: Sequence[Along] | None = None) -> None:
        """From now on shards move to `holders`, per shard the rank, if some lie elsewhere.

        bytes_per_step: that a rank copies ahead in one `advance`; None = all at once, in the next one. along: what moves with them, at the
        commit; None = all of `self.along`, nothing where shards have copies.

        Raises: ValueError for a map that this group can't hold; MigrationError while another move is under way.
        """
        if self.wanted is not None:
            raise MigrationError("shards are moving already; let that end, or cancel it, before another move begins")
        self.check()
        present = self.pages.map
        wanted = ShardMap(holders, present.rank, present.num_ranks, present.device)
        if wanted.num_shards != present.num_shards:
            raise ValueError(f"holders of {wanted.num_shards} shards, but the cache has {present.num_shards}")
        self.moves: list[Move] = moves(present, wanted)
        self.following = (() if wanted.copied else tuple(self.along)) if along is None else tuple(along)
        if wanted.holders == present.holders and not any(each.due(wanted) for each in self.following):
            return
        self.wanted, self.bytes_per_step = wanted, bytes_per_step
        self.ledger, self.arrivals = Ledger(self.pages), Arrivals()
        self.whole = bytes_per_step is None  # nothing is left to copy ahead
        self.slices_left = 0
        self.progress.started += 1
        if bytes_per_step is not None:
            leaves = sum(pool.pages.nbytes for pool in self.pages.all_pools)
            self.slices_left = -(-2 * leaves // bytes_per_step) + 2  # of this rank; the most of all ranks is agreed in the first slice

    def advance(self) -> bool:
        """Copy another slice ahead, or commit. Collective. Returns whether the move has ended, by a commit.

        Raises: MigrationError on all ranks when some could not take part: everything is as before. PeerError.
        """
        assert self.wanted is not None, "begin comes first"
        if not self.whole:
            try:
                self._slice()
            except PeerError:
                self._undo()
                raise
            return False
        begun = time.perf_counter()
        self._commit()
        self.progress.stall_s = max(self.progress.stall_s, time.perf_counter() - begun)
        return True

    def cancel(self) -> None:
        """The move under way does not take place; nothing else changes. All ranks at the same point."""
        if self.wanted is not None:
            self._forget()
            self.progress.cancelled += 1

    def resolve(self, *, committed: bool) -> None:
        """After a move that broke off in its vote: do what the others did. committed: of some other rank that it has moved.

        Every rank that votes has stored what was sent to it, so any rank can follow one that has committed.
        """
        prepared, self.in_doubt = self.in_doubt, None
        assert prepared is not None, "no move is in doubt"
        if committed:
            self._take_over(prepared)
        else:
            self._give_back()
            self.progress.rolled_back += 1

    def start(self) -> None:
        """A generation begins: pages that were copied are gone, and so is a move that is under way.

        Raises: MigrationError where what moved with the shards is in doubt, as it outlives the entries.
        """
        if self.taken:
            self.check()
        self.in_doubt = None
        self.cancel()

    # ---- ahead -----------------------------------------------------------------------------------------------------------------

    def _slice(self) -> None:
        self.phase, begun, what = "ahead", time.perf_counter(), "copying shards ahead"
        try:
            blocks, more = self._chosen()
        except (RuntimeError, MemoryError):  # out of memory: nobody sends, and all see it
            blocks, more = None, 0
        received = swap(self.exchange, blocks, [more, self.slices_left], self.pages.device, what)
        if received.blocks is None:
            self._refuse("a rank has no memory for pages that are copied ahead")
        assert blocks is not None and received.blocks is not None, "nobody has refused"
        for source, block in enumerate(received.blocks):
            self._keep(source, Unpacked(block))
        self.slices_left = max(left for _, left in received.facts) - 1
        self.whole = not any(more for more, _ in received.facts) or self.slices_left <= 0
        sent = sum(len(block) for block in blocks)
        self.progress.slices += 1
        self.progress.bytes_sent += sent
        self.progress.bytes_ahead += sent
        self.progress.slice_s = max(self.progress.slice_s, time.perf_counter() - begun)

    def _chosen(self) -> tuple[list[torch.Tensor], int]:
        """uint8 for each rank, of bytes_per_step pages' bytes or a little more; and how many pages remain."""
        budget, more = self.bytes_per_step or 0, 0
        parts: list[list[torch.Tensor]] = [[] for _ in range(self.exchange.size)]
        for place, shard in self._places(source=self.exchange.rank):
            pool = self.pages.layers[place.layer].pools[place.level]
            size = pool.fmt.record_bytes
            records, left = self.ledger.take(place, pool, self.pages.map.local.index(shard), -(-budget // size))
            budget, more = budget - records.nbytes, more + left
            parts[place.rank] += [torch.tensor([len(records)], device=self.pages.device), records]
        empty = [not any(len(x) for x in of_rank[1::2]) for of_rank in parts]
        return [packed([] if none else of_rank, self.pages.device) for none, of_rank in zip(empty, parts, strict=True)], more

    def _keep(self, source: int, read: Unpacked) -> None:
        if not len(read.block):
            return
        for place, _ in self._places(source=source, target=self.exchange.rank):
            (count,) = read.take((1,), torch.int64).tolist()
            fmt = self.pages.layers[place.layer].pools[place.level].fmt
            self.arrivals.add(place._replace(rank=source), read.take((count, fmt.record_bytes), torch.uint8))
        read.end()

    def _places(self, *, source: int, target: int | None = None) -> list[tuple[Place, int]]:
        """Where pages of `source` go, and of which shard; the same order on all ranks."""
        own = [move for move in self.moves if move.source == source and target in (None, move.target)]
        return [
            (Place(move.target, layer.index, level), move.shard)
            for move in own
            for layer in self.pages.layers
            for level in range(len(layer.pools))
        ]

    # ---- the commit ------------------------------------------------------------------------------------------------------------

    def _commit(self) -> None:
        assert self.wanted is not None, "begin comes first"
        failed: Exception | None = None
        out: Leaving | None = None
        prepared: Prepared | None = None
        self.phase, self.taken = "leaving", tuple(each for each in self.following if each.due(self.wanted))
        try:
            out = leaving(self.pages, self.moves, self.ledger)
        except (RuntimeError, MemoryError) as error:
            failed = error
        try:
            received = swap(self.exchange, None if out is None else out.blocks, [], self.pages.device, "moving shards")
            if out is None or received.blocks is None:
                self._refuse("a rank could not copy the shards that leave it, or has no memory for those that come", failed)
            assert out is not None and received.blocks is not None, "nobody has refused"
            carried = [carry(self.exchange, each, self.wanted, self.pages.device) for each in self.taken]
            self.phase = "arriving"
            try:
                copies = arrived(self.pages, self.moves, received.blocks, self.arrivals)
                for each, (blocks, _) in zip(self.taken, carried, strict=True):
                    each.arrived(blocks)
                prepared = prepare(self.pages, self.wanted, copies)
            except (RuntimeError, MemoryError, ValueError) as error:
                failed = error
            self.phase = "vote"
            unlike = self._vote(out, prepared)
        except BaseException:
            if self.phase == "vote" and prepared is not None:
                self._doubt(prepared)  # some rank may have heard all votes
            else:
                self._undo()
            raise
        if unlike is not None:
            self._undo()
            raise MigrationError(f"{unlike}; every shard stays where it was, on all ranks") from failed
        assert prepared is not None, "all have voted for it"
        self.phase = "commit"
        self.progress.bytes_sent += sum(len(block) for block in out.blocks)
        self.progress.bytes_again += self.ledger.nbytes - out.ahead
        self.progress.experts_moved += sum(len(each.claims()) for each in self.taken)
        self.progress.expert_bytes += sum(sent for _, sent in carried)
        self._take_over(prepared)

    def _vote(self, out: Leaving, prepared: Prepared | None) -> str | None:
        """What is against it; None: nothing. One collective, in which every rank says what it has sent and what it has stored."""
        claims = [Claim(f"shard {move.shard}", move.source, move.target) for move in self.moves]
        sums = {} if prepared is None else prepared.sums
        own = [int(prepared is not None)]
        for move in self.moves:
            own.append(out.sums[move.shard] if move.source == self.exchange.rank else sums.get(move.shard, 0))
        for each in self.taken:
            claims += each.claims()
            own += each.said()
        row = torch.tensor(own, dtype=torch.int64, device=self.pages.device)
        said = self.exchange.all_gather(row, VOTE).tolist()
        for rank, (ready, *_) in enumerate(said):
            if not ready:
                return f"rank {rank} could not store the shards that were sent to it"
        for i, (what, source, target) in enumerate(claims, 1):
            if said[source][i] != said[target][i]:
                return f"{what} is not on rank {target} what it is on rank {source}: the checksums differ"
        return None

    def _take_over(self, prepared: Prepared) -> None:
        """From here on nothing that breaks off changes the outcome: it can be done again, until the new map is told."""
        moved = len(self.moves)
        self._doubt(prepared)
        commit(self.pages, prepared)
        for each in self.taken:
            each.commit()
        self.told(prepared.map)
        self.in_doubt = None
        self.progress.committed += 1
        self.progress.shards_moved += moved
        self.pages.room.shrink()

    def _doubt(self, prepared: Prepared) -> None:
        self.in_doubt = prepared
        self._forget()

    def _refuse(self, why: str, cause: Exception | None = None) -> None:
        """All ranks know."""
        if self.phase == "ahead":
            self._undo()
        raise MigrationError(f"{why}; every shard stays where it was, on all ranks. Move fewer shards at a time, or free memory") from cause

    def _undo(self) -> None:
        self._forget()
        self._give_back()
        self.progress.rolled_back += 1

    def _give_back(self) -> None:
        roll_back(self.pages)
        for each in self.taken:
            each.forget()

    def _forget(self) -> None:
        if self.wanted is not None:
            self.ledger.close()
            self.arrivals = Arrivals()
        self.wanted, self.phase = None, "idle"

    def check(self) -> None:
        """Raises: MigrationError while this rank is in doubt."""
        if self.in_doubt is not None:
            raise MigrationError(
                "the last move of shards broke off in its vote, and this rank does not know whether others have committed it; ask them and "
                "call cache.migration.resolve(committed=...), or reset the cache on all ranks"
            )
