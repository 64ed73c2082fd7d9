"""Trial of an ablation: train and measure one network, and store the result in a file so that it is done once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cclip_deploy.ablation.data import TrialData
from cclip_deploy.ablation.measures import TrialMeasures
from cclip_deploy.common.files import whole_file
from cclip_deploy.common.json_file import json_text
from cclip_deploy.common.threads import torch_threads
from cclip_deploy.datasets.sample import of_split
from cclip_deploy.errors import DataError, UsageError
from cclip_deploy.imaging.reading import read_image
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.train.config import TrainConfig

RESULT = "cell.json"
OnMessage = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """One training to run; if not `tested`, it is measured only on the val split."""

    arm: str
    setting: int
    config: TrainConfig
    data: TrialData
    folder: Path
    tested: bool


@dataclass(frozen=True)
class TrialResult:
    """Result of one training."""

    arm: str
    setting: int
    seed: int
    val_dice: float | None
    """Best validation Dice; None if the loss was not finite."""
    measures: TrialMeasures | None
    """Measures on test rows; None if the trial was not tested."""
    training_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, in which the measures are called "numbers"."""
        numbers = {} if self.measures is None else self.measures.to_dict()
        values = {"numbers" if name == "measures" else name: value for name, value in self.__dict__.items()}
        return {**values, "numbers": numbers}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TrialResult:
        """Return the result that `to_dict` described."""
        others = {name: value for name, value in values.items() if name != "numbers"}
        numbers = values["numbers"]
        return TrialResult(measures=TrialMeasures.from_dict(numbers) if numbers else None, **others)


def run_trial(trial: Trial, on_message: OnMessage = lambda message: None) -> TrialResult:
    """Train and measure a trial, or read its stored result. An interrupted training resumes from its last state.

    Raises:
        UsageError: the folder holds another training, or the loss of a tested trial is not finite.
        DataError: the data set has no rows to validate or test on.
    """
    from cclip_deploy.train.state import Identity
    from cclip_deploy.train.training_set import data_fingerprint

    data = trial.data
    samples = data.read(data.training)
    fingerprints = {split: data_fingerprint(of_split(samples, split)) for split in ("train", "val")}
    if trial.tested:
        fingerprints |= {f"test {name}": data_fingerprint(data.test_rows(name)) for name in data.tests}
    identity = Identity.of(trial.config, fingerprints)
    path = trial.folder / RESULT
    if path.exists():
        return _read(path, identity)
    with torch_threads(trial.config.threads):
        result = _train_and_measure(trial, on_message)
    record = {"identity": {"recipe": identity.recipe, "data": identity.data}, "result": result.to_dict()}
    with whole_file(path) as unfinished:
        unfinished.write_text(json_text(record), encoding="utf-8")
    _clear(trial.folder)
    return result


def _read(path: Path, identity: Any) -> TrialResult:
    from cclip_deploy.train.state import Identity

    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        then, result = Identity(**record["identity"]), TrialResult.from_dict(record["result"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}). Delete its folder to repeat that training.") from error
    differing = then.differences(identity)
    if differing:
        raise UsageError(
            f"{path} is the result of another training, which differs in {'; '.join(differing)}. "
            "Choose another output folder."
        )
    return result


def _train_and_measure(trial: Trial, on_message: OnMessage) -> TrialResult:
    from cclip_deploy.train.loop import STOPPED_BATCH
    from cclip_deploy.train.run import RunOptions, train

    def on_progress(progress: Any) -> None:
        if progress.step % 10 == 0:
            on_message(f"{trial.folder.name}: step {progress.step} of {progress.steps}, loss {progress.loss:.3f}")

    seed = trial.config.seed
    try:
        options = RunOptions(resume=True, tensorboard=False)
        report = train(trial.config, trial.data.training, trial.folder, on_progress, options)
    except UsageError:
        if trial.tested or not (trial.folder / STOPPED_BATCH).exists():
            raise
        return TrialResult(trial.arm, trial.setting, seed, None, None, 0.0)
    assert report.best_dice is not None
    measures = _measure(trial, report.checkpoint, on_message) if trial.tested else None
    return TrialResult(trial.arm, trial.setting, seed, report.best_dice, measures, report.training_s)


def _measure(trial: Trial, checkpoint: Path, on_message: OnMessage) -> TrialMeasures:
    """Measure a trained network on the test rows."""
    from cclip_deploy.evaluation.causal import measure_causal_masks, measure_toggle_effect
    from cclip_deploy.evaluation.controls import make_controls
    from cclip_deploy.evaluation.models import CheckpointModel
    from cclip_deploy.evaluation.split import MeasurementOptions, measure_split
    from cclip_deploy.model.checkpoint import load_checkpoint

    config, data = trial.config, trial.data
    network = CheckpointModel(load_checkpoint(checkpoint), config.form, PromptTokenizer.from_open_clip())
    settings = MeasurementOptions(network.threshold, 2.0, worst=0)
    dice: dict[str, float] = {}
    shuffled_dice: list[float] = []
    for place, name in enumerate(data.tests):
        on_message(f"{trial.folder.name}: measuring on {name}")
        rows = data.test_rows(name)
        shuffled = make_controls([row.text for row in rows])[:1] if place == 0 else []
        measured = measure_split(network, rows, shuffled, settings).rows
        dice[name] = float(np.mean([row.overlap.dice for row in measured]))
        shuffled_dice += [row.controls["shuffled"].dice for row in measured if "shuffled" in row.controls]
    images = dict.fromkeys(row.image for row in data.test_rows(next(iter(data.tests))))
    pixels = (read_image(image).pixels for image in images)
    return TrialMeasures(
        masks=measure_causal_masks(network.loaded.model, pixels, config.image_hw),
        **{f"dice_{name}": value for name, value in dice.items()},
        drop=None if data.films is None else dice["id"] - dice["anti"],
        toggle=None if data.films is None else measure_toggle_effect(network, data.toggled_images()),
        dice_shuffled=float(np.mean(shuffled_dice)) if shuffled_dice else None,
    )


def _clear(folder: Path) -> None:
    """Delete the files that are needed only to resume."""
    from cclip_deploy.train.loop import LAST
    from cclip_deploy.train.state import STATE

    for name in (STATE, LAST):
        (folder / name).unlink(missing_ok=True)
