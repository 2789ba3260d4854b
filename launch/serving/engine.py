"""The loop of rank 0: take in requests, plan a step, have all ranks run it, tell the requests what came of it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from .control import Control
from .counts import Counts
from .messages import Answer, Plan
from .prefix import PrefixIndex
from .rank import Rank
from .request import Request, Update
from .schedule import Scheduler
from .spec import ServeSpec
from .start import RankEnded

TICK_S = 1.0  # between two signs of life while there is nothing to do, and between two looks at the cache's numbers


class Busy(Exception):
    """As many requests wait as may."""


class Gone(Exception):
    """The service stops, or has failed."""


class Engine:
    """submit() and cancel() from any thread; everything else happens in the thread that runs run()."""

    def __init__(self, spec: ServeSpec, rank: Rank, control: Control, watch: Callable[[], None]) -> None:
        """watch: raises when a rank has ended."""
        self.spec, self.rank, self.control, self.watch = spec, rank, control, watch
        reuses = spec.prefix_rows > 0 and rank.runner.shares_prefixes is None
        self.prefixes = PrefixIndex(spec.prefix_rows) if reuses else None
        self.scheduler = Scheduler(spec, self.prefixes)
        self.counts = Counts(spec)
        self.failed: str | None = None
        self._inbox: deque[Request] = deque()
        self._requests: dict[int, Request] = {}
        self._change = threading.Condition()
        self._draining = self._stopping = False
        self._looked = 0.0

    # ---- from other threads --------------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._inbox) + len(self.scheduler.waiting)

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    def submit(self, requests: list[Request]) -> None:
        """All of them or none. Raises: Busy, Gone."""
        with self._change:
            if self.failed is not None or self._draining:
                raise Gone(self.failed or "the service stops and takes no further requests")
            if self.num_waiting + len(requests) > self.spec.max_waiting:
                self.counts.refused.inc(len(requests))
                raise Busy(f"{self.num_waiting} requests wait, at most {self.spec.max_waiting} may, and {len(requests)} came; try later")
            self._inbox.extend(requests)
            self._change.notify()

    def cancel(self, request: Request) -> None:
        """Nobody reads what it says any more."""
        request.cancelled = True

    def drain(self) -> None:
        """Take no further requests; run() returns once those that are here have finished."""
        with self._change:
            self._draining = True
            self._change.notify()

    @property
    def state(self) -> str:
        """ "ok", "stopping", or why it has failed."""
        return self.failed or ("stopping" if self._draining else "ok")

    def stop(self) -> None:
        """Return from run() after the step that runs; requests that are left are told."""
        with self._change:
            self._draining = self._stopping = True
            self._change.notify()

    # ---- the loop ------------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until the service stops. What goes wrong ends it: `failed` says what, and every request hears it."""
        try:
            while self._wait():
                self._step()
            self.control.tell(Plan(stop=True))
        except Exception as error:
            self.failed = f"{type(error).__name__}: {error}"
            self._name_cause()
            raise
        finally:
            why = self.failed or "the service has stopped"
            with self._change:
                self._draining = True
                left = [*self._requests.values(), *self._inbox]
            for request in left:
                request.tell(Update("", [], [], [], error=why))

    def _name_cause(self) -> None:
        """A rank that has ended is why a collective failed; it may take a moment to be gone."""
        deadline = time.monotonic() + TICK_S
        while time.monotonic() < deadline:
            try:
                self.watch()
            except RankEnded as cause:
                self.failed = str(cause)
                return
            time.sleep(0.05)

    def _wait(self) -> bool:
        """True when there is something to do, at the latest after a tick."""
        with self._change:
            while self._inbox:
                request = self._inbox.popleft()
                self._requests[request.number] = request
                self.scheduler.add(request)
            if self._stopping:
                return False
            if not self.scheduler.has_work:
                if self._draining:
                    return False
                self._change.wait(TICK_S)
            return True

    def _step(self) -> None:
        self.watch()
        self._drop_cancelled()
        started = time.monotonic()
        plan = self.scheduler.plan(started)
        plan.stats = started - self._looked >= TICK_S
        if not (plan.forward or plan.stats):
            return
        self.control.tell(plan)
        answers = self.control.collect(self.rank.run(plan))
        ended = time.monotonic()
        self._take_in(plan, answers, started, ended)
        if plan.stats:
            self._looked = ended
            self.counts.look([answer.stats or {} for answer in answers])

    def _drop_cancelled(self) -> None:
        for request in [one for one in self._requests.values() if one.cancelled]:
            del self._requests[request.number]
            if request.rank is None:
                self.scheduler.waiting.remove(request)
            else:
                self.scheduler.finish(request)
            self.counts.ended("cancelled")

    def _take_in(self, plan: Plan, answers: list[Answer], started: float, ended: float) -> None:
        prompt_tokens = [0] * self.scheduler.data_ranks
        for number, count in plan.pieces:
            request = self._requests[number]
            if request.waits_for_prompt:
                prompt_tokens[request.rank] += count
            request.stored += count
        if plan.pieces:
            self.scheduler.pace.note(1e3 * (ended - started), max(prompt_tokens))
            self.counts.stepped(ended - started, len(plan.pieces), sum(prompt_tokens))
        for number, logprobs in (told for answer in answers for told in answer.prompts):
            self._requests[number].tell(Update("", [], [], logprobs))
        for new in (token for answer in answers for token in answer.tokens):
            request = self._requests[new.number]
            if request.last_token is None and self.prefixes is not None:
                self.prefixes.hold(request.number, request.rank, request.prompt)
            self.counts.token(request, ended)
            request.last_token = ended
            update = request.push(new.token, new.logprob)
            if update.finish is not None:
                self._finish(request)
            request.tell(update)

    def _finish(self, request: Request) -> None:
        del self._requests[request.number]
        if self.prefixes is not None:
            self.prefixes.hold(request.number, request.rank, (request.prompt + request.tokens)[: request.stored])
        self.scheduler.finish(request)
        self.counts.ended(request.finished or "error")
