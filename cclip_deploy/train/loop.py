"""Training loop: steps, epochs, validation, early stopping and saving."""

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
from cclip_deploy.train.batches import Batch, DataShard, make_batch, passes_per_epoch, plan_epoch, prefetch
from cclip_deploy.train.config import TrainConfig
from cclip_deploy.train.devices import average_gradients, mean_over_processes
from cclip_deploy.train.game import Losses, TensorBatch, main_losses, masker_losses, train_only_maskers
from cclip_deploy.train.logs import PYRAMID_LEVELS, TrainLog, write_record
from cclip_deploy.train.optimizers import learning_rate_factor, set_learning_rates, start_training_mode
from cclip_deploy.train.state import Identity, TrainingPosition, TrainState, save_state
from cclip_deploy.train.training_set import TrainingSet
from cclip_deploy.train.validation import draw_examples, measure_dice

LAST, BEST, STOPPED_BATCH = "last.safetensors", "best.safetensors", "stopped_batch.safetensors"
EXAMPLES = 4
LOG_EVERY_STEPS = 10


@dataclass(frozen=True)
class TrainProgress:
    """Progress after a step, passed to the `on_progress` callback."""

    step: int
    steps: int
    epoch: int
    loss: float
    learning_rate: float
    elapsed_s: float
    dice: float | None = None
    """Of the last validation; None before the first."""


OnProgress = Callable[[TrainProgress], None]


