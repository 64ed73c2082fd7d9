"""Latency of several candidates in one run: interleaved rounds, a report of them, throughput."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.benchmark.statistics import MINIMUM_ROUNDS, PairedRatio, paired_ratio, summarize
from cclip_deploy.environment.fingerprint import fingerprint
from cclip_deploy.errors import UsageError

BUDGET_ROUNDS = 10
"""Rounds that a budget of seconds never cuts: ratios of fewer have no 95 % interval, or one between their extremes."""
QUIET_PROBE_SECONDS = 0.02  # several scheduler ticks: the kernel books a running thread's time only at ticks
QUIET_CORES = 0.2
QUIET_PATIENCE_SECONDS = 1.0
NANOSECONDS_PER_MS = 1e6


@dataclass(frozen=True)
class Candidate:
    """One way to compute one stage.

    `run` takes nothing and must not return before the result is ready: a CUDA candidate synchronizes inside.
    `stage` says what the time covers ("image", "prompt", "fused", "end to end", …); ratios are taken within a stage.
    `extra` holds facts for the report, for example threads or provider.
    """

    name: str
    backend: str
    precision: str
    stage: str
    run: Callable[[], object]
    extra: Mapping[str, object] = field(default_factory=dict)

    def facts(self) -> dict[str, object]:
        """What a row of the report says besides name, backend, precision, stage and times."""
        return dict(self.extra)


@dataclass(frozen=True)
class Timing:
    """What was measured of one candidate, in milliseconds: element r of `samples_ms` is round r.

    `disturbed_n` counts the rounds in which other threads of this process never came to rest before its run.
    """

    samples_ms: NDArray[np.float64]
    warmup_ms: NDArray[np.float64]
    disturbed_n: int = 0


@dataclass(frozen=True)
class Throughput:
    """Items finished per second with `concurrency` calls in flight."""

    items_per_second: float
    concurrency: int
    items: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)


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
    """Time every candidate once a round, in a fresh random order each round, so that drift hits all alike.

    Before each run the process comes to rest: the thread pools of ONNX Runtime and of OpenMP spin for a while after a
    run, and on few cores they would slow down whoever comes next.

    Args:
        rounds: measured rounds, at least 3; each gives one sample for each candidate.
        warmup_rounds: rounds before them, timed apart.
        seed: fixes the orders.
        on_round: called with (measured rounds so far, `rounds`) after each one.
        budget_seconds: no round is added once warm-up and rounds together took this long, but `BUDGET_ROUNDS` are
            always measured, or `rounds` where that is fewer.
        settle: called before each run, says whether the process is at rest; `wait_until_quiet` unless given.
        clock_ns: a monotonic clock.

    Raises:
        UsageError: no candidate, two of one name, fewer than 3 rounds.
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
    """Sleep until this process uses next to no processor time, for a second at most; False if it still does then."""
    deadline = time.perf_counter() + QUIET_PATIENCE_SECONDS
    while time.perf_counter() < deadline:
        used_before = time.process_time()
        time.sleep(QUIET_PROBE_SECONDS)
        if time.process_time() - used_before < QUIET_CORES * QUIET_PROBE_SECONDS:
            return True
    return False


def paired_ratios(candidates: Sequence[Candidate], timings: Mapping[str, Timing], baseline: str) -> list[PairedRatio]:
    """Every other candidate of the baseline's stage against the baseline."""
    stages = {candidate.name: candidate.stage for candidate in candidates}
    if baseline not in stages:
        raise UsageError(f"No candidate is named {baseline!r}. Use one of: {', '.join(stages)}.")
    rivals = [name for name, stage in stages.items() if stage == stages[baseline] and name != baseline]
    return [paired_ratio(timings[baseline].samples_ms, timings[name].samples_ms, baseline, name) for name in rivals]


def measure_throughput(
    run: Callable[[], object], concurrency: int, seconds: float, items_per_run: int = 1
) -> Throughput:
    """Call `run` from `concurrency` threads for about `seconds`, and count the items of all calls that finished.

    Every started call is waited for, and the time divided by runs until the last one ends. Warm `run` up before; it is
    called in other threads than the caller's, so a mode that belongs to a thread (torch.inference_mode) is set inside.
    """
    if concurrency < 1 or seconds <= 0:
        raise UsageError(f"Throughput needs concurrency >= 1 and seconds > 0, not {concurrency} and {seconds}.")
    started = time.perf_counter()

    def run_until_deadline() -> int:
        calls = 0
        while calls == 0 or time.perf_counter() - started < seconds:
            run()
            calls += 1
        return calls

    with ThreadPoolExecutor(concurrency) as threads:
        futures = [threads.submit(run_until_deadline) for _ in range(concurrency)]
        items = items_per_run * sum(future.result() for future in futures)
    spent_seconds = time.perf_counter() - started
    return Throughput(items / spent_seconds, concurrency, items, spent_seconds)


def report(candidates: Sequence[Candidate], timings: Mapping[str, Timing], baselines: Sequence[str]) -> dict[str, Any]:
    """What `bench --json` prints: the machine's fingerprint, a row a candidate, ratios to each named baseline."""
    return {
        "fingerprint": fingerprint(),
        "results": [result_row(candidate, timings[candidate.name]) for candidate in candidates],
        "ratios": [ratio.to_dict() for baseline in baselines for ratio in paired_ratios(candidates, timings, baseline)],
    }


def result_row(candidate: Candidate, timing: Timing) -> dict[str, Any]:
    """One row of `results`: who, on what, how long, and every round's time, so that ratios can be computed again."""
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
        raise UsageError(f"Give each candidate a name of its own; doubled: {doubled}." if names else "No candidate.")
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
        del result  # only now: freeing a large output is not part of the run
        return (stop_ns - start_ns) / NANOSECONDS_PER_MS


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep one candidate's garbage from being collected on another's clock."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
            gc.collect(1)
