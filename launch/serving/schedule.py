"""Which tokens run in the next step: requests that decode, one each; and pieces of prompts, in an order and of a size that a schedule says.

deadline: prompts whose beginning is cached go first, then those that can still have their first token in time, the most urgent first;
they run in chunks that keep the target between tokens. fcfs: first come, first served, in chunks as long as may be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from .messages import NewRequest, Plan
from .pace import Pace
from .prefix import Match, PrefixIndex
from .request import Request
from .spec import ServeSpec

_PATIENCE = 4  # times its target that a request waits before it goes before all others


class Scheduler:
    """Rank 0's. Times in seconds of time.monotonic()."""

    def __init__(self, spec: ServeSpec, prefixes: PrefixIndex | None) -> None:
        """prefixes: None = no request takes over another's entries."""
        self.spec, self.prefixes, self.pace = spec, prefixes, Pace()
        self.data_ranks = spec.ranks // spec.tp
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._drop: list[int] = []
        self.looked_up = self.found = 0
        """Tokens of prompts admitted so far, and those of them that were cached."""

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._drop)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """It runs no further: its entries go, or are parked."""
        self.running.remove(request)
        if self.prefixes is not None and not request.cancelled:
            self._drop += self.prefixes.park(request.number, request.rank)
        else:
            if self.prefixes is not None:
                self.prefixes.forget(request.number)
            self._drop.append(request.number)

    def plan(self, now: float) -> Plan:
        """The next step. Requests that it takes in move from waiting to running, and count as run."""
        plan = Plan()
        plan.drop, self._drop = self._drop, []
        decoding = [request for request in self.running if not request.waits_for_prompt]
        plan.pieces = [(request.number, 1) for request in decoding]
        self._add_prompts(plan, now, bool(decoding))
        plan.forward = bool(plan.pieces or plan.drop)
        return plan

    def _add_prompts(self, plan: Plan, now: float, decoding: bool) -> None:
        budget = self.spec.max_chunk
        if decoding and self.spec.schedule == "deadline":
            budget = self.pace.chunk(self.spec.tbt_ms, self.spec.max_chunk)
        left = [budget] * self.data_ranks
        for request in [one for one in self.running if one.waits_for_prompt]:
            self._run(plan, request, left)
        for request, match in self._order(now) if self._rank_for(None, None, left) is not None else ():
            rank = self._rank_for(request, match, left)
            if rank is None:
                break  # the next ones wait as well: nobody is overtaken for ever
            self.waiting.remove(request)
            if match is not None and match.rank == rank:
                request.stored = request.reused = match.keep
            else:
                match = None
            self.looked_up += len(request.prompt)
            self.found += request.reused
            request.rank = rank
            source, keep = (match.source, match.keep) if match is not None else (-1, 0)
            plan.new.append(NewRequest(request.number, rank, request.prompt, request.sampling, source, keep))
            self.running.append(request)
            self._make_room(plan, rank)
            self._run(plan, request, left)

    def _make_room(self, plan: Plan, rank: int) -> None:
        """Parked entries go where running requests may come to need their place, also those that one of them takes over in this step."""
        if self.spec.kv_tokens is not None and self.prefixes is not None:
            reserved = sum(one.most_tokens for one in self.running if one.rank == rank)
            plan.drop += self.prefixes.release(rank, reserved + self.prefixes.parked_tokens(rank) - self.spec.kv_tokens)

    def _run(self, plan: Plan, request: Request, left: list[int]) -> None:
        count = min(left[request.rank], request.waits_for_prompt)
        if count:
            left[request.rank] -= count
            plan.pieces.append((request.number, count))

    def _order(self, now: float) -> list[tuple[Request, Match | None]]:
        matched = [(request, self._match(request)) for request in self.waiting]
        if self.spec.schedule == "fcfs":
            return matched
        key: Callable[[tuple[Request, Match | None]], tuple] = lambda one: self._urgency(*one, now)  # noqa: E731
        return sorted(matched, key=key)

    def _match(self, request: Request) -> Match | None:
        """What it could take over. Log-probabilities of a prompt need all of its tokens to be run."""
        if self.prefixes is None or request.sampling.echo:
            return None
        return self.prefixes.match(request.prompt)

    def _urgency(self, request: Request, match: Match | None, now: float) -> tuple:
        target = self.spec.ttft_ms / 1000
        waited = now - request.arrived
        cached = 0 if match is None else match.keep
        slack = target - waited - self.pace.prompt_ms(len(request.prompt) - cached) / 1000
        starved, late = waited > _PATIENCE * target, slack < 0
        return (not starved, late, 2 * cached < len(request.prompt), request.arrived if late else slack)

    def _rank_for(self, request: Request | None, match: Match | None, left: list[int]) -> int | None:
        """Where its entries already are, if there is room, else the rank with least to do; None: no rank has room in this step.

        request: None = of any length.
        """
        load, held = [0] * self.data_ranks, [0] * self.data_ranks
        for one in self.running:
            load[one.rank] += 1
            held[one.rank] += one.most_tokens
        limit, tokens = self.spec.kv_tokens, 0 if request is None else request.most_tokens
        free = [
            rank
            for rank in range(self.data_ranks)
            if left[rank] and load[rank] < self.spec.max_running and (limit is None or not load[rank] or held[rank] + tokens <= limit)
        ]
        if match is not None and match.rank in free:
            return match.rank
        return min(free, key=lambda rank: (load[rank], held[rank]), default=None)
