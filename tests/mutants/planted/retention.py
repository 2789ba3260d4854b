"""Retention: which pages leave, and what counts for it."""

# ruff: noqa: E501 - a table: one mutant, one row

from tests.mutants.mutant import Place, planted
from tests.mutants.operators import edits

EVICT = "tests/retention/test_evict.py"
CHOOSE = Place(file="pikv_ds/retention/choose.py", tests=(EVICT,))
COUNTERS = Place(file="pikv_ds/pages/counters.py", tests=("tests/cache/test_single_rank.py", EVICT))

MUTANTS = [
    planted(CHOOSE, "highest scores go", "", "score.gather(-1, by_age).argsort(dim=-1, stable=True))", "score.gather(-1, by_age).argsort(dim=-1, descending=True, stable=True))"),
    planted(CHOOSE, "pinned pages go", "", "return (gone & (score < torch.inf)).view_as(pages.score)", "return gone.view_as(pages.score)"),
    planted(CHOOSE, "one page too many", "", "gone = rank < num_pages.unsqueeze(-1)", "gone = rank <= num_pages.unsqueeze(-1)"),
    planted(CHOOSE, "youngest first on ties", "", "by_age = last.argsort(dim=-1, stable=True)", "by_age = last.argsort(dim=-1, descending=True, stable=True)"),
    planted(COUNTERS, "evicted not counted", "", "self.evicted += int(entries) if entries.device.type == \"cpu\" else entries", "self.evicted += 0"),
    planted(COUNTERS, "expired twice", "", "    def expire(self, entries: Tensor) -> None:\n        \"\"\"0-d int64, that have left a window. Sync: none.\"\"\"\n        self.device_counts[0] += entries", "    def expire(self, entries: Tensor) -> None:\n        \"\"\"0-d int64, that have left a window. Sync: none.\"\"\"\n        self.device_counts[0] += 2 * entries"),
    planted(COUNTERS, "spills here are those of all", "", "        self.device_counts[1] += here.sum()\n", "        self.device_counts[1] += over.sum()\n"),
    planted(COUNTERS, "birth not counted", "", "        self._by_expert.index_add_(0, experts, unseen)\n", ""),
    planted(COUNTERS, "pending lost", "", "        if self._pending_tokens >= self._kept_tokens:\n            self._add_up()\n", "        if self._pending_tokens >= self._kept_tokens:\n            self._pending = []\n"),
    *edits(CHOOSE, ("choose", "protect")),
]  # fmt: skip
