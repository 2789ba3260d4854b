"""What `pikv baseline` measures: the tasks of `pikv eval` on each cache, then prompts and decode steps timed in turns."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import mean, median
from typing import Any, NamedTuple, TextIO

from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError
from pikv_ds.launch.output import package_version

from .hf_quantized import BaselineBackend, HFCacheKind
from .job import measure_unit, progress_bar, prose_of
from .ppl import windows_of
from .spec import EvalSpec, Unit

DECODED = 128  # steps: transformers encodes its cache anew once in as many tokens


class Times(NamedTuple):
    """One repetition. cpu: of all threads of this process, which on busy cores says more than the clock on the wall; step: the mean."""

    prompt_ms: float
    prompt_cpu_ms: float
    steps_ms: list[float]
    step_cpu_ms: float


@dataclass(frozen=True, slots=True)
class Contender:
    """A cache of the comparison: transformers' (kind), or that of a "pikv" block; neither = the dense one."""

    title: str
    kind: HFCacheKind | None = None
    block: dict[str, Any] | None = None


def parse(text: str) -> Contender:
    """From "pikv:int4", or what HFCacheKind.parse takes. Raises ConfigError with what is legal."""
    if not text.startswith("pikv:"):
        kind = HFCacheKind.parse(text)
        return Contender(kind.name, kind, {})
    block = {"compression": {"method": text.removeprefix("pikv:")}}
    return Contender(f"pikv {text.removeprefix('pikv:')}", None, PiKVConfig.parse(block).model_dump(mode="json"))


class Baseline:
    """One model, the caches one after the other; the times of all caches in turns, so that a busy machine slows all alike."""

    def __init__(self, spec: EvalSpec, contenders: list[Contender], repeats: int) -> None:
        if repeats and spec.context <= DECODED:
            raise ConfigError(f"--repeats {repeats} with --context {spec.context}: the last {DECODED} tokens are timed, use a longer one")
        self.spec, self.repeats = spec, repeats
        self.contenders = [Contender("dense"), *contenders]
        self.backend = BaselineBackend(spec, 300)
        self.prose = prose_of(self.backend, spec)

    def rows(self, tasks: list[str], stdout: TextIO) -> list[dict[str, Any]]:
        """Rows by cache, then by task; call it under torch.no_grad()."""
        timed = self._times(stdout) if self.repeats else None
        rows = []
        for idx, contender in enumerate(self.contenders):
            self.backend.kind = contender.kind
            for task in tasks:
                with progress_bar(f"{task}, {contender.title}", self.spec.samples, stdout) as advance:
                    row = measure_unit(self.backend, self.spec, self.prose, Unit(task=task, block=contender.block), advance)
                if contender.kind is not None:
                    package = contender.kind.package and f"{contender.kind.package} {package_version(contender.kind.package)}"
                    row |= {"method": contender.title, "config": {"cache": contender.title, "package": package}}
                if timed is not None:
                    row["detail"] |= timed[idx]
                rows.append(row)
        return rows

    def _times(self, stdout: TextIO) -> list[dict[str, Any]]:
        """Per cache: medians over the repetitions, in ms, and each repetition's means over the decode steps."""
        ids = windows_of(self.spec, self.prose, self.backend.data_rank)[: self.spec.batch]
        runs: list[list[Times]] = [[] for _ in self.contenders]
        with progress_bar("times, caches in turn", self.repeats, stdout, "repetitions") as advance:
            for _ in range(self.repeats):
                for contender, own in zip(self.contenders, runs, strict=True):
                    self.backend.kind = contender.kind
                    own.append(self._timed(contender.block, ids))
                advance(1)
        return [
            {
                "prompt_ms": median(run.prompt_ms for run in own),
                "prompt_cpu_ms": median(run.prompt_cpu_ms for run in own),
                "step_ms_mean": median(mean(run.steps_ms) for run in own),
                "step_ms_median": median(median(run.steps_ms) for run in own),
                "step_ms_most": median(max(run.steps_ms) for run in own),
                "step_cpu_ms_mean": median(run.step_cpu_ms for run in own),
                "step_ms_mean_by_repeat": [mean(run.steps_ms) for run in own],
                "step_cpu_ms_mean_by_repeat": [run.step_cpu_ms for run in own],
            }
            for own in runs
        ]

    def _timed(self, block: dict[str, Any] | None, ids: Any) -> Times:
        """The first tokens in chunks, then the last DECODED of them one by one."""
        prompt, rest = ids[:, :-DECODED], ids[:, -DECODED:]
        with self.backend.session(block, len(ids), self.spec.context) as session:
            started, cpu = time.perf_counter(), time.process_time()
            for part in prompt.split(self.spec.chunk, 1):
                session.feed(part)[0, -1, 0].item()  # reading a logit ends the forward on any device
            prompt_ms, prompt_cpu_ms = 1e3 * (time.perf_counter() - started), 1e3 * (time.process_time() - cpu)
            steps, cpu = [], time.process_time()
            for column in rest.split(1, 1):
                started = time.perf_counter()
                session.feed(column)[0, -1, 0].item()
                steps.append(1e3 * (time.perf_counter() - started))
        return Times(prompt_ms, prompt_cpu_ms, steps, 1e3 * (time.process_time() - cpu) / DECODED)
