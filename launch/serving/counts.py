"""What a service counts, for Prometheus: /metrics, and the page at / reads the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from .request import Request
from .spec import ServeSpec

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Counts:
    """A registry of its own: several services in one process count apart. What a schedule is
    judged by carries its name as a label."""

    def __init__(self, spec: ServeSpec) -> None:
        self.registry, self.spec = CollectorRegistry(), spec
        self.ttft_s, self.tbt_s = spec.ttft_ms / 1000, spec.tbt_ms / 1000

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(name, what, labels, registry=self.registry)

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(name, what, labels, registry=self.registry)

        def seconds(name: str, what: str) -> Histogram:
            return Histogram(name, what, ("schedule",), buckets=_SECONDS, registry=self.registry).labels(spec.schedule)

        self.requests = counter("pikv_requests", "requests that have ended, by how", "how")
        self.refused = counter("pikv_requests_refused", "requests that were refused because too many waited")
        self.generated = counter("pikv_tokens_generated", "tokens generated")
        self.prompted = counter("pikv_tokens_prompt", "tokens of prompts that were run")
        self.steps = counter("pikv_steps", "forwards")
        self.ttft = seconds("pikv_ttft_seconds", "from arrival to the first token")
        self.tbt = seconds("pikv_tbt_seconds", "between tokens of a request")
        self.step_s = seconds("pikv_step_seconds", "of a forward on all ranks, sampling included")
        self.kept = counter("pikv_target", "tokens in time and late, by target (ttft, tbt) and schedule", "target", "schedule", "met")
        self.rows = gauge("pikv_step_requests", "requests in the last forward")
        self.kv_bytes = gauge("pikv_kv_bytes", "bytes of the KV cache", "rank")
        self.kv_live = gauge("pikv_kv_bytes_live", "bytes of the KV cache that hold entries", "rank")
        self.kv_entries = gauge("pikv_kv_entries", "entries in the cache", "rank")
        self.expert_bytes = gauge("pikv_kv_expert_bytes_written", "bytes of entries written so far, by expert", "expert")
        self.read_share = gauge("pikv_kv_read_share", "entries that queries read / entries they could have read", "rank")
        for target in ("ttft", "tbt"):
            for met in ("true", "false"):
                self.kept.labels(target, spec.schedule, met)
        self.finished = 0
        self._entry_bytes = 0.0
        """Of the last entries seen, pages' unused slots included."""
        self.page: dict[str, Any] = {}
        """What the page shows of the cache, as of the last look."""

    def watch(self, name: str, what: str, value: Callable[[], float]) -> None:
        """A number that is read when it is asked for."""
        Gauge(name, what, registry=self.registry).set_function(value)

    def stepped(self, seconds: float, requests: int, prompt_tokens: int) -> None:
        self.steps.inc()
        self.step_s.observe(seconds)
        self.prompted.inc(prompt_tokens)
        self.rows.set(requests)

    def token(self, request: Request, now: float) -> None:
        """A request has its next token; `last_token` is still that of the one before."""
        first = request.last_token is None
        waited = now - (request.arrived if first else request.last_token)
        (self.ttft if first else self.tbt).observe(waited)
        met = waited <= (self.ttft_s if first else self.tbt_s)
        self.kept.labels("ttft" if first else "tbt", self.spec.schedule, str(met).lower()).inc()
        self.generated.inc()

    def ended(self, how: str) -> None:
        self.finished += how in ("stop", "length")
        self.requests.labels(how).inc()

    def look(self, stats: list[dict[str, Any]]) -> None:
        """stats: of every rank's cache (pikv_ds.cache.stats.stats)."""
        written: list[int] = []
        for rank, numbers in enumerate(stats):
            self.kv_bytes.labels(rank).set(numbers["kv_bytes_allocated"])
            self.kv_live.labels(rank).set(numbers["kv_bytes_live"])
            self.kv_entries.labels(rank).set(numbers["entries_live"])
            if numbers["entries_visible"]:
                self.read_share.labels(rank).set(numbers["entries_read"] / numbers["entries_visible"])
            if numbers["entries_live"]:
                self._entry_bytes = numbers["kv_bytes_live"] / numbers["entries_live"]
            by_expert = numbers["load_per_expert"]
            written = [a + b for a, b in zip(written or [0] * len(by_expert), by_expert, strict=True)]
        each = self._entry_bytes
        for expert, entries in enumerate(written):
            self.expert_bytes.labels(expert).set(entries * each)
        read, visible = (sum(numbers[name] or 0 for numbers in stats) for name in ("entries_read", "entries_visible"))
        self.page = {
            "kv_bytes": [numbers["kv_bytes_allocated"] for numbers in stats],
            "kv_bytes_live": [numbers["kv_bytes_live"] for numbers in stats],
            "entries": [numbers["entries_live"] for numbers in stats],
            "expert_bytes_written": [entries * each for entries in written],
            "read_share": read / visible if visible else None,
            "attention_impl": stats[0]["attention_impl"],
        }

    def attainment(self, target: str) -> float | None:
        """Share of tokens in time; None before the first."""
        met, late = (self.kept.labels(target, self.spec.schedule, word)._value.get() for word in ("true", "false"))
        return met / (met + late) if met + late else None
