"""Training runs: train a recipe on a data set, and write checkpoints, state, logs and record to a folder."""

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
    from cclip_deploy.train.state import TrainState

OnMessage = Callable[[str], None]


@dataclass(frozen=True)
class RunOptions:
    """Options of a run that do not change the trained weights, except for `dry_run`."""

    resume: bool = False
    """Resume from the state in the folder, or start if there is none."""
    tensorboard: bool = True
    dry_run: bool = False
    """Run one step and one validation on the first images, in a temporary folder."""


@dataclass(frozen=True)
class TrainReport:
    """Result of a training run."""

    folder: Path
    checkpoint: Path
    """best.safetensors, or last.safetensors if there was no validation."""
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
    """On the val split, at the network's image size."""
    best_epoch: int | None
    mask_means: tuple[float, float, float]
    """Means of the masks 3, 4, 5 over the last tenth of the steps."""
    loading_s: float
    training_s: float
    """Time of all steps, including those before a resume and without validations."""
    waiting_share: float
    """Fraction of `training_s` spent waiting for data."""
    resumed_at_step: int
    clip: ClipStart | None
    rank: int = 0
    """Rank of the reporting process; rank 0 writes the files."""
    history: tuple[dict[str, Any], ...] = field(default=(), repr=False)


def train(
    config: TrainConfig,
    data_folder: Path,
    run_folder: Path,
    on_progress: OnProgress = lambda progress: None,
    options: RunOptions = RunOptions(),
    on_message: OnMessage = lambda message: None,
) -> TrainReport:
    """Train on a data set of any layout, and write checkpoints, state, logs and record to `run_folder`.

    The same recipe, data and machine give bit-identical weights, whether or not the run was interrupted and resumed.

    Raises:
        DataError: the data set is invalid.
        UsageError: the folder holds another training, or the loss is not finite.
        TargetInUse: another run uses the folder.
        EnvironmentIssue: a package or device is missing, or the disk is full; earlier files are kept.
    """
    require_training_packages()
    if config.clip_weights is not None:
        from cclip_deploy.model.clip_start import check_clip_source

        check_clip_source(config.clip_weights)
    if options.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            shortened = config.model_copy(update={"epochs": 1})
            return _train(shortened, data_folder, Path(folder), on_progress, options, on_message)
    _check_folder(run_folder, options)
    return _train(config, data_folder, run_folder, on_progress, options, on_message)


def find_data(config: TrainConfig, on_message: OnMessage = lambda message: None) -> Path:
    """Return the recipe's data folder; generate its synthetic images if the folder does not exist.

    Raises:
        UsageError: the recipe names no data set.
        EnvironmentIssue: a training package is missing; nothing was generated.
    """
    require_training_packages()
    folder, synthetic = config.data.folder, config.data.synthetic
    if folder is None:
        raise UsageError("The recipe names no data set. Give --data FOLDER, or set data.folder in the recipe.")
    if synthetic is not None and not folder.exists():
        on_message(f"Generating {synthetic.images} synthetic images in {folder}")
        counts = split_counts(synthetic.images)
        write_dataset(folder, counts, config.image_hw, synthetic.seed, prompts_per_image=synthetic.prompts_per_image)
    return folder


def _train(
    config: TrainConfig,
    data_folder: Path,
    folder: Path,
    on_progress: OnProgress,
    options: RunOptions,
    on_message: OnMessage,
) -> TrainReport:
    from cclip_deploy.train.devices import launch

    started_s = time.perf_counter()
    fabric = launch(config.devices)
    with writing_into(folder) if fabric.is_global_zero else nullcontext():
        if fabric.is_global_zero:
            _check_folder(folder, options)
        run = _Run(config, data_folder, folder, options)
        return _train_in(run, fabric, started_s, on_progress, on_message)


@dataclass(frozen=True)
class _Run:
    config: TrainConfig
    data_folder: Path
    folder: Path
    options: RunOptions


def _train_in(
    run: _Run, fabric: Fabric, started_s: float, on_progress: OnProgress, on_message: OnMessage
) -> TrainReport:
    import torch

    from cclip_deploy.train.logs import TrainLog, write_record
    from cclip_deploy.train.loop import Training, run_epochs
    from cclip_deploy.train.state import STATE, Identity, TrainingPosition, load_state

    config, data_folder, folder, options = run.config, run.data_folder, run.folder, run.options
    on_message(f"Reading {data_folder}")
    tokenizer = PromptTokenizer.from_open_clip()
    data_set = read_data_set(data_folder, config.data.options())
    if data_set.repaired:
        on_message(f"Corrected misspelled words in {len(data_set.repaired)} prompts; `cclip-deploy data` lists them")
    splits = _read_splits(data_set, config, options)
    identity = Identity.of(config, {split: data_fingerprint(rows) for split, rows in splits.items()})
    train_set, validation_set = (
        open_training_set(splits[split], tokenizer, config) if split in splits else None for split in ("train", "val")
    )
    assert train_set is not None
    with _threads_and_seed(config, fabric):
        state, clip = _make_state(config, fabric, on_message)
        resumed = options.resume and (folder / STATE).exists()
        progress = load_state(folder, state, identity) if resumed else TrainingPosition()
        record = _describe(config, data_folder, identity, clip, torch.__version__)
        record["repaired_prompts"] = len(data_set.repaired)
        loaded_s = time.perf_counter() - started_s
        first_step = len(progress.step_losses)
        with TrainLog(folder, first_step, options.tensorboard and fabric.is_global_zero) as log:
            training = Training(
                config, folder, train_set, validation_set, tokenizer, state, progress, identity, log, record,
                on_progress,
            )  # fmt: skip
            on_message(f"Training on {len(train_set.images)} images, {training.steps_per_epoch} steps an epoch")
            run_epochs(training)
    report = _report(training, clip, first_step, loaded_s)
    if fabric.is_global_zero:
        write_record(folder, {**record, "epochs": progress.history, "result": _to_json(report)})
    return report


