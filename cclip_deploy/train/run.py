"""One training from a recipe to a folder: data, network, start, epochs, and the report of what came out."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cclip_deploy.common.files import writing_into
from cclip_deploy.common.locks import is_bookkeeping
from cclip_deploy.common.paths import check_writable
from cclip_deploy.common.threads import torch_threads
from cclip_deploy.datasets.reading import DataSet, read_data_set
from cclip_deploy.datasets.sample import Sample, of_split
from cclip_deploy.datasets.synthetic.generator import split_counts, write_dataset
from cclip_deploy.environment.packages import require_training_packages
from cclip_deploy.errors import DataError, UsageError
from cclip_deploy.model.config import CONFIGS
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.train.config import TrainConfig
from cclip_deploy.train.training_set import data_fingerprint, open_training_set

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from cclip_deploy.model.clip_start import ClipStart
    from cclip_deploy.model.network import CausalCLIPSeg
    from cclip_deploy.train.loop import OnProgress, Training
    from cclip_deploy.train.state import Learner

Tell = Callable[[str], None]


@dataclass(frozen=True)
class RunOptions:
    """How a training is run, which changes nothing about what it computes."""

    resume: bool = False
    """Go on from the state in the folder; begin where there is none."""
    tensorboard: bool = True
    dry_run: bool = False
    """One step and one validation on the first images, all in a folder that is deleted."""


@dataclass(frozen=True)
class TrainReport:
    """What a training did."""

    folder: Path
    checkpoint: Path
    """best.safetensors where there were validations, else last.safetensors."""
    images: int
    rows: int
    cut_prompts: int
    steps: int
    epochs: int
    stopped_early: bool
    first_loss: float
    last_loss: float
    """Mean over the last tenth of the steps."""
    best_dice: float | None
    """On the val split, at the network's own image size."""
    best_epoch: int | None
    mask_means: tuple[float, float, float]
    """Of the last tenth of the steps."""
    loading_s: float
    training_s: float
    """All steps, those before a resumption too, without validations."""
    waiting_share: float
    """Of training_s, waiting for data."""
    resumed_at_step: int
    clip: ClipStart | None
    rank: int = 0
    """Of the process that reports; 0 is the one that writes."""
    history: tuple[dict[str, Any], ...] = field(default=(), repr=False)


def train(
    config: TrainConfig,
    data_folder: Path,
    run_folder: Path,
    on_progress: OnProgress = lambda progress: None,
    options: RunOptions = RunOptions(),
    tell: Tell = lambda message: None,
) -> TrainReport:
    """Train on a data set of any layout and keep networks, state, logs and record in a folder.

    The same recipe, data and machine give the same weights, bit for bit, stopped and resumed or not.

    Raises:
        DataError: the data set is not what it should be.
        UsageError: the folder holds another training, or the loss stopped being a number.
        TargetInUse: another run trains in the folder.
        EnvironmentIssue: a package or a device is missing, or the disk did not take a file; what was saved before is
            still there.
    """
    require_training_packages()
    if options.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            shortened = config.model_copy(update={"epochs": 1})
            return _train(shortened, data_folder, Path(folder), on_progress, options, tell)
    _check_folder(run_folder, options)
    return _train(config, data_folder, run_folder, on_progress, options, tell)


def find_data(config: TrainConfig, tell: Tell = lambda message: None) -> Path:
    """The recipe's data folder, its synthetic films drawn where they are not there yet.

    Raises:
        UsageError: the recipe names no data set.
        EnvironmentIssue: a package for the training is missing; nothing was drawn.
    """
    require_training_packages()
    folder, films = config.data.folder, config.data.synthetic
    if folder is None:
        raise UsageError("The recipe names no data set. Give --data FOLDER, or data.folder in the recipe.")
    if films is not None and not folder.exists():
        tell(f"Drawing {films.images} synthetic films into {folder}")
        counts = split_counts(films.images)
        write_dataset(folder, counts, config.image_hw, films.seed, prompts_per_image=films.prompts_per_image)
    return folder


