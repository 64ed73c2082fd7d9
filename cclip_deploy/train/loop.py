"""Steps and epochs: batches in, losses down, a state saved, until the recipe's end or no better Dice."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.optim import Optimizer

from cclip_deploy.common.files import whole_file
from cclip_deploy.errors import UsageError
from cclip_deploy.model.checkpoint import save_checkpoint
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.train.batches import Batch, Share, make_batch, passes_per_epoch, plan_epoch, read_ahead
from cclip_deploy.train.config import TrainConfig
from cclip_deploy.train.devices import average_gradients, mean_over_processes
from cclip_deploy.train.game import Losses, TensorBatch, main_losses, masker_losses, only_maskers_learn
from cclip_deploy.train.logs import PYRAMID_LEVELS, TrainLog, write_record
from cclip_deploy.train.optimizers import learning_rate_share, set_rates, start_training_mode
from cclip_deploy.train.state import Identity, Learner, TrainingPosition, save_state
from cclip_deploy.train.training_set import TrainingSet
from cclip_deploy.train.validation import draw_examples, measure_dice

LAST, BEST, STOPPED_BATCH = "last.safetensors", "best.safetensors", "stopped_batch.safetensors"
EXAMPLES = 4
TELL_EVERY_STEPS = 10


@dataclass(frozen=True)
class TrainProgress:
    """What a caller may show after a step."""

    step: int
    steps: int
    epoch: int
    loss: float
    learning_rate: float
    elapsed_s: float
    dice: float | None = None
    """Of the last validation, where there was one."""


OnProgress = Callable[[TrainProgress], None]


@dataclass
class Training:
    """A training under way."""

    config: TrainConfig
    folder: Path
    train_set: TrainingSet
    validation_set: TrainingSet | None
    tokenizer: PromptTokenizer
    learner: Learner
    progress: TrainingPosition
    identity: Identity
    journal: TrainLog
    record: dict[str, object]
    on_progress: OnProgress

    @property
    def share(self) -> Share:
        """This process among those that train together."""
        return Share(self.learner.fabric.global_rank, self.learner.fabric.world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of all processes together."""
        images = len(self.train_set.images)
        return passes_per_epoch(images, self.config, self.share.processes) // self.config.accumulate


def run_epochs(training: Training) -> None:
    """From where the progress is to the recipe's end.

    Raises:
        UsageError: the loss stopped being a number; the batch is in the run's folder.
        EnvironmentIssue: a state or a checkpoint could not be written; the ones before are still there.
    """
    while training.progress.epoch < training.config.epochs and not training.progress.stopped_early:
        _run_epoch(training)
        _end_epoch(training)


def _run_epoch(training: Training) -> None:
    config, progress = training.config, training.progress
    start_training_mode(training.learner.model, training.learner.frozen)
    steps, done = config.epochs * training.steps_per_epoch, progress.epoch * training.steps_per_epoch
    saved_at_s = looked_at_s = time.perf_counter()
    for batches, waited_s in _draw_steps(training):
        step = done + progress.steps_in_epoch
        rate_share = learning_rate_share(step, steps, config)
        set_rates(training.learner.optimizers, rate_share)
        progress.told.append(_take_step(training, batches))
        progress.steps_in_epoch += 1
        now_s = time.perf_counter()
        progress.stepping_s += now_s - looked_at_s
        progress.waiting_s += waited_s
        looked_at_s = now_s
        _tell_step(training, step, steps, rate_share)
        if now_s - saved_at_s > 60 * config.save_minutes:
            _save(training)
            saved_at_s = now_s