@dataclass
class Training:
    """Everything a running training needs."""

    config: TrainConfig
    folder: Path
    train_set: TrainingSet
    validation_set: TrainingSet | None
    tokenizer: PromptTokenizer
    state: TrainState
    progress: TrainingPosition
    identity: Identity
    log: TrainLog
    record: dict[str, object]
    on_progress: OnProgress

    @property
    def shard(self) -> DataShard:
        """The part of every batch that this process handles."""
        return DataShard(self.state.fabric.global_rank, self.state.fabric.world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, the same for all processes."""
        images = len(self.train_set.images)
        return passes_per_epoch(images, self.config, self.shard.world_size) // self.config.accumulate


def run_epochs(training: Training) -> None:
    """Train from the current position to the last epoch of the recipe.

    Raises:
        UsageError: the loss is not finite; the batch is saved in the run's folder.
        EnvironmentIssue: a state or checkpoint could not be written; the previous ones are kept.
    """
    while training.progress.epoch < training.config.epochs and not training.progress.stopped_early:
        _run_epoch(training)
        _end_epoch(training)


def _run_epoch(training: Training) -> None:
    config, progress = training.config, training.progress
    start_training_mode(training.state.model, training.state.frozen)
    steps, done = config.epochs * training.steps_per_epoch, progress.epoch * training.steps_per_epoch
    saved_at_s = last_step_s = time.perf_counter()
    for batches, waited_s in _load_steps(training):
        step = done + progress.steps_in_epoch
        rate_factor = learning_rate_factor(step, steps, config)
        set_learning_rates(training.state.optimizers, rate_factor)
        progress.step_losses.append(_take_step(training, batches))
        progress.steps_in_epoch += 1
        now_s = time.perf_counter()
        progress.stepping_s += now_s - last_step_s
        progress.waiting_s += waited_s
        last_step_s = now_s
        _log_step(training, step, steps, rate_factor)
        if now_s - saved_at_s > 60 * config.save_minutes:
            _save(training)
            saved_at_s = now_s


def _load_steps(training: Training) -> Iterator[tuple[list[Batch], float]]:
    """Yield the `accumulate` batches of each remaining step of the epoch, and the seconds spent waiting for them."""
    config, data, tokenizer, epoch = training.config, training.train_set, training.tokenizer, training.progress.epoch
    plan = plan_epoch(data, config, epoch, training.shard)
    numbers = range(training.progress.steps_in_epoch * config.accumulate, len(plan))
    batches = prefetch(
        lambda number: make_batch(data, plan[number], tokenizer, config, epoch), numbers, config.loader_threads
    )
    for _ in range(len(numbers) // config.accumulate):
        started_s = time.perf_counter()
        step_batches = [next(batches) for _ in range(config.accumulate)]
        yield step_batches, time.perf_counter() - started_s
    batches.close()  # type: ignore[attr-defined]


def _take_step(training: Training, batches: Sequence[Batch]) -> list[float]:
    """Take the main step and the masker steps; return a row of `TrainingPosition.step_losses`."""
    config, state, epoch = training.config, training.state, training.progress.epoch
    model = state.model
    main, *adversaries = state.optimizers
    losses = _optimize(training, main, batches, lambda batch: main_losses(model, batch, config, epoch))
    for adversary in adversaries:
        with train_only_maskers(model):
            for _ in range(config.game.masker_steps):
                means = _optimize(training, adversary, batches, lambda batch: masker_losses(model, batch, config))[3:]
                losses = [*losses[:3], *means]
    if state.average is not None:
        state.average.update_parameters(model)
    return losses


def _optimize(
    training: Training, optimizer: Optimizer, batches: Sequence[Batch], losses_of: Callable[[TensorBatch], Losses]
) -> list[float]:
    """Take one optimizer step on the mean loss of the batches; return the mean of each loss term."""
    fabric, model = training.state.fabric, training.state.model
    dtype = next(model.parameters()).dtype
    optimizer.zero_grad(set_to_none=True)
    terms = []
    for batch in batches:
        on_device = TensorBatch(
            torch.from_numpy(batch.images).to(fabric.device, dtype),
            torch.from_numpy(batch.tokens).to(fabric.device),
            torch.from_numpy(batch.masks).to(fabric.device, dtype),
        )
        with fabric.autocast():
            losses = losses_of(on_device)
        terms.append(_check_losses(training, batch, losses))
        fabric.backward(losses.total / len(batches))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average_gradients(fabric, parameters)
    fabric.clip_gradients(model, optimizer, max_norm=training.config.max_gradient_norm, error_if_nonfinite=False)
    optimizer.step()
    return np.mean(terms, axis=0).tolist()  # type: ignore[no-any-return]


def _check_losses(training: Training, batch: Batch, losses: Losses) -> list[float]:
    """Return the loss terms averaged over processes; if they are not finite, save the batch and raise UsageError."""
    confounding = torch.full_like(losses.causal, math.nan) if losses.confounding is None else losses.confounding
    own = torch.stack([losses.total.detach(), losses.causal, confounding, *losses.mask_means]).double()
    terms: list[float] = mean_over_processes(training.state.fabric, own).tolist()
    if math.isfinite(terms[0]):
        return terms
    path = training.folder / STOPPED_BATCH
    step = len(training.progress.step_losses) + 1
    if not math.isfinite(float(own[0])):
        _save_stopped_batch(training, path, batch, step)
    raise UsageError(
        f"The loss became {terms[0]} at step {step} (epoch {training.progress.epoch + 1}). The batch is saved in "
        f"{path}; the last saved state is kept. Lower learning_rate, or inspect that batch."
    )


def _save_stopped_batch(training: Training, path: Path, batch: Batch, step: int) -> None:
    """Save the batch whose loss was not finite, with the source files of its rows as metadata."""
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


def _log_step(training: Training, step: int, steps: int, rate_factor: float) -> None:
    progress, rate = training.progress, rate_factor * training.config.learning_rate
    total, causal, confounding, *means = progress.step_losses[-1]
    if step % LOG_EVERY_STEPS == 0 or step + 1 == steps:
        values = {"loss/total": total, "loss/causal": causal, "learning_rate": rate}
        if not math.isnan(confounding):
            values["loss/confounding"] = confounding
        values |= {f"mask_mean/level_{level}": mean for level, mean in zip(PYRAMID_LEVELS, means, strict=True)}
        training.log.add_scalars(values, step + 1)
    if training.shard.rank == 0:
        dice = progress.history[-1]["dice"] if progress.history else None
        training.on_progress(TrainProgress(step + 1, steps, progress.epoch + 1, total, rate, progress.stepping_s, dice))


def _end_epoch(training: Training) -> None:
    """Validate, log, and save the last and best checkpoints, the state and the record."""
    progress, config = training.progress, training.config
    due = (progress.epoch + 1) % config.validate_every == 0 or progress.epoch + 1 == config.epochs
    dice = _validate(training) if due else None
    epoch_losses = np.array(progress.step_losses[-training.steps_per_epoch :])
    total, causal, confounding, *means = np.mean(epoch_losses, axis=0).tolist()
    waiting_share = progress.waiting_s / max(progress.stepping_s, 1e-9)
    progress.history.append({
        "epoch": progress.epoch + 1, "loss": total, "causal_loss": causal,
        "confounding_loss": None if math.isnan(confounding) else confounding, "mask_means": means, "dice": dice,
        "stepping_s": progress.stepping_s, "waiting_share": waiting_share,
    })  # fmt: skip
    training.log.add_scalars({"loading/waiting_share": waiting_share}, len(progress.step_losses))
    _show_examples(training)
    is_best = dice is not None and (progress.best_dice is None or dice > progress.best_dice)
    if dice is not None:
        training.log.add_scalars({"dice/val": dice}, len(progress.step_losses))
        progress.validations_since_best = 0 if is_best else progress.validations_since_best + 1
        progress.stopped_early = config.patience is not None and progress.validations_since_best >= config.patience
    progress.epoch, progress.steps_in_epoch = progress.epoch + 1, 0
    if is_best:
        progress.best_dice, progress.best_epoch = dice, progress.epoch
    if training.shard.rank == 0:
        for name in (LAST, BEST) if is_best else (LAST,):
            save_checkpoint(training.state.evaluated_model, training.folder / name, config.form)
    _save(training)


def _validate(training: Training) -> float | None:
    if training.validation_set is None:
        return None
    state = training.state
    return measure_dice(
        state.fabric, state.evaluated_model, training.validation_set, training.tokenizer, training.config
    )


def _show_examples(training: Training) -> None:
    if training.log.enabled:
        state, data = training.state, training.validation_set or training.train_set
        examples = draw_examples(
            state.fabric, state.evaluated_model, data, training.tokenizer, training.config, EXAMPLES
        )
        name = "films/truth_green_found_red_mask_below"
        training.log.add_image(name, examples, len(training.progress.step_losses))


def _save(training: Training) -> None:
    if training.shard.rank == 0:
        save_state(training.folder, training.state, training.progress, training.identity)
        write_record(training.folder, {**training.record, "epochs": training.progress.history})