def _train(
    config: TrainConfig, data_folder: Path, folder: Path, on_progress: OnProgress, options: RunOptions, tell: Tell
) -> TrainReport:
    from cclip_deploy.train.devices import launch

    started_s = time.perf_counter()
    fabric = launch(config.devices)
    with writing_into(folder) if fabric.is_global_zero else nullcontext():
        if fabric.is_global_zero:
            _check_folder(folder, options)
        run = _Run(config, data_folder, folder, options)
        return _train_in(run, fabric, started_s, on_progress, tell)


@dataclass(frozen=True)
class _Run:
    config: TrainConfig
    data_folder: Path
    folder: Path
    options: RunOptions


def _train_in(run: _Run, fabric: Fabric, started_s: float, on_progress: OnProgress, tell: Tell) -> TrainReport:
    import torch

    from cclip_deploy.train.logs import TrainLog, write_record
    from cclip_deploy.train.loop import Training, run_epochs
    from cclip_deploy.train.state import STATE, Identity, TrainingPosition, load_state

    config, data_folder, folder, options = run.config, run.data_folder, run.folder, run.options
    tell(f"Reading {data_folder}")
    tokenizer = PromptTokenizer.from_open_clip()
    data_set = read_data_set(data_folder, config.data.layout, config.data.subject, config.data.allow_outside)
    if data_set.repaired:
        tell(f"Repaired typing errors in {len(data_set.repaired)} prompts; cclip-deploy data lists them")
    splits = _read_splits(data_set, config, options)
    identity = Identity.of(config, {split: data_fingerprint(rows) for split, rows in splits.items()})
    train_set, validation_set = (
        open_training_set(splits[split], tokenizer, config) if split in splits else None for split in ("train", "val")
    )
    assert train_set is not None
    with _own_settings(config, fabric):
        learner, clip = _make_learner(config, fabric, tell)
        resumed = options.resume and (folder / STATE).exists()
        progress = load_state(folder, learner, identity) if resumed else TrainingPosition()
        record = _describe(config, data_folder, identity, clip, torch.__version__)
        record["repaired_prompts"] = len(data_set.repaired)
        loaded_s = time.perf_counter() - started_s
        first_step = len(progress.told)
        with TrainLog(folder, first_step, options.tensorboard and fabric.is_global_zero) as journal:
            training = Training(
                config, folder, train_set, validation_set, tokenizer, learner, progress, identity, journal, record,
                on_progress,
            )  # fmt: skip
            tell(f"Training on {len(train_set.images)} images, {training.steps_per_epoch} steps an epoch")
            run_epochs(training)
    report = _report(training, clip, first_step, loaded_s)
    if fabric.is_global_zero:
        write_record(folder, {**record, "epochs": progress.history, "result": _plain(report)})
    return report


def _check_folder(folder: Path, options: RunOptions) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file. Choose another folder for the training.")
    check_writable(folder)
    if folder.is_dir() and not all(map(is_bookkeeping, folder.iterdir())) and not options.resume:
        raise UsageError(f"{folder} is not empty. Go on with --resume, or choose another folder.")


def _read_splits(data_set: DataSet, config: TrainConfig, options: RunOptions) -> dict[str, list[Sample]]:
    """The rows to train on, and those to validate on where there are any."""
    splits = {"train": of_split(data_set.samples, "train")}
    if any(sample.split == "val" for sample in data_set.samples):
        splits["val"] = of_split(data_set.samples, "val")
    elif config.patience is not None:
        raise DataError("The recipe has patience, and the data set no rows of split 'val'. Add some, or take it out.")
    if options.dry_run:
        enough = config.images_per_batch * config.accumulate * config.devices.count * config.devices.nodes
        return {split: _of_first_images(rows, enough) for split, rows in splits.items()}
    return splits


def _of_first_images(samples: list[Sample], count: int) -> list[Sample]:
    chosen = set(list(dict.fromkeys(sample.image for sample in samples))[:count])
    return [sample for sample in samples if sample.image in chosen]