def _draw_steps(training: Training) -> Iterator[tuple[list[Batch], float]]:
    """The rest of the epoch's steps: `accumulate` batches each, and the seconds that were waited for them."""
    config, data, tokenizer, epoch = training.config, training.train_set, training.tokenizer, training.progress.epoch
    plan = plan_epoch(data, config, epoch, training.share)
    numbers = range(training.progress.steps_in_epoch * config.accumulate, len(plan))
    batches = read_ahead(
        lambda number: make_batch(data, plan[number], tokenizer, config, epoch), numbers, config.loader_threads
    )
    for _ in range(len(numbers) // config.accumulate):
        started_s = time.perf_counter()
        chosen = [next(batches) for _ in range(config.accumulate)]
        yield chosen, time.perf_counter() - started_s
    batches.close()  # type: ignore[attr-defined]


def _take_step(training: Training, batches: Sequence[Batch]) -> list[float]:
    """One step of every player; returns what `TrainingPosition.told` keeps, of the main one."""
    config, learner, epoch = training.config, training.learner, training.progress.epoch
    model = learner.model
    main, *adversaries = learner.optimizers
    told = _descend(training, main, batches, lambda batch: main_losses(model, batch, config, epoch))
    for adversary in adversaries:
        with only_maskers_learn(model):
            for _ in range(config.game.masker_steps):
                means = _descend(training, adversary, batches, lambda batch: masker_losses(model, batch, config))[3:]
                told = [*told[:3], *means]
    if learner.average is not None:
        learner.average.update_parameters(model)
    return told


def _descend(
    training: Training, optimizer: Optimizer, batches: Sequence[Batch], losses_of: Callable[[TensorBatch], Losses]
) -> list[float]:
    """One step down the mean loss of some batches; returns the means of what the losses are made of."""
    fabric, model = training.learner.fabric, training.learner.model
    dtype = next(model.parameters()).dtype
    optimizer.zero_grad(set_to_none=True)
    told = []
    for batch in batches:
        on_device = TensorBatch(
            torch.from_numpy(batch.images).to(fabric.device, dtype),
            torch.from_numpy(batch.tokens).to(fabric.device),
            torch.from_numpy(batch.masks).to(fabric.device, dtype),
        )
        with fabric.autocast():
            losses = losses_of(on_device)
        told.append(_check_losses(training, batch, losses))
        fabric.backward(losses.total / len(batches))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average_gradients(fabric, parameters)
    fabric.clip_gradients(model, optimizer, max_norm=training.config.max_gradient_norm, error_if_nonfinite=False)
    optimizer.step()
    return np.mean(told, axis=0).tolist()  # type: ignore[no-any-return]


def _check_losses(training: Training, batch: Batch, losses: Losses) -> list[float]:
    """The losses as numbers, means over all processes; UsageError, the batch saved, if they are none."""
    confounding = torch.full_like(losses.causal, math.nan) if losses.confounding is None else losses.confounding
    own = torch.stack([losses.total.detach(), losses.causal, confounding, *losses.mask_means]).double()
    told: list[float] = mean_over_processes(training.learner.fabric, own).tolist()
    if math.isfinite(told[0]):
        return told
    path = training.folder / STOPPED_BATCH
    step = len(training.progress.told) + 1
    if not math.isfinite(float(own[0])):
        _save_stopped_batch(training, path, batch, step)
    raise UsageError(
        f"The loss became {told[0]} at step {step} (epoch {training.progress.epoch + 1}). The batch is in {path}, the "
        "state before is kept. Lower learning_rate, or look at that batch."
    )


def _save_stopped_batch(training: Training, path: Path, batch: Batch, step: int) -> None:
    """What the network was given when the loss stopped being a number, and from which files it came."""
    from safetensors.numpy import save_file

    data, rows = training.train_set, batch.rows.flatten().tolist()
    images = [str(data.images.paths[data.image_of_row[row]]) for row in rows]
    sources = [
        {"image": image, "mask": str(data.masks.paths[row]), "text": data.texts[row]}
        for image, row in zip(images, rows, strict=True)
    ]
    tensors = {"images": batch.images, "tokens": batch.tokens, "masks": batch.masks, "rows": batch.rows}
    with whole_file(path) as unfinished:
        save_file(tensors, unfinished, {"source": json.dumps({"step": step, "rows": sources})})


def _tell_step(training: Training, step: int, steps: int, rate_share: float) -> None:
    progress, rate = training.progress, rate_share * training.config.learning_rate
    total, causal, confounding, *means = progress.told[-1]
    if step % TELL_EVERY_STEPS == 0 or step + 1 == steps:
        values = {"loss/total": total, "loss/causal": causal, "learning_rate": rate}
        if not math.isnan(confounding):
            values["loss/confounding"] = confounding
        values |= {f"mask_mean/level_{level}": mean for level, mean in zip(PYRAMID_LEVELS, means, strict=True)}
        training.journal.tell(values, step + 1)
    if training.share.rank == 0:
        dice = progress.history[-1]["dice"] if progress.history else None
        told = TrainProgress(step + 1, steps, progress.epoch + 1, total, rate, progress.stepping_s, dice)
        training.on_progress(told)


def _end_epoch(training: Training) -> None:
    """Validate, tell, keep: the last network, the best one, the state, and the record of it all."""
    progress, config = training.progress, training.config
    told = np.array(progress.told[-training.steps_per_epoch :])
    due = (progress.epoch + 1) % config.validate_every == 0 or progress.epoch + 1 == config.epochs
    dice = _validate(training) if due else None
    total, causal, confounding, *means = np.mean(told, axis=0).tolist()
    waiting_share = progress.waiting_s / max(progress.stepping_s, 1e-9)
    progress.history.append({
        "epoch": progress.epoch + 1, "loss": total, "causal_loss": causal,
        "confounding_loss": None if math.isnan(confounding) else confounding, "mask_means": means, "dice": dice,
        "stepping_s": progress.stepping_s, "waiting_share": waiting_share,
    })  # fmt: skip
    training.journal.tell({"loading/waiting_share": waiting_share}, len(progress.told))
    _show_examples(training)
    is_best = dice is not None and (progress.best_dice is None or dice > progress.best_dice)
    if dice is not None:
        training.journal.tell({"dice/val": dice}, len(progress.told))
        progress.validations_since_best = 0 if is_best else progress.validations_since_best + 1
        progress.stopped_early = config.patience is not None and progress.validations_since_best >= config.patience
    progress.epoch, progress.steps_in_epoch = progress.epoch + 1, 0
    if is_best:
        progress.best_dice, progress.best_epoch = dice, progress.epoch
    if training.share.rank == 0:
        for name in (LAST, BEST) if is_best else (LAST,):
            save_checkpoint(training.learner.shown, training.folder / name, config.form)
    _save(training)


def _validate(training: Training) -> float | None:
    if training.validation_set is None:
        return None
    learner = training.learner
    return measure_dice(learner.fabric, learner.shown, training.validation_set, training.tokenizer, training.config)


def _show_examples(training: Training) -> None:
    if training.journal.kept:
        learner, data = training.learner, training.validation_set or training.train_set
        drawn = draw_examples(learner.fabric, learner.shown, data, training.tokenizer, training.config, EXAMPLES)
        training.journal.show("films/truth_green_found_red_mask_below", drawn, len(training.progress.told))


def _save(training: Training) -> None:
    if training.share.rank == 0:
        save_state(training.folder, training.learner, training.progress, training.identity)
        write_record(training.folder, {**training.record, "epochs": training.progress.history})
