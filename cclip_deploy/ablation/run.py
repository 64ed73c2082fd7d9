"""Ablate: choose settings on the validation split, train every arm with every seed, and hold them against each other.

A seed is a whole replication where films are drawn: its own films, its own start, its own order; the arms share them,
so that they are compared in pairs. Nothing of the test sets is looked at before the settings are chosen.
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

from cclip_deploy.ablation.data import prepare_data
from cclip_deploy.ablation.plan import AblationPlan
from cclip_deploy.ablation.trial import Trial, TrialResult, run_trial
from cclip_deploy.common.files import whole_file, writing_into
from cclip_deploy.common.locks import is_bookkeeping
from cclip_deploy.common.names import json_text
from cclip_deploy.common.paths import read_json
from cclip_deploy.environment.packages import require_training_packages
from cclip_deploy.errors import UsageError

PLAN = "plan.json"
OnMessage = Callable[[str], None]


@dataclass(frozen=True)
class Ablation:
    """Everything that came out."""

    plan: AblationPlan
    tuning: dict[str, tuple[TrialResult, ...]]
    """Of every arm with more than one setting: one training a setting."""
    choice: dict[str, int]
    """The setting of every arm."""
    results: tuple[TrialResult, ...]
    """Arm by arm, in the order of the seeds."""

    def values(self, arm: str, measure: str) -> list[float]:
        """One number a seed."""
        return [result.numbers[measure] for result in self.results if result.arm == arm]


def ablate(plan: AblationPlan, output: Path, jobs: int = 1, on_message: OnMessage = lambda message: None) -> Ablation:
    """Run whatever of a plan is not done yet in a folder; `jobs` trainings at once, each in a process of its own.

    Raises:
        UsageError: the folder holds another ablation, or a loss stopped being a number.
        DataError: a data set without val or test split.
        TargetInUse: another run writes into the folder.
        EnvironmentIssue: a package is missing, or the disk is full; what was done is kept.
    """
    require_training_packages()
    with writing_into(output):
        return _ablate(plan, output, jobs, on_message)


def _ablate(plan: AblationPlan, output: Path, jobs: int, on_message: OnMessage) -> Ablation:
    _claim(output, plan)
    tuned = [arm for arm in plan.arms if len(plan.settings_of(arm)) > 1 and plan.arms[arm].settings_of is None]
    tries = [
        _cell(plan, output, arm, setting, plan.tuning_seed, False, on_message)
        for arm in tuned
        for setting in range(len(plan.settings_of(arm)))
    ]
    tried = _run(tries, jobs, on_message)
    tuning = {arm: tuple(result for result in tried if result.arm == arm) for arm in tuned}
    choice = {arm: _best(arm, tuning.get(plan.arms[arm].settings_of or arm)) for arm in plan.arms}
    cells = [
        _cell(plan, output, arm, choice[arm], seed, True, on_message) for arm in plan.arms for seed in plan.seeds
    ]  # fmt: skip
    return Ablation(plan, tuning, choice, tuple(_run(cells, jobs, on_message)))


def _claim(output: Path, plan: AblationPlan) -> None:
    """Write down what the folder is for; seeds, arms and settings may be added to an ablation later, films not."""
    claim = {"films": None if plan.films is None else plan.films.model_dump(mode="json")}
    path = output / PLAN
    if path.exists():
        then = read_json(path)
        if then != claim:
            raise UsageError(f"{output} holds an ablation on other films. Choose another output folder.")
        return
    if output.exists() and (not output.is_dir() or not all(map(is_bookkeeping, output.iterdir()))):
        raise UsageError(f"{output} exists and holds no ablation. Choose another output folder.")
    with whole_file(path) as unfinished:
        unfinished.write_text(json_text(claim), encoding="utf-8")


def _cell(
    plan: AblationPlan, output: Path, arm: str, setting: int, seed: int, tested: bool, on_message: OnMessage
) -> Trial:  # fmt: skip
    config, data = (
        plan.recipe_of(arm, setting, seed),
        prepare_data(plan, output / "films", arm, seed, tested, on_message),
    )
    folder = output / ("grid" if tested else "tuning") / f"{arm}-setting{setting + 1}-seed{seed}"
    return Trial(arm, setting, config, data, folder, tested)


def _best(arm: str, tried: Sequence[TrialResult] | None) -> int:
    """The setting of the highest Dice on the val split, of equal ones the first."""
    if not tried:
        return 0
    usable = [result for result in tried if result.val_dice is not None]
    if not usable:
        raise UsageError(f"The loss stopped being a number with every setting of arm {arm}. Lower its learning_rate.")
    return max(usable, key=lambda result: result.val_dice or 0.0).setting


def _run(cells: Sequence[Trial], jobs: int, on_message: OnMessage) -> list[TrialResult]:
    """The results in the order of the cells."""
    started_s = time.monotonic()
    if jobs == 1:
        return [run_trial(cell, on_message) for cell in cells]
    with _processes(jobs) as pool:
        running = {pool.submit(run_trial, cell): number for number, cell in enumerate(cells)}
        results: dict[int, TrialResult] = {}
        for future in as_completed(running):
            results[running[future]] = future.result()
            done = len(results)
            left_s = (time.monotonic() - started_s) / done * (len(cells) - done)
            cell = cells[running[future]]
            on_message(f"{cell.folder.name} done, {done} of {len(cells)}, {timedelta(seconds=round(left_s))} left")
    return [results[number] for number in range(len(cells))]


@contextmanager
def _processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes; where the block fails, or is interrupted, they are ended at once and go on from their states."""
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
