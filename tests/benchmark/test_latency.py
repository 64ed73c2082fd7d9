"""Tests of interleaved timing with a fake clock, of percentiles and of paired ratios."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from cclip_deploy.benchmark import latency
from cclip_deploy.benchmark.latency import Candidate, Timing, measure_interleaved
from cclip_deploy.benchmark.statistics import paired_ratio, summarize
from cclip_deploy.errors import UsageError
from cclip_deploy.evaluation.median_interval import median_interval


@dataclass
class Clock:
    """Fake clock that only candidates advance."""

    now_ns: int = 0
    log: list[str] = field(default_factory=list)

    def __call__(self) -> int:
        return self.now_ns

    def spend(self, ms: float) -> None:
        self.now_ns += round(ms * 1e6)

    def candidate(self, name: str, ms_of_call: Callable[[int], float], stage: str = "image") -> Candidate:
        calls = iter(range(10**6))

        def run() -> None:
            self.log.append(name)
            self.spend(ms_of_call(next(calls)))

        return Candidate(name, "test", "fp32", stage, run)


def at_rest() -> bool:
    return True


def test_each_sample_is_the_time_of_that_candidate_in_that_round() -> None:
    clock = Clock()
    candidates = [clock.candidate("a", lambda call: 10 + call), clock.candidate("b", lambda call: 20 - call)]
    timings = measure_interleaved(candidates, 5, 2, seed=0, settle=at_rest, clock_ns=clock)
    np.testing.assert_allclose(timings["a"].warmup_ms, [10, 11])
    np.testing.assert_allclose(timings["a"].samples_ms, [12, 13, 14, 15, 16])
    np.testing.assert_allclose(timings["b"].samples_ms, [18, 17, 16, 15, 14])


def test_every_round_runs_all_candidates_in_an_order_that_varies_with_round_and_seed() -> None:
    def orders(seed: int) -> list[tuple[str, ...]]:
        clock = Clock()
        measure_interleaved(
            [clock.candidate(n, lambda _: 1) for n in "abc"], 30, 0, seed, settle=at_rest, clock_ns=clock
        )
        return [tuple(clock.log[i : i + 3]) for i in range(0, 90, 3)]

    assert all(sorted(order) == ["a", "b", "c"] for order in orders(1))
    assert len(set(orders(1))) == 6
    assert orders(1) == orders(1)
    assert orders(1) != orders(2)


def test_percentiles_exclude_the_warm_up() -> None:
    clock = Clock()
    candidate = clock.candidate("jit", lambda call: 1000 if call == 0 else 2)
    timing = measure_interleaved([candidate], 4, 1, seed=0, settle=at_rest, clock_ns=clock)["jit"]
    summary = summarize(timing.samples_ms, timing.warmup_ms)
    assert (summary.max_ms, summary.first_ms, summary.n, summary.warmup_n) == (2, 1000, 4, 1)


@pytest.mark.parametrize(("budget_seconds", "rounds_done"), [(None, 20), (1.15, 12), (0.0, 10)])
def test_the_budget_ends_the_measurement_but_never_before_ten_rounds(
    budget_seconds: float | None, rounds_done: int
) -> None:
    clock, seen = Clock(), []
    candidate = clock.candidate("a", lambda _: 100)
    timings = measure_interleaved(
        [candidate],
        20,
        0,
        seed=0,
        on_round=lambda done, planned: seen.append((done, planned)),
        budget_seconds=budget_seconds,
        settle=at_rest,
        clock_ns=clock,
    )
    assert timings["a"].samples_ms.size == rounds_done
    assert seen == [(done, 20) for done in range(1, rounds_done + 1)]


def test_a_budget_adds_no_round_to_those_that_were_requested() -> None:
    clock = Clock()
    candidate = clock.candidate("a", lambda _: 100)
    timings = measure_interleaved([candidate], 4, 0, seed=0, budget_seconds=0.0, settle=at_rest, clock_ns=clock)
    assert timings["a"].samples_ms.size == 4


def test_the_report_contains_all_samples() -> None:
    clock = Clock()
    candidates = [clock.candidate("slow", lambda call: 30 + call), clock.candidate("fast", lambda call: 10 + call)]
    timings = measure_interleaved(candidates, 12, 1, seed=0, settle=at_rest, clock_ns=clock)
    told = json.loads(json.dumps(latency.report(candidates, timings, ["slow"])))
    rows = {row["name"]: np.array(row["samples_ms"]) for row in told["results"]}
    np.testing.assert_allclose(rows["fast"], np.arange(11, 23))
    assert told["ratios"][0]["ratio"] == pytest.approx(float(np.median(rows["slow"] / rows["fast"])))


def test_freeing_the_result_is_not_timed() -> None:
    clock = Clock()

    class Large:
        def __del__(self) -> None:
            clock.spend(1000)

    def run() -> Large:
        clock.spend(3)
        return Large()

    timings = measure_interleaved([Candidate("a", "", "", "", run)], 3, 0, seed=0, settle=at_rest, clock_ns=clock)
    np.testing.assert_allclose(timings["a"].samples_ms, [3, 3, 3])


def test_waiting_before_each_run_is_not_timed_and_its_failures_are_counted() -> None:
    clock = Clock()
    answers = iter([True, True] + [False, True] * 3)

    def settle() -> bool:
        clock.log.append("settle")
        clock.spend(500)
        return next(answers)

    timings = measure_interleaved([clock.candidate("a", lambda _: 1)], 6, 2, seed=0, settle=settle, clock_ns=clock)
    assert clock.log == ["settle", "a"] * 8
    assert timings["a"].samples_ms.max() == 1
    assert timings["a"].disturbed_n == 3


def test_waiting_for_quiet_sees_a_spinning_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    spinner = threading.Thread(target=spin)
    monkeypatch.setattr(latency, "QUIET_PATIENCE_SECONDS", 0.2)
    spinner.start()
    try:
        was_quiet = latency.wait_until_quiet()
    finally:
        stop.set()
        spinner.join()
    monkeypatch.setattr(latency, "QUIET_PATIENCE_SECONDS", 5.0)
    assert not was_quiet
    assert latency.wait_until_quiet()


def test_the_garbage_collector_is_off_during_a_run_and_on_after_a_failed_one() -> None:
    states: list[bool] = []

    def fail() -> None:
        states.append(gc.isenabled())
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure_interleaved([Candidate("a", "", "", "", fail)], 3, 0, seed=0, settle=at_rest)
    assert states == [False]
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("names", "rounds", "warmup", "message"),
    [("aab", 3, 0, r"\['a'\]"), ("", 3, 0, "no candidates"), ("a", 2, 0, "at least 3"), ("a", 3, -1, "after -1")],
)
def test_an_invalid_plan_is_a_usage_error(names: str, rounds: int, warmup: int, message: str) -> None:
    candidates = [Clock().candidate(name, lambda _: 1) for name in names]
    with pytest.raises(UsageError, match=message):
        measure_interleaved(candidates, rounds, warmup, seed=0)


def test_percentiles_of_one_to_two_hundred() -> None:
    samples = np.random.default_rng(0).permutation(np.arange(1.0, 201.0))
    summary = summarize(samples)
    assert (summary.p50_ms, summary.p90_ms, summary.p95_ms, summary.p99_ms) == (100.5, 180, 190, 198)
    assert (summary.min_ms, summary.max_ms, summary.mean_ms, summary.n) == (1, 200, 100.5, 200)
    assert summary.first_ms is None


@pytest.mark.parametrize("n", [1, 2, 3, 9, 10, 11, 19, 20, 99, 100, 101])
def test_upper_percentiles_are_the_smallest_sample_with_that_share_at_or_below(n: int) -> None:
    samples = np.random.default_rng(n).exponential(size=n) + 0.1
    summary = summarize(samples)
    for percent, got in ((90, summary.p90_ms), (95, summary.p95_ms), (99, summary.p99_ms)):
        reaching = [s for s in samples if 100 * int(np.sum(samples <= s)) >= percent * n]
        assert got == min(reaching)
    assert (summary.p99_ms == summary.max_ms) == (n < 100)


@pytest.mark.parametrize(
    "samples", [[], [1.0, 0.0], [1.0, -2.0], [1.0, float("nan")], [1.0, float("inf")], [[1.0, 2.0]]]
)
def test_invalid_samples_are_a_usage_error(samples: list[float]) -> None:
    with pytest.raises(UsageError, match="positive milliseconds"):
        summarize(samples)


def test_common_drift_does_not_change_the_paired_ratio() -> None:
    drift = np.linspace(1, 10, 20)
    ratio = paired_ratio(30 * drift, 12 * drift, baseline="eager", candidate="ours")
    assert (ratio.baseline, ratio.candidate, ratio.n) == ("eager", "ours", 20)
    np.testing.assert_allclose([ratio.ratio, ratio.low, ratio.high], 2.5)


@pytest.mark.parametrize("rounds", [3, 4, 5])
def test_a_ratio_of_too_few_rounds_has_no_interval(rounds: int) -> None:
    ratio = paired_ratio([3.0] * rounds, [2.0] * rounds)
    assert (ratio.ratio, ratio.low, ratio.high) == (1.5, None, None)


@pytest.mark.parametrize(("rounds", "rank"), [(6, 1), (8, 1), (9, 2), (20, 6), (30, 10)])
def test_the_interval_of_a_median_has_the_ranks_of_a_published_table(rounds: int, rank: int) -> None:
    """Ranks of the sign test's 95 % interval, as in Conover, Practical Nonparametric Statistics."""
    values = np.random.default_rng(rounds).permutation(np.arange(1.0, rounds + 1))
    assert median_interval(values) == (rank, rounds + 1 - rank)


