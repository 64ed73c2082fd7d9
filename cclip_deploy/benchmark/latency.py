"""Latency of several candidates in interleaved rounds and their report."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.benchmark.statistics import MINIMUM_ROUNDS, PairedRatio, paired_ratio, summarize
from cclip_deploy.environment.fingerprint import fingerprint
from cclip_deploy.errors import UsageError

BUDGET_ROUNDS = 10
"""Rounds that are measured regardless of the time budget: with fewer, intervals are missing or span all values."""
QUIET_PROBE_SECONDS = 0.02  # several scheduler ticks, because the kernel accounts CPU time at ticks
QUIET_CORES = 0.2
QUIET_PATIENCE_SECONDS = 1.0
NANOSECONDS_PER_MS = 1e6


@dataclass(frozen=True)
class Candidate:
    """One way to compute one stage.

    `run` must not return before the result is ready: a CUDA candidate synchronizes. `stage` names what the time covers
    ("image", "prompt", "fused", "end to end", …); ratios are computed within a stage. `extra` holds facts for the
    report, such as the number of threads.
    """

    name: str
    backend: str
    precision: str
    stage: str
    run: Callable[[], object]
    extra: Mapping[str, object] = field(default_factory=dict)

    def facts(self) -> dict[str, object]:
        """Return the fields of a report row besides name, backend, precision, stage and times."""
        return dict(self.extra)


@dataclass(frozen=True)
class Timing:
    """Samples of one candidate in milliseconds, one for each round.

    `disturbed_n` is the number of rounds in which other threads of this process were busy when it started.
    """

    samples_ms: NDArray[np.float64]
    warmup_ms: NDArray[np.float64]
    disturbed_n: int = 0


def measure_interleaved(
    candidates: Sequence[Candidate],
    rounds: int,
    warmup_rounds: int,
    seed: int,
    on_round: Callable[[int, int], None] | None = None,
    budget_seconds: float | None = None,
    settle: Callable[[], bool] | None = None,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Timing]:
    """Time every candidate once in each round, in random order, so that drift affects all equally.

    Wait until the process is idle before each run: the thread pools of ONNX Runtime and OpenMP spin after a run and
    would slow down the next candidate on few cores.

    Args:
        rounds: number of measured rounds, at least 3.
        warmup_rounds: number of rounds before them, reported separately.
        seed: random seed of the orders.
        on_round: called with (measured rounds, `rounds`) after each round.
        budget_seconds: time limit of warm-up and rounds; at least min(`BUDGET_ROUNDS`, `rounds`) are measured.
        settle: called before each run, returns whether the process is idle; default: `wait_until_quiet`.
        clock_ns: a monotonic clock.

    Raises:
        UsageError: no candidates, equal names, or fewer than 3 rounds.
    """
    _check_plan(candidates, rounds, warmup_rounds)
    time_round = _RoundTimer(candidates, np.random.default_rng(seed), settle or wait_until_quiet, clock_ns)
    started_ns = clock_ns()
    warmup = [time_round() for _ in range(warmup_rounds)]
    measured: list[_Round] = []
    while len(measured) < rounds:
        spent_seconds = (clock_ns() - started_ns) / 1e9
        if budget_seconds is not None and spent_seconds >= budget_seconds and len(measured) >= BUDGET_ROUNDS:
            break
        measured.append(time_round())
        if on_round is not None:
            on_round(len(measured), rounds)
    return {
        candidate.name: Timing(
            samples_ms=np.array([spent_ms[index] for spent_ms, _ in measured]),
            warmup_ms=np.array([spent_ms[index] for spent_ms, _ in warmup]),
            disturbed_n=sum(index in disturbed for _, disturbed in measured),
        )
        for index, candidate in enumerate(candidates)
    }


def wait_until_quiet() -> bool:
    """Sleep until this process uses almost no CPU time, for at most one second; return whether it does."""
    deadline = time.perf_counter() + QUIET_PATIENCE_SECONDS
    while time.perf_counter() < deadline:
        used_before = time.process_time()
        time.sleep(QUIET_PROBE_SECONDS)
        if time.process_time() - used_before < QUIET_CORES * QUIET_PROBE_SECONDS:
            return True
    return False


def paired_ratios(candidates: Sequence[Candidate], timings: Mapping[str, Timing], baseline: str) -> list[PairedRatio]:
    """Return the ratios of all other candidates of the baseline's stage to the baseline."""
    stages = {candidate.name: candidate.stage for candidate in candidates}
    if baseline not in stages:
        raise UsageError(f"No candidate is named {baseline!r}. Use one of: {', '.join(stages)}.")
    others = [name for name, stage in stages.items() if stage == stages[baseline] and name != baseline]
    return [paired_ratio(timings[baseline].samples_ms, timings[name].samples_ms, baseline, name) for name in others]


def report(candidates: Sequence[Candidate], timings: Mapping[str, Timing], baselines: Sequence[str]) -> dict[str, Any]:
    """Return the JSON report: fingerprint of the machine, a row for each candidate, ratios to each baseline."""
    return {
        "fingerprint": fingerprint(),
        "results": [result_row(candidate, timings[candidate.name]) for candidate in candidates],
        "ratios": [ratio.to_dict() for baseline in baselines for ratio in paired_ratios(candidates, timings, baseline)],
    }


def result_row(candidate: Candidate, timing: Timing) -> dict[str, Any]:
    """Return the row of a candidate, with all samples, so that ratios can be recomputed."""
    return {
        "name": candidate.name,
        "backend": candidate.backend,
        "precision": candidate.precision,
        "stage": candidate.stage,
        **summarize(timing.samples_ms, timing.warmup_ms).to_dict(),
        "disturbed_n": timing.disturbed_n,
        "samples_ms": timing.samples_ms.tolist(),
        **candidate.facts(),
    }


def _check_plan(candidates: Sequence[Candidate], rounds: int, warmup_rounds: int) -> None:
    names = [candidate.name for candidate in candidates]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if not names or doubled:
        raise UsageError(f"Candidates need unique names; repeated: {doubled}." if names else "There are no candidates.")
    if rounds < MINIMUM_ROUNDS or warmup_rounds < 0:
        raise UsageError(
            f"Measure at least {MINIMUM_ROUNDS} rounds after 0 or more for warm-up, not {rounds} after {warmup_rounds}."
        )


_Round = tuple[NDArray[np.float64], set[int]]  # milliseconds of each candidate; indices of the disturbed ones


@dataclass(frozen=True)
class _RoundTimer:
    candidates: Sequence[Candidate]
    order: np.random.Generator
    settle: Callable[[], bool]
    clock_ns: Callable[[], int]

    def __call__(self) -> _Round:
        spent_ms, disturbed = np.empty(len(self.candidates)), set[int]()
        with _collector_paused():
            for index in self.order.permutation(len(self.candidates)).tolist():
                if not self.settle():
                    disturbed.add(index)
                spent_ms[index] = self._time_one(self.candidates[index].run)
        return spent_ms, disturbed

    def _time_one(self, run: Callable[[], object]) -> float:
        start_ns = self.clock_ns()
        result = run()
        stop_ns = self.clock_ns()
        del result  # freed here, outside the timed region
        return (stop_ns - start_ns) / NANOSECONDS_PER_MS


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Disable the garbage collector, so that no candidate is charged for another's garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
            gc.collect(1)
