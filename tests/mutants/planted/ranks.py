"""What ranks tell each other: records, frames, agreement, ways of a layer, moves of shards."""

# ruff: noqa: E501 - a table: one mutant, one row

from tests.mutants.mutant import Place, planted
from tests.mutants.operators import edits

FAULTS, MOVES = "tests/migration/test_faults.py", "tests/migration/test_moves.py"
TURN = Place(file="pikv_ds/exchange/turn.py", tests=("tests/exchange/test_turn.py",))
WIRE = Place(file="pikv_ds/exchange/wire.py", tests=("tests/exchange/test_wire.py",))
DIGEST = Place(file="pikv_ds/exchange/digest.py", tests=("tests/exchange/test_digest.py",), model=False)
AGREE = Place(file="pikv_ds/step/agreement.py", tests=("tests/cache/test_single_rank.py",))
STEP = Place(file="pikv_ds/step/step.py", tests=("tests/cache/test_single_rank.py",))
REPLICATED = Place(file="pikv_ds/cache/replicated.py", tests=("tests/cache/test_stats.py",))
DISTINCT = Place(file="pikv_ds/cache/distinct.py", tests=("tests/cache/test_stats.py",))
STATS = Place(file="pikv_ds/cache/stats.py", tests=("tests/cache/test_stats.py",))
MIGRATION = Place(file="pikv_ds/migration/migration.py", tests=(MOVES, FAULTS))
TRANSACTION = Place(file="pikv_ds/migration/transaction.py", tests=(MOVES, FAULTS))
AHEAD = Place(file="pikv_ds/migration/ahead.py", tests=(MOVES, FAULTS))
SWAP = Place(file="pikv_ds/migration/wire.py", tests=(MOVES, FAULTS))
PLAN = Place(file="pikv_ds/migration/moves.py", tests=(MOVES, FAULTS))
COPY = Place(file="pikv_ds/pages/shard_copy.py", tests=(MOVES, FAULTS))

