"""Attention and its merge, slots and records, in torch: what every compiled op is compared with, and the oracle of exact mode."""

# ruff: noqa: E501 - a table: one mutant, one row

from tests.mutants.mutant import Place, planted
from tests.mutants.operators import edits

MERGE = Place(file="ops/reference/merge_partials.py", tests=("tests/ops/test_merge_partials.py",), model=False)
SDPA = Place(file="ops/reference/sdpa_lse.py", tests=("tests/ops/test_sdpa_lse.py",))
ASSIGN = Place(file="ops/reference/slots.py", tests=("tests/ops/test_slots.py",), model=False)
CODES = Place(file="ops/reference/codes.py", tests=("tests/ops/test_codes.py", "tests/ops/test_append.py"), model=False)
APPEND = "tests/ops/test_append.py"
PAGES = Place(
    file="ops/reference/pages.py",
    tests=(f"{APPEND}::test_migrate_moves_whole_records", f"{APPEND}::test_checksum_of_the_reference_and_compiled_agree"),
    model=False,
)
CHUNK = Place(file="pikv_ds/cache/chunk.py", tests=("tests/cache/test_chunk.py",), model=False)
WRITER = Place(file="pikv_ds/cache/writer.py", tests=("tests/cache/test_single_rank.py", "tests/migration/test_moves.py"))

MUTANTS = [
    planted(MERGE, "dropped lse term", "the largest lse is not added back", "return merged, top + total.log()", "return merged, total.log()"),
    planted(MERGE, "lse of base 2", "", "return merged, top + total.log()", "return merged, top + total.log2()"),
    planted(MERGE, "not normalised", "", ").sum(0) / total.clamp_min(torch.finfo(lse.dtype).tiny).unsqueeze(-1)", ").sum(0)"),
    planted(MERGE, "mean of parts", "weights do not count", "merged = (weight.unsqueeze(-1) * out).sum(0)", "merged = out.sum(0)"),
    planted(MERGE, "empty rows NaN", "", "lse.amax(0).clamp_min(torch.finfo(lse.dtype).min)", "lse.amax(0)"),
    planted(MERGE, "sink of another head", "", "sink.to(lse.dtype)[None, :, None]", "sink.to(lse.dtype).flip(0)[None, :, None]"),
    planted(MERGE, "sink counted twice", "", "torch.logaddexp(lse, sink", "torch.logaddexp(torch.logaddexp(lse, sink.to(lse.dtype)[None, :, None]), sink"),
    planted(SDPA, "scale applied twice", "", "torch.matmul(q.reshape(B, Hkv, group * T, -1) * scale,", "torch.matmul(q.reshape(B, Hkv, group * T, -1) * scale * scale,"),
    planted(SDPA, "softcap without its c", "", "softcap * torch.tanh(scores / softcap)", "torch.tanh(scores / softcap)"),
    planted(SDPA, "lse without the top", "", "lse = (top + total.log()).squeeze(-1)", "lse = total.log().squeeze(-1)"),
    planted(SDPA, "hidden query has lse 0", "", "lse = lse.masked_fill(~mask.any(-1), -torch.inf)", "lse = lse"),
    planted(SDPA, "window wider than the keys", "", "window is None or window >= k.shape[2]", "window is None or window >= k.shape[2] - 1"),
    planted(SDPA, "mask inverted", "", "masked_fill_(~mask, -torch.inf)", "masked_fill_(mask, -torch.inf)"),
    planted(ASSIGN, "freed page reused", "the stack is not popped", "    free_top -= opens.sum()\n", ""),
    planted(ASSIGN, "page not counted", "an opened page has no use", "opens.to(torch.int32))", "opens.to(torch.int32) * 0)"),
    planted(ASSIGN, "opens at the second", "off by one page", "(offset == 0) & stored", "(offset == 1) & stored"),
    planted(ASSIGN, "counts stale", "", "counts.view(-1).index_add_(0, cell, stored.to(torch.int32))", "counts.view(-1).index_add_(0, cell, stored.to(torch.int32) * 0)"),
    planted(ASSIGN, "not stored has a slot", "", "torch.where(here, slots, -1)", "torch.where(here, slots, 0)"),
    planted(ASSIGN, "one entry too far", "", "before = running.gather(1, column).squeeze(-1) - running[first]", "before = 1 + running.gather(1, column).squeeze(-1) - running[first]"),
    planted(PAGES, "migrate swaps", "source and target ids", "target[target_ids[keep].long()] = source[source_ids[keep].long()]", "target[source_ids[keep].long()] = source[target_ids[keep].long()]"),
    planted(PAGES, "checksum of half", "", "words[:half] ^ words[half : 2 * half]", "words[:half]"),
    planted(CHUNK, "sink added twice", "", "        out = add_sink(out, lse, sink)\n", "        out = add_sink(add_sink(out, lse, sink), lse, sink)\n"),
    planted(CHUNK, "own tokens lost", "", "    if not partial.includes_self:\n", "    if False:\n"),
    planted(CHUNK, "window off by one", "", "visible & (key_at > query_at - window)", "visible & (key_at >= query_at - window)"),
    planted(CHUNK, "sees the next", "not causal", "visible = key_at <= query_at", "visible = key_at <= query_at + 1"),
    planted(CHUNK, "padding seen", "", "        visible = visible & ~hidden.unsqueeze(1)\n", "        pass\n"),
    planted(CHUNK, "stored part lost", "", "(own_out, own_lse) if partial.empty else merge(", "(own_out, own_lse) if True else merge("),
    planted(WRITER, "born in the window", "an entry that the window shows is not stored", "step.positions >= (step.lens_after - (window - 1))[step.rows]", "step.positions > (step.lens_after - (window - 1))[step.rows]"),
    planted(WRITER, "stores all shards", "entries of other ranks are stored here", "here, local = valid & pages.map.is_local(shard), pages.map.index[shard]", "here, local = valid, pages.map.index[shard].clamp_min(0)"),
    planted(WRITER, "late entries dropped", "", "        step.late = LateEntries(query.layer, query.k, query.v)\n", "        step.late = None\n"),
    planted(WRITER, "late of any layer", "named by another layer's router", "if step.late is not None and step.late.layer == layer:", "if step.late is not None:"),
    planted(WRITER, "due now", "late entries are stored with their own layer", "return step.late if step.late_experts else query", "return query"),
    planted(WRITER, "directory not told", "", "            pages.directory.record(layer, step.rows, positions, valid, shard, step.lens_after)\n", ""),
    planted(WRITER, "load not left", "", "            pages.directory.leave(layer, step.rows, positions, valid, step.lens_before, step.lens_after, step.decode)\n", ""),
    planted(WRITER, "expired counted everywhere", "by every rank", "valid & ~born & pages.map.is_local(self.wanted(layer, experts, positions))", "valid & ~born"),
    planted(WRITER, "appended counted everywhere", "by every rank", "pages.counters.count_appended(experts, here)", "pages.counters.count_appended(experts, valid)"),
    planted(WRITER, "capacity of the next layer", "", "step.capacity[layer] if step.capacity_there is None", "step.capacity[layer - 1] if step.capacity_there is None"),
    planted(WRITER, "spilled here", "counts of all ranks", "spilled & self.pages.map.is_local(shard))", "spilled)"),
    *edits(MERGE, ("merge_partials", "add_sink")),
    *edits(ASSIGN, ("assign_slots", "_open_pages", "entry_index")),
    *edits(CHUNK, ("finish", "visible_in_chunk")),
]  # fmt: skip
