"""Count the trainings of an ablation and estimate their time, without running it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from cclip_deploy.ablation.plan import AblationPlan
from cclip_deploy.ablation.trial import RESULT
from cclip_deploy.datasets.sample import of_split
from cclip_deploy.environment.packages import require_training_packages
from cclip_deploy.train.config import TrainConfig

OnMessage = Callable[[str], None]


@dataclass(frozen=True)
class ArmEstimate:
    """The trainings of an arm.

    Attributes:
        tuning: trainings to choose its settings, one for each; 0 if there is no choice.
        seeds: trainings with the chosen settings, one for each seed.
        done: of both together, with a result in the output folder.
        steps: of each training.
        step_s: measured time of one step, in seconds.
    """

    arm: str
    tuning: int
    seeds: int
    done: int
    steps: int
    step_s: float

    @property
    def left(self) -> int:
        """Number of trainings that are not done."""
        return self.tuning + self.seeds - self.done

    @property
    def left_s(self) -> float:
        """Seconds of the steps that are left, one training at a time."""
        return self.left * self.steps * self.step_s


@dataclass(frozen=True)
class Estimate:
    """The trainings of all arms, and how many run at the same time."""

    arms: tuple[ArmEstimate, ...]
    jobs: int

    @property
    def left_s(self) -> float:
        """Estimated seconds, if `jobs` trainings at a time take as long as one."""
        return sum(arm.left_s for arm in self.arms) / self.jobs

    def describe(self) -> str:
        """Return a sentence with the counts and the estimated time."""
        count, done = sum(arm.tuning + arm.seeds for arm in self.arms), sum(arm.done for arm in self.arms)
        return (
            f"{count} trainings, {done} of them done. The steps of the others take about "
            f"{timedelta(seconds=round(self.left_s))} with --jobs {self.jobs}; validation and tests are not included."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        arms = [{**arm.__dict__, "left_s": arm.left_s} for arm in self.arms]
        return {"arms": arms, "jobs": self.jobs, "left_s": self.left_s}


def estimate(plan: AblationPlan, output: Path, jobs: int = 1, on_message: OnMessage = lambda message: None) -> Estimate:
    """Count the trainings of a plan, and time two steps of every arm on its first images; the second counts.

    Nothing is written to `output`.

    Raises:
        UsageError: the loss of a step is not finite.
        DataError: the data set has no val or test split.
        EnvironmentIssue: a package is missing.
    """
    require_training_packages()
    arms = []
    for arm, described in plan.arms.items():
        config = plan.recipe_of(arm, 0, plan.tuning_seed)
        settings = len(plan.settings_of(arm)) if described.settings_of is None else 1
        tuning = settings if settings > 1 else 0
        folders = [output / "tuning" / f"{arm}-setting{n + 1}-seed{plan.tuning_seed}" for n in range(tuning)]
        done = sum((folder / RESULT).exists() for folder in folders)
        done += sum(any(output.glob(f"grid/{arm}-setting*-seed{seed}/{RESULT}")) for seed in plan.seeds)
        on_message(f"Timing a step of {arm}")
        steps, step_s = _time_step(plan, config)
        arms.append(ArmEstimate(arm, tuning, len(plan.seeds), done, steps, step_s))
    return Estimate(tuple(arms), jobs)


def _time_step(plan: AblationPlan, config: TrainConfig) -> tuple[int, float]:
    """Return the number of steps of a training and the time of one in seconds."""
    from cclip_deploy.datasets.reading import read_data_set
    from cclip_deploy.datasets.synthetic.generator import write_dataset
    from cclip_deploy.train.batches import passes_per_epoch
    from cclip_deploy.train.run import RunOptions, train

    processes = config.devices.count * config.devices.nodes
    with tempfile.TemporaryDirectory(prefix="cclip-ablate-") as scratch:
        folder = config.data.folder
        if folder is None:
            assert plan.films is not None
            images, folder = plan.films.train, Path(scratch) / "images"
            counts = {"train": config.images_per_batch * config.accumulate * processes, "val": 2}
            write_dataset(folder, counts, config.image_hw, 0, prompts_per_image=plan.films.prompts_per_film)
        else:
            rows = of_split(read_data_set(folder, config.data.options()).samples, "train")
            images = len({row.image for row in rows})
        options = RunOptions(tensorboard=False, dry_run=True)
        reports = [train(config, folder, Path(scratch) / "run", options=options) for _ in range(2)]
    return config.epochs * (passes_per_epoch(images, config, processes) // config.accumulate), reports[-1].training_s