def _check_folder(folder: Path, options: RunOptions) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file. Choose another folder for the training.")
    check_writable(folder)
    if folder.is_dir() and not all(map(is_bookkeeping, folder.iterdir())) and not options.resume:
        raise UsageError(f"{folder} is not empty. Continue with --resume, or choose another folder.")


def _read_splits(data_set: DataSet, config: TrainConfig, options: RunOptions) -> dict[str, list[Sample]]:
    """Return the rows of the train split, and of the val split if there is one."""
    splits = {"train": of_split(data_set.samples, "train")}
    if any(sample.split == "val" for sample in data_set.samples):
        splits["val"] = of_split(data_set.samples, "val")
    elif config.patience is not None:
        raise DataError(
            "The recipe sets patience, but the data set has no rows of split 'val'. Add some, or remove patience."
        )
    if options.dry_run:
        one_step = config.images_per_batch * config.accumulate * config.devices.count * config.devices.nodes
        return {split: _of_first_images(rows, one_step) for split, rows in splits.items()}
    return splits


def _of_first_images(samples: list[Sample], count: int) -> list[Sample]:
    chosen = set(list(dict.fromkeys(sample.image for sample in samples))[:count])
    return [sample for sample in samples if sample.image in chosen]


@contextmanager
def _threads_and_seed(config: TrainConfig, fabric: Fabric) -> Iterator[None]:
    """Set the recipe's thread count and seed within the block, and restore the caller's afterwards."""
    import torch

    devices = [fabric.device] if fabric.device.type == "cuda" else []
    with torch_threads(config.threads), torch.random.fork_rng(devices):
        torch.manual_seed(config.seed)
        yield


def _make_state(config: TrainConfig, fabric: Fabric, on_message: OnMessage) -> tuple[TrainState, ClipStart | None]:
    from cclip_deploy.model.clip_start import load_clip_weights
    from cclip_deploy.model.network import CausalCLIPSeg
    from cclip_deploy.train.devices import move_to_device
    from cclip_deploy.train.optimizers import freeze, make_average, make_optimizers
    from cclip_deploy.train.state import TrainState

    model = CausalCLIPSeg(CONFIGS[config.model])
    clip = None
    if config.clip_weights is not None:
        on_message(f"Loading CLIP weights {config.clip_weights} into both towers")
        clip = load_clip_weights(model, config.clip_weights)
    if config.start_checkpoint is not None:
        on_message(f"Loading the start checkpoint {config.start_checkpoint}")
        _start_from(model, config.start_checkpoint)
    move_to_device(model, fabric, config.devices.precision)
    frozen = freeze(model, config)
    wrapped = fabric.setup_optimizers(*make_optimizers(model, config))
    optimizers = list(wrapped) if isinstance(wrapped, tuple) else [wrapped]
    return TrainState(fabric, model, frozen, optimizers, make_average(model, config)), clip


def _start_from(model: CausalCLIPSeg, path: Path) -> None:
    from cclip_deploy.model.checkpoint import load_checkpoint

    start = load_checkpoint(path).model
    if start.config != model.config:
        raise UsageError(
            f"{path} has a network of config {start.config.name!r}, but the recipe trains {model.config.name!r}. "
            "Use a checkpoint of the recipe's model, or change `model`."
        )
    model.load_state_dict(start.state_dict())


def _describe(
    config: TrainConfig, data_folder: Path, identity: Any, clip: ClipStart | None, torch_version: str
) -> dict[str, Any]:
    """Return the part of run.json that is known before training."""
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
    losses = np.array(progress.step_losses)
    last = losses[-math.ceil(len(losses) / 10) :].mean(axis=0)
    return TrainReport(
        folder=training.folder,
        checkpoint=training.folder / (LAST if progress.best_dice is None else BEST),
        images=len(data.images),
        rows=len(data.tokens),
        cut_prompts=data.cut_prompts,
        steps=len(losses),
        epochs=progress.epoch,
        stopped_early=progress.stopped_early,
        first_loss=float(losses[0, 0]),
        last_loss=float(last[0]),
        best_dice=progress.best_dice,
        best_epoch=progress.best_epoch,
        mask_means=(float(last[3]), float(last[4]), float(last[5])),
        loading_s=loaded_s,
        training_s=progress.stepping_s,
        waiting_share=progress.waiting_s / progress.stepping_s,
        resumed_at_step=first_step,
        clip=clip,
        rank=training.shard.rank,
        history=tuple(progress.history),
    )


def _to_json(report: TrainReport) -> dict[str, Any]:
    """Return the report in JSON form, without what run.json has elsewhere."""
    excluded = ("folder", "clip", "history", "rank")
    values = {key: value for key, value in report.__dict__.items() if key not in excluded}
    return {**values, "checkpoint": report.checkpoint.name, "mask_means": list(report.mask_means)}
