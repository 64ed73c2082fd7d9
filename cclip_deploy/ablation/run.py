"""Run an ablation: choose settings on the validation split, then train and test every arm with every seed.

With synthetic images, each seed has its own images, initialization and order, which all arms share; differences
between arms are therefore paired. Test sets are not used before the settings are chosen.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean

from cclip_deploy.ablation.data import prepare_data
from cclip_deploy.ablation.measures import MEASURES, Measure
from cclip_deploy.ablation.plan import AblationPlan
from cclip_deploy.ablation.trial import Trial, TrialResult, run_trial
from cclip_deploy.common.files import whole_file, writing_into
from cclip_deploy.common.json_file import json_text, read_json
from cclip_deploy.common.locks import is_bookkeeping
from cclip_deploy.environment.packages import require_training_packages
from cclip_deploy.errors import UsageError

PLAN = "plan.json"
OnMessage = Callable[[str], None]


@dataclass(frozen=True)
class Ablation:
    """Results of an ablation."""

    plan: AblationPlan
    tuning: dict[str, tuple[TrialResult, ...]]
    """For every arm with several settings, one training per setting."""
    choice: dict[str, int]
    """Index of the chosen setting of every arm."""
    results: tuple[TrialResult, ...]
    """By arm, then in the order of the seeds."""

    def measures(self) -> list[Measure]:
        """Return the measures that all results have."""
        return [m for m in MEASURES if all(m.of(r.measures) is not None for r in self.results if r.measures)]

    def values(self, arm: str, measure: Measure) -> list[float]:
        """Return a measure of an arm, one value per seed."""
        values = [measure.of(result.measures) for result in self.results if result.arm == arm and result.measures]
        return [value for value in values if value is not None]

    def mask_means(self, arm: str, statistic: str) -> tuple[float, ...]:
        """Return the mean over seeds of a mask statistic of an arm, for levels 3, 4, 5."""
        masks = [result.measures.masks for result in self.results if result.arm == arm and result.measures]
        return tuple(fmean(levels) for levels in zip(*(getattr(m, statistic) for m in masks), strict=True))


def ablate(plan: AblationPlan, output: Path, jobs: int = 1, on_message: OnMessage = lambda message: None) -> Ablation:
    """Run the trials of a plan that are not done yet, `jobs` at a time in separate processes.

    Raises:
        UsageError: the folder holds another ablation, or the loss of a trial is not finite.
        DataError: the data set has no val or test split.
        TargetInUse: another run writes to the folder.
        EnvironmentIssue: a package is missing, or the disk is full; finished trials are kept.
    """
    require_training_packages()
    with writing_into(output):
        return _ablate(plan, output, jobs, on_message)


def _ablate(plan: AblationPlan, output: Path, jobs: int, on_message: OnMessage) -> Ablation:
    _check_folder(output, plan)
    tuned = [arm for arm in plan.arms if len(plan.settings_of(arm)) > 1 and plan.arms[arm].settings_of is None]
    tuning_trials = [
        _make_trial(plan, output, arm, setting, plan.tuning_seed, False, on_message)
        for arm in tuned
        for setting in range(len(plan.settings_of(arm)))
    ]
    tried = _run(tuning_trials, jobs, on_message)
    tuning = {arm: tuple(result for result in tried if result.arm == arm) for arm in tuned}
    choice = {arm: _best(arm, tuning.get(plan.arms[arm].settings_of or arm)) for arm in plan.arms}
    trials = [
        _make_trial(plan, output, arm, choice[arm], seed, True, on_message) for arm in plan.arms for seed in plan.seeds
    ]  # fmt: skip
    return Ablation(plan, tuning, choice, tuple(_run(trials, jobs, on_message)))


def _check_folder(output: Path, plan: AblationPlan) -> None:
    """Record the plan's images in the folder, or check them against it; seeds, arms and settings may change later."""
    record = {"films": None if plan.films is None else plan.films.model_dump(mode="json")}
    path = output / PLAN
    if path.exists():
        then = read_json(path)
        if then != record:
            raise UsageError(f"{output} holds an ablation on other images. Choose another output folder.")
        return
    if output.exists() and (not output.is_dir() or not all(map(is_bookkeeping, output.iterdir()))):
        raise UsageError(f"{output} exists and holds no ablation. Choose another output folder.")
    with whole_file(path) as unfinished:
        unfinished.write_text(json_text(record), encoding="utf-8")


def _make_trial(
    plan: AblationPlan, output: Path, arm: str, setting: int, seed: int, tested: bool, on_message: OnMessage
) -> Trial:  # fmt: skip
    config, data = (
        plan.recipe_of(arm, setting, seed),
        prepare_data(plan, output / "films", arm, seed, tested, on_message),
    )
    folder = output / ("grid" if tested else "tuning") / f"{arm}-setting{setting + 1}-seed{seed}"
    return Trial(arm, setting, config, data, folder, tested)


def _best(arm: str, tried: Sequence[TrialResult] | None) -> int:
    """Return the setting with the highest validation Dice; the first of equal ones."""
    if not tried:
        return 0
    usable = [result for result in tried if result.val_dice is not None]
    if not usable:
        raise UsageError(f"The loss of arm {arm} is not finite with any setting. Lower its learning_rate.")
    return max(usable, key=lambda result: result.val_dice or 0.0).setting


def _run(trials: Sequence[Trial], jobs: int, on_message: OnMessage) -> list[TrialResult]:
    """Run the trials and return their results in order."""
    started_s = time.monotonic()
    if jobs == 1:
        return [run_trial(trial, on_message) for trial in trials]
    with _processes(jobs) as pool:
        running = {pool.submit(run_trial, trial): number for number, trial in enumerate(trials)}
        results: dict[int, TrialResult] = {}
        for future in as_completed(running):
            results[running[future]] = future.result()
            done = len(results)
            left_s = (time.monotonic() - started_s) / done * (len(trials) - done)
            trial = trials[running[future]]
            on_message(f"{trial.folder.name} done, {done} of {len(trials)}, {timedelta(seconds=round(left_s))} left")
    return [results[number] for number in range(len(trials))]


@contextmanager
def _processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of new processes, which are terminated at once if the block fails or is interrupted."""
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