MUTANTS = [
    planted(WIRE, "section not aligned", "", "start = -(-end // ALIGN) * ALIGN\n            end", "start = end\n            end"),
    planted(WIRE, "padding is position 0", "", "offsets=[0, *(section.start for section in sent)]", "offsets=[0, *(section.start for section in reversed(sent))]"),
    planted(DIGEST, "order does not count", "", "total = part if total is None else total * 31 + part", "total = part if total is None else total + part"),
    planted(DIGEST, "place does not count", "", "place = torch.arange(words.numel(), device=words.device) * _MIX2 + (i + 1 + words.numel())", "place = (i + 1 + words.numel())"),
    planted(DIGEST, "rows alike", "", "mixed = (words ^ place) * _MIX\n    mixed = (mixed ^ (mixed >> 29)) * _MIX2\n    return", "mixed = (words * 0 ^ place) * _MIX\n    mixed = (mixed ^ (mixed >> 29)) * _MIX2\n    return"),
    planted(TURN, "no frame after a break", "", "self._broke_off |= self._entered", "self._broke_off |= False"),
    planted(TURN, "no frame for another cache", "", " or self.group.holder != self.cache", ""),
    planted(TURN, "left-out layers not told", "", "self._detour |= self._place != len(self._route)", "self._detour |= False"),
    planted(TURN, "holder not noted", "", "        self.group.holder = self.cache\n", ""),
    planted(TURN, "opened once for ever", "a reset cache says nothing", "        self._opened = self._entered = self._broke_off = self._inside = False\n        self._ended", "        self._entered = self._broke_off = self._inside = False\n        self._ended"),
    planted(TURN, "midway not told", "", "        self._detour |= self._inside  # the layer before was left midway\n", ""),
    planted(AGREE, "idle counts as a token", "", "num_new = [0 if headers[g][0] & IDLE else 1", "num_new = [1"),
    planted(AGREE, "parents of rank 0", "rows of a rank continue those of the first", "numbered = [-1, *range(row0, row0 + num_rows),", "numbered = [-1, *range(0, num_rows),"),
    planted(AGREE, "parked of rank 0", "", "*range(parked0, parked0 + were_parked)]", "*range(len(self.lens), len(self.lens) + were_parked)]"),
    planted(AGREE, "stale lens", "tokens of the forward are not added", "self.lens = [n + new for n, new in zip(before, agreed.num_new, strict=True)]", "self.lens = [n for n, new in zip(before, agreed.num_new, strict=True)]"),
    planted(AGREE, "restart by any", "one rank's new requests drop all", "return all(h[0] & FRESH for h in headers)", "return any(h[0] & FRESH for h in headers)"),
    planted(AGREE, "plain by any", "", "return all(h[0] & PLAIN for h in headers)", "return any(h[0] & PLAIN for h in headers)"),
    planted(AGREE, "replicas not compared", "", "        if any(h != headers[0] for h in headers):\n            raise", "        if False:\n            raise"),
    planted(AGREE, "identity without lens", "a crop is not noticed", "parent == list(range(len(self.lens))) and keep == self.lens", "parent == list(range(len(self.lens)))"),
    planted(AGREE, "park is plain", "", "step.num_rows == self.num_rows[self.own] and step.park is None", "step.num_rows == self.num_rows[self.own]"),
    planted(STEP, "decode by any", "", "self.decode = all(s.num_columns == 1 for s in self.sources)", "self.decode = any(s.num_columns == 1 for s in self.sources)"),
    planted(STEP, "rows begin at 0", "all sources share rows", "            row0 += num_rows\n        self.unsettled", "            row0 += 0\n        self.unsettled"),
    planted(STEP, "all valid with padding", "", "len(self.sources) == 1 and sum(self.num_new) == self.num_tokens", "len(self.sources) == 1"),
    planted(STEP, "queries see late entries", "", "self.all_see_own = self.decode and not late_experts", "self.all_see_own = self.decode"),
    planted(REPLICATED, "own part only", "partials of other ranks are not merged", "        if cache.exchange.size > 1:\n            out, lse = self._merge", "        if False:\n            out, lse = self._merge"),
    planted(REPLICATED, "lse for out of another rank", "", "ops.merge(outs.unflatten(1, out.shape[:2]), lses.unflatten(1, out.shape[:2]))", "ops.merge(outs.unflatten(1, out.shape[:2]), lses.flip(0).unflatten(1, out.shape[:2]))"),
    planted(REPLICATED, "rank order", "", "(cache.map.in_rank_order(layout.unpack(gathered)[name]) for name in", "(layout.unpack(gathered)[name] for name in"),
    planted(REPLICATED, "headers unread", "ranks that diverge go on", "        if unchecked:\n            self.cache.agreement.check_replicated(headers)\n", ""),
    planted(REPLICATED, "late entries stay", "the last layer's are not stored", "            self.cache.writer.append(step, *late)\n", "            pass\n"),
    planted(DISTINCT, "another rank's partials", "", "cache.exchange.all_to_all(torch.cat(partials), sizes, what)", "cache.exchange.all_to_all(torch.cat(partials[::-1]), sizes, what)"),
    planted(DISTINCT, "rank order", "", "outs, lses = cache.map.in_rank_order(mine).unflatten", "outs, lses = mine.unflatten"),
    planted(DISTINCT, "rows of the first", "every source reads the rows of rank 0", "cache.reader.read(step, query, q, first.row0, num_rows, before)", "cache.reader.read(step, query, q, 0, num_rows, before)"),
    planted(DISTINCT, "late entries stay", "", "            self.cache.writer.append(step, *_of_all(step.late, fields))\n", ""),
    planted(DISTINCT, "late entries twice", "", "            step.late = None\n", ""),
    planted(DISTINCT, "own entries only", "", "_of_all(due, fields))\n        partial", "due)\n        partial"),
    planted(DISTINCT, "queries of the first", "", "q = queries[begin : begin + len(run), : first.num_tokens]", "q = queries[:len(run), : first.num_tokens]"),
    planted(STATS, "bytes of live pages", "", '"kv_bytes_allocated": sum(s.nbytes for s in', '"kv_bytes_allocated": sum(s.live_nbytes for s in'),
    planted(STATS, "one rank fewer", "", "    others = len(rows) - 1\n", "    others = len(rows) - 2\n"),
    planted(STATS, "partial without lse", "", "return num_tokens * num_q_heads * (v_dim + 1) * 4", "return num_tokens * num_q_heads * v_dim * 4"),
    planted(STATS, "record without ids", "", "return _sections([*values, num_tokens * 4])", "return _sections(values)"),
    planted(STATS, "loads of another rank", "", "load_per_rank[rank] += entries", "load_per_rank[0] += entries"),
    planted(PLAN, "source and target swapped", "", "Move(shard, present.home(shard), target)", "Move(shard, target, present.home(shard))"),
    planted(MIGRATION, "vote is not counted", "commits without what was sent", "            if not ready:\n", "            if False:\n"),
    planted(MIGRATION, "checksums not compared", "", "if said[source][i] != said[target][i]:", "if False:"),
    planted(MIGRATION, "lost late message is a no", "a rank in doubt rolls back", '            if self.phase == "vote" and prepared is not None:\n', "            if False:\n"),
    planted(MIGRATION, "not undone", "what was stored stays after a refusal", "        roll_back(self.pages)\n        for each", "        for each"),
    planted(MIGRATION, "map not told", "", "        self.told(prepared.map)\n", ""),
    planted(MIGRATION, "resolve always rolls back", "", "        if committed:\n            self._take_over(prepared)\n", "        if False:\n            self._take_over(prepared)\n"),
    planted(MIGRATION, "still wanted after a cancel", "", '        self.wanted, self.phase = None, "idle"\n', '        self.phase = "idle"\n'),
    planted(MIGRATION, "doubt not said", "forwards go on in doubt", "        if self.in_doubt is not None:\n            raise", "        if False:\n            raise"),
    planted(MIGRATION, "pages of the wrong place", "", "self.arrivals.add(place._replace(rank=source),", "self.arrivals.add(place,"),
    planted(MIGRATION, "two at once", "", "        if self.wanted is not None:\n            raise MigrationError", "        if False:\n            raise MigrationError"),
    planted(TRANSACTION, "stale pages are used", "what was copied ahead is never sent again", "                late = slots < 0\n", "                late = slots < -1\n"),
    planted(TRANSACTION, "stayers swapped", "", "stay = {at: pages.map.local.index(shard) for at, shard", "stay = {at: len(pages.map.local) - 1 - pages.map.local.index(shard) for at, shard"),
    planted(TRANSACTION, "rolled back without pages", "pages that came stay taken", "        give_back(pool)\n", "        pass\n"),
    planted(TRANSACTION, "sums of what was sent", "what is stored is not read back", "sums[shard].append(checksum(read_back(pool, copy, ids)))", "sums[shard].append(checksum(copy))"),
    planted(AHEAD, "any page of the size", "digests are not compared", "torch.where(known[order][at] == digests, order[at], -1)", "order[at]"),
    planted(AHEAD, "moved pages forgotten", "pages are sent again under other ids", "                new[move.source] = move.target\n", ""),
    planted(AHEAD, "open pages copied", "", "(counts // pool.page_size).unsqueeze(-1)", "((counts + pool.page_size - 1) // pool.page_size).unsqueeze(-1)"),
    planted(AHEAD, "order of arrival", "", "torch.cat(self._parts[place])[slots[~late]]", "torch.cat(self._parts[place][::-1])[slots[~late]]"),
    planted(AHEAD, "sent twice", "", "new = full[~torch.isin(full, known)]", "new = full"),
    planted(SWAP, "room not asked for", "", "not all(yes for (yes,) in able)", "False"),
    planted(SWAP, "rest not noticed", "", "        if self.at != len(self.block):\n", "        if False:\n"),
    planted(COPY, "tables of another shard", "", "    own = slice(shard * heads, (shard + 1) * heads)\n    copy", "    own = slice(0, heads)\n    copy"),
    planted(COPY, "counts not copied", "", '        counts[:, new] = copy["counts"]\n', ""),
    planted(COPY, "uses of one", "shared pages come with one use", "    ids = pool.take(len(copy[\"records\"]), uses)\n", "    ids = pool.take(len(copy[\"records\"]), 1)\n"),
    planted(COPY, "summaries not stored", "", '        x[ids.long()] = copy[f"page {name}"]\n', "        pass\n"),
    planted(COPY, "not recounted", "pages that left stay taken", "arranged.counted, arranged.tail\n    pool.allocator.recount(table.ids[table.ids >= 0])\n", "arranged.counted, arranged.tail\n"),
    *edits(TURN, ("Turn.step", "Turn.due")),
]  # fmt: skip
