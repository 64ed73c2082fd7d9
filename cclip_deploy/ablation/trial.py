"""One training of an ablation: trained, measured, and kept as one small file, so that it is never done twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cclip_deploy.ablation.data import TrialData
from cclip_deploy.common.files import whole_file
from cclip_deploy.common.names import json_text
from cclip_deploy.common.threads import torch_threads
from cclip_deploy.datasets.sample import of_split
from cclip_deploy.errors import DataError, UsageError
from cclip_deploy.imaging.reading import read_image
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.train.config import TrainConfig

RESULT = "cell.json"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """One training that is asked for; those not `tested` are judged on the val split alone."""

    arm: str
    setting: int
    config: TrainConfig
    data: TrialData
    folder: Path
    tested: bool


@dataclass(frozen=True)
class TrialResult:
    """What one training came to."""

    arm: str
    setting: int
    seed: int
    val_dice: float | None
    """The best of its validations; None where its loss stopped being a number."""
    numbers: dict[str, float]
    """By the names of `ablation_report.MEASURES`; none of a training that was not tested."""
    training_s: float


def run_trial(cell: Trial, tell: Tell = lambda message: None) -> TrialResult:
    """Train, from its last state where there is one, and measure; or read what that gave before.

    Raises:
        UsageError: the folder holds another training, or the loss of a tested one stopped being a number.
        DataError: the data set has no rows to validate or test on.
    """
    from cclip_deploy.train.state import Identity
    from cclip_deploy.train.training_set import data_fingerprint

    data = cell.data
    samples = data.read(data.training)
    prints = {split: data_fingerprint(of_split(samples, split)) for split in ("train", "val")}
    if cell.tested:
        prints |= {f"test {name}": data_fingerprint(data.test_rows(name)) for name in data.tests}
    identity = Identity.of(cell.config, prints)
    path = cell.folder / RESULT
    if path.exists():
        return _read(path, identity)
    with torch_threads(cell.config.threads):
        result = _train_and_measure(cell, tell)
    record = {"identity": {"recipe": identity.recipe, "data": identity.data}, "result": asdict(result)}
    with whole_file(path) as unfinished:
        unfinished.write_text(json_text(record), encoding="utf-8")
    _clear(cell.folder)
    return result


def _read(path: Path, identity: Any) -> TrialResult:
    from cclip_deploy.train.state import Identity

    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        then, result = Identity(**record["identity"]), TrialResult(**record["result"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}). Delete its folder, and that training is done again.") from error
    differing = then.differences(identity)
    if differing:
        raise UsageError(
            f"{path} is of another training, which differs in {'; '.join(differing)}. Choose another output folder."
        )
    return result


def _train_and_measure(cell: Trial, tell: Tell) -> TrialResult:
    from cclip_deploy.train.loop import STOPPED_BATCH
    from cclip_deploy.train.run import RunOptions, train

    def told(progress: Any) -> None:
        if progress.step % 10 == 0:
            tell(f"{cell.folder.name}: step {progress.step} of {progress.steps}, loss {progress.loss:.3f}")

    seed = cell.config.seed
    try:
        options = RunOptions(resume=True, tensorboard=False)
        report = train(cell.config, cell.data.training, cell.folder, told, options)
    except UsageError:
        if cell.tested or not (cell.folder / STOPPED_BATCH).exists():
            raise
        return TrialResult(cell.arm, cell.setting, seed, None, {}, 0.0)
    assert report.best_dice is not None
    numbers = _measure(cell, report.checkpoint, tell) if cell.tested else {}
    return TrialResult(cell.arm, cell.setting, seed, report.best_dice, numbers, report.training_s)


def _measure(cell: Trial, checkpoint: Path, tell: Tell) -> dict[str, float]:
    """Every number of a trained network, on rows that neither training nor validation saw."""
    from cclip_deploy.evaluation.causal import measure_causal_masks, measure_toggle
    from cclip_deploy.evaluation.controls import make_controls
    from cclip_deploy.evaluation.models import CheckpointModel
    from cclip_deploy.evaluation.split import MeasuringOptions, measure_split
    from cclip_deploy.model.checkpoint import load_checkpoint

    config, data = cell.config, cell.data
    network = CheckpointModel(load_checkpoint(checkpoint), config.form, PromptTokenizer.from_open_clip())
    measuring, numbers = MeasuringOptions(network.threshold, 2.0, worst=0), {}
    for place, name in enumerate(data.tests):
        tell(f"{cell.folder.name}: measuring on {name}")
        rows = data.test_rows(name)
        shuffled = make_controls([row.text for row in rows])[:1] if place == 0 else []
        measured = measure_split(network, rows, shuffled, measuring).rows
        numbers[f"dice_{name}"] = float(np.mean([row.overlap.dice for row in measured]))
        answers = [row.controls["shuffled"].dice for row in measured if "shuffled" in row.controls]
        if answers:
            numbers["dice_shuffled"] = float(np.mean(answers))
    films = dict.fromkeys(row.image for row in data.test_rows(next(iter(data.tests))))
    masks = measure_causal_masks(network.loaded.model, (read_image(film).pixels for film in films), config.image_hw)
    for name, levels in asdict(masks).items():
        numbers |= {f"mask_{name}_{level}": value for level, value in zip((3, 4, 5), levels, strict=True)}
    if data.films is not None:
        numbers["drop"] = numbers["dice_id"] - numbers["dice_anti"]
        numbers["toggle"] = measure_toggle(network, data.toggled())
    return numbers


def _clear(folder: Path) -> None:
    """Take away what only a training that goes on needs."""
    from cclip_deploy.train.loop import LAST
    from cclip_deploy.train.state import STATE

    for name in (STATE, LAST):
        (folder / name).unlink(missing_ok=True)