@contextmanager
def _own_settings(config: TrainConfig, fabric: Fabric) -> Iterator[None]:
    """The recipe's threads and random numbers within, the caller's afterwards."""
    import torch

    devices = [fabric.device] if fabric.device.type == "cuda" else []
    with torch_threads(config.threads), torch.random.fork_rng(devices):
        torch.manual_seed(config.seed)
        yield


def _make_learner(config: TrainConfig, fabric: Fabric, tell: Tell) -> tuple[Learner, ClipStart | None]:
    from cclip_deploy.model.clip_start import load_clip_weights
    from cclip_deploy.model.network import CausalCLIPSeg
    from cclip_deploy.train.devices import move_to_device
    from cclip_deploy.train.optimizers import freeze, make_average, make_optimizers
    from cclip_deploy.train.state import Learner

    model = CausalCLIPSeg(CONFIGS[config.model])
    clip = None
    if config.clip_weights is not None:
        tell(f"Starting both towers from CLIP, {config.clip_weights}")
        clip = load_clip_weights(model, config.clip_weights)
    if config.start_checkpoint is not None:
        tell(f"Starting from {config.start_checkpoint}")
        _start_from(model, config.start_checkpoint)
    move_to_device(model, fabric, config.devices.precision)
    frozen = freeze(model, config)
    wrapped = fabric.setup_optimizers(*make_optimizers(model, config))
    optimizers = list(wrapped) if isinstance(wrapped, tuple) else [wrapped]
    return Learner(fabric, model, frozen, optimizers, make_average(model, config)), clip


def _start_from(model: CausalCLIPSeg, path: Path) -> None:
    from cclip_deploy.model.checkpoint import load_checkpoint

    start = load_checkpoint(path).model
    if start.config != model.config:
        raise UsageError(
            f"{path} is a network of config {start.config.name!r}, and the recipe trains {model.config.name!r}. "
            "Change one of them."
        )
    model.load_state_dict(start.state_dict())


def _describe(
    config: TrainConfig, data_folder: Path, identity: Any, clip: ClipStart | None, torch_version: str
) -> dict[str, Any]:
    """What run.json says before anything was trained."""
    from cclip_deploy import __version__

    start = None if clip is None else {"found": list(clip.found), "missing": list(clip.missing)}
    return {
        "cclip_deploy": __version__,
        "torch": torch_version,
        "recipe": config.model_dump(mode="json"),
        "data_folder": str(data_folder),
        "data": identity.data,
        "clip_start": start,
    }


def _report(training: Training, clip: ClipStart | None, first_step: int, loaded_s: float) -> TrainReport:
    from cclip_deploy.train.loop import BEST, LAST

    progress, data = training.progress, training.train_set
    told = np.array(progress.told)
    last = told[-math.ceil(len(told) / 10) :].mean(axis=0)
    return TrainReport(
        folder=training.folder,
        checkpoint=training.folder / (LAST if progress.best_dice is None else BEST),
        images=len(data.images),
        rows=len(data.tokens),
        cut_prompts=data.cut_prompts,
        steps=len(told),
        epochs=progress.epoch,
        stopped_early=progress.stopped_early,
        first_loss=float(told[0, 0]),
        last_loss=float(last[0]),
        best_dice=progress.best_dice,
        best_epoch=progress.best_epoch,
        mask_means=(float(last[3]), float(last[4]), float(last[5])),
        loading_s=loaded_s,
        training_s=progress.stepping_s,
        waiting_share=progress.waiting_s / progress.stepping_s,
        resumed_at_step=first_step,
        clip=clip,
        rank=training.share.rank,
        history=tuple(progress.history),
    )


def _plain(report: TrainReport) -> dict[str, Any]:
    """The report as JSON, without what run.json says elsewhere."""
    left_out = ("folder", "clip", "history", "rank")
    values = {key: value for key, value in report.__dict__.items() if key not in left_out}
    return {**values, "checkpoint": report.checkpoint.name, "mask_means": list(report.mask_means)}
