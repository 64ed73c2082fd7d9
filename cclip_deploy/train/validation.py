"""Validation during training: Dice on a split, and example images for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.train.batches import DataShard, make_batch
from cclip_deploy.train.config import TrainConfig
from cclip_deploy.train.shared_image_pass import head_logits, prompt_states
from cclip_deploy.train.training_set import TrainingSet

if TYPE_CHECKING:
    from lightning.fabric import Fabric

THRESHOLD = 0.5


def measure_dice(
    fabric: Fabric, model: CausalCLIPSeg, data: TrainingSet, tokenizer: PromptTokenizer, config: TrainConfig
) -> float:
    """Return the mean Dice over all rows at the network's image size; an empty prediction of an empty mask counts 1.

    The images are divided among the processes, and all get the same mean. Leaves the network in evaluation mode.
    """
    from monai.metrics import compute_dice

    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=fabric.device)
    for rows in _by_image(data, config.images_per_batch, DataShard(fabric.global_rank, fabric.world_size)):
        batch = make_batch(data, rows, tokenizer, config)
        probability = predict_rows(fabric, model, batch.images, batch.tokens)
        predicted = (probability >= THRESHOLD).flatten(0, 1).unsqueeze(1)
        reference = torch.from_numpy(batch.masks).to(fabric.device).flatten(0, 1).unsqueeze(1)
        dice = compute_dice(predicted.float(), reference.float(), ignore_empty=False)  # (B x P, 1)
        sums += torch.stack([dice.double().sum(), torch.tensor(float(dice.numel()), device=dice.device)])
    total = fabric.all_reduce(sums, reduce_op="sum") if fabric.world_size > 1 else sums
    return float(total[0] / total[1])


def predict_rows(
    fabric: Fabric, model: CausalCLIPSeg, images: NDArray[np.float32], tokens: NDArray[np.int64]
) -> torch.Tensor:
    """Return probabilities (B, P, H, W) of normalized images (B, 3, H, W) and tokens (B, P, L).

    The network must be in evaluation mode.
    """
    dtype = next(model.parameters()).dtype
    with torch.no_grad(), fabric.autocast():
        pyramid = model.image_tower(torch.from_numpy(images).to(fabric.device, dtype))
        states = prompt_states(model, torch.from_numpy(tokens).to(fabric.device))
        return head_logits(model.head, model.neck.causal_features(pyramid), states).sigmoid()


def draw_examples(
    fabric: Fabric, model: CausalCLIPSeg, data: TrainingSet, tokenizer: PromptTokenizer, config: TrainConfig, count: int
) -> NDArray[np.float32]:
    """Draw example images side by side: reference in green, prediction in red, and the level-4 causal mask below.

    Returns:
        (3, 2 H, count x W) in [0, 1]. The causal mask is the mean over channels, scaled to its own range.
    """
    model.eval()
    columns = []
    for rows in data.rows_of_image[:count]:
        batch = make_batch(data, rows[None, :1], tokenizer, config)
        predicted = predict_rows(fabric, model, batch.images, batch.tokens)[0, 0].float().cpu().numpy() >= THRESHOLD
        image = data.images[int(data.image_of_row[rows[0]])].mean(axis=0)
        drawn = np.stack([image + 0.5 * predicted, image + 0.5 * batch.masks[0, 0], image])
        columns.append(np.concatenate([np.clip(drawn, 0, 1), _draw_mask(fabric, model, batch.images)], axis=1))
    return np.concatenate(columns, axis=2).astype(np.float32)


def _draw_mask(fabric: Fabric, model: CausalCLIPSeg, images: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.no_grad(), fabric.autocast():
        dtype = next(model.parameters()).dtype
        levels = model.neck.levels(model.image_tower(torch.from_numpy(images).to(fabric.device, dtype)))
        mask = model.neck.masker4(levels[1])[0].mean(dim=0).float().cpu().numpy()  # (H/16, W/16)
    low, high = float(mask.min()), float(mask.max())
    scaled = (mask - low) / (high - low) if high > low else np.full_like(mask, 0.5)
    return np.repeat(np.kron(scaled, np.ones((16, 16)))[None], 3, axis=0).astype(np.float32)


def _by_image(data: TrainingSet, images_per_batch: int, shard: DataShard) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of this process's images in batches (B, P) of images with the same number of prompts."""
    images = sorted(data.rows_of_image[shard.rank :: shard.world_size], key=len)
    for _, group in groupby(images, key=len):
        rows = np.stack(list(group))
        for start in range(0, len(rows), images_per_batch):
            yield rows[start : start + images_per_batch]