@pytest.mark.parametrize("rounds", [6, 8, 40])
def test_the_interval_has_at_least_its_nominal_coverage(rounds: int) -> None:
    random = np.random.default_rng(3)
    hits = 0
    for _ in range(1000):
        candidate_ms = random.lognormal(2, 0.3, rounds)
        baseline_ms = 1.5 * candidate_ms * random.lognormal(0, 0.1, rounds)
        ratio = paired_ratio(baseline_ms, candidate_ms)
        assert ratio.low is not None
        assert ratio.high is not None
        hits += ratio.low <= 1.5 <= ratio.high
        assert ratio.low <= ratio.ratio <= ratio.high
    assert hits >= 940


def test_ratios_need_the_same_rounds_of_both() -> None:
    with pytest.raises(UsageError, match="'eager' has 4, 'ours' has 3"):
        paired_ratio([1, 2, 3, 4], [1, 2, 3], baseline="eager", candidate="ours")


def timed(name: str, stage: str, ms: float) -> tuple[Candidate, Timing]:
    candidate = Candidate(name, "onnxruntime", "fp32", stage, lambda: None, {"threads": 2})
    return candidate, Timing(np.full(5, ms), np.array([9 * ms]), disturbed_n=1)


def test_the_report_has_the_contract_and_compares_within_a_stage_only() -> None:
    pairs = [timed("eager", "fused", 8), timed("ours", "fused", 2), timed("image", "image", 1)]
    timings = {candidate.name: timing for candidate, timing in pairs}
    report = json.loads(json.dumps(latency.report([candidate for candidate, _ in pairs], timings, ["eager"])))
    assert report["fingerprint"]["id"]
    row = report["results"][1]
    assert {key: row[key] for key in ("name", "backend", "precision", "stage", "p50_ms", "p90_ms", "p99_ms", "n")} == {
        "name": "ours",
        "backend": "onnxruntime",
        "precision": "fp32",
        "stage": "fused",
        "p50_ms": 2,
        "p90_ms": 2,
        "p99_ms": 2,
        "n": 5,
    }
    assert (row["first_ms"], row["threads"], row["disturbed_n"]) == (18, 2, 1)
    assert [(r["baseline"], r["candidate"], r["ratio"]) for r in report["ratios"]] == [("eager", "ours", 4)]


def test_an_unknown_baseline_is_named_with_the_known_ones() -> None:
    candidate, timing = timed("ours", "fused", 1)
    with pytest.raises(UsageError, match=r"'eagre'.*Use one of: ours"):
        latency.paired_ratios([candidate], {"ours": timing}, "eagre")
