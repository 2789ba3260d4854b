"""Every rank decodes on a device of its own, and counts how often its host waits for it. Arguments: none."""

import pytest
import torch
import torch.distributed as dist

from tests.device.far import Far
from tests.device.steps import decoded
from tests.dist.jobs.report import Report
from tests.long_form import short_or_long

POLICY = {"scheduling": {"method": "h2o", "budget_tokens": 256}}
ROUTED = {"routing": {"method": "bounds", "budget_pages": 4, "sink_tokens": 4, "recent_tokens": 4}}
SENT = {"routing": {"method": "topk", "sink_tokens": 2, "recent_tokens": 2, "exchange": "routed"}}
CASES = {  # requests, family, block, how
    "replicated": ("replicated", "qwen3_moe", {}, "generate"),
    "distinct": ("distinct", "gpt_oss", {}, "generate padded"),
    "replicated, a router": ("replicated", "qwen3_moe", ROUTED, "loop"),
    "distinct, routed to shards": ("distinct", "qwen3_moe", SENT, "loop"),
    "distinct, routed to pages": ("distinct", "qwen3_moe", {"routing": ROUTED["routing"] | {"exchange": "routed"}}, "loop"),
    "distinct, a policy that watches": ("distinct", "qwen3_moe", POLICY, "loop"),
}
SHORT = ["distinct", "distinct, routed to shards"]


def check(report: Report, name: str, group: dist.ProcessGroup) -> None:
    requests, family, block, how = CASES[name]
    block = {"page_size": 4, "timeout_s": 60, **block, "storage": {"requests": requests}}
    seed = 2 if requests == "replicated" else 2 + 10 * dist.get_rank(group)
    with report.check(name) as row:
        patch = pytest.MonkeyPatch()
        try:
            with Far().entered(patch) as far:
                found = decoded(family, block, how=how, far=far, group=group, seed=seed)
        finally:
            patch.undo()
        row["stops"], row["waits"] = found.stops, found.waits
        here = decoded(family, block, how=how, far=None, group=group, seed=seed)
        assert len(found.outputs) == len(here.outputs) > 8
        for there, own in zip(found.outputs, here.outputs, strict=True):
            torch.testing.assert_close(there, own, rtol=0, atol=1e-5)
        assert list(found.stops.values()) == [1.0] and "headers_of" in next(iter(found.stops)), found.stops
        # For sizes; and, where pages have left a window, for when the next of them can.
        assert found.waits <= 1 + 0.5 * (family == "gpt_oss") and found.theirs <= ("generate" in how), (found.waits, found.theirs)


def main() -> None:
    dist.init_process_group("gloo")
    report = Report()
    for name in short_or_long(SHORT, list(CASES)):
        check(report, name, dist.group.WORLD)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
