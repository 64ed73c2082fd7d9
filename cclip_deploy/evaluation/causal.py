"""Measures of causality: statistics of the causal masks, and the effect of confounders on the predictions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.errors import UsageError
from cclip_deploy.evaluation.metrics import Mask
from cclip_deploy.evaluation.models import EvaluatedModel
from cclip_deploy.evaluation.split import encode_texts
from cclip_deploy.imaging.preprocess import Preprocessing, to_input

if TYPE_CHECKING:
    from cclip_deploy.model.network import CausalCLIPSeg

Floats = NDArray[np.float32]
Levels = tuple[float, float, float]
"""One value per pyramid level 3, 4, 5."""


@dataclass(frozen=True)
class MaskStatistics:
    """Statistics of the causal masks over a set of images; a mask of ones has mean 1 and entropy 0."""

    mean: Levels
    entropy_bits: Levels
    """Mean of -m log2(m) - (1 - m) log2(1 - m) over mask values m: 0 if all are 0 or 1, 1 if all are ½."""
    sd: Levels
    """Standard deviation over all values; 0 for a constant mask, which selects nothing."""


@dataclass(frozen=True)
class ToggledImage:
    """A synthetic radiograph with its confounders on one side and on the other, and its prompts."""

    one: Floats  # (H, W) or (H, W, C) in [0, 1]
    other: Floats
    lungs: Mask  # (H, W)
    prompts: tuple[str, ...]


def measure_causal_masks(model: CausalCLIPSeg, images: Iterable[Floats], image_hw: tuple[int, int]) -> MaskStatistics:
    """Return statistics of the causal masks over images, (H, W[, C]) in [0, 1].

    The network must be in evaluation mode. Raises UsageError if there are no images.
    """
    import torch

    sums, values = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for pixels in images:
            image = torch.from_numpy(to_input(pixels, image_hw, Preprocessing()))
            masks = model.neck.masks(model.neck.levels(model.image_tower(image)))
            for level, mask in enumerate(mask.double() for mask in masks):
                entropy = -(torch.xlogy(mask, mask) + torch.xlogy(1 - mask, 1 - mask)) / np.log(2)
                sums[level] += torch.stack([mask.sum(), entropy.sum(), mask.square().sum()])
                values[level] += mask.numel()
    if not values.all():
        raise UsageError("There are no images to measure causal masks on. Give at least one.")
    mean, entropy_bits, square = (sums / values[:, None]).T
    return MaskStatistics(*(_levels(v) for v in (mean, entropy_bits, (square - mean.square()).clamp(min=0).sqrt())))


def untrained_mask_statistics() -> tuple[float, float, float]:
    """Return mean, entropy in bits and standard deviation of the sigmoid of a standard normal variable.

    A masker ends in a batch norm and a sigmoid, so an untrained one has about these statistics on any images.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    weights = weights / weights.sum()
    mask = 1 / (1 + np.exp(-nodes))
    entropy = -(mask * np.log2(mask) + (1 - mask) * np.log2(1 - mask))
    mean = float(weights @ mask)
    return mean, float(weights @ entropy), float(np.sqrt(weights @ mask**2 - mean**2))


def measure_toggle_effect(network: EvaluatedModel, images: Iterable[ToggledImage]) -> float:
    """Return the mean absolute change of probability inside the lungs between an image's two forms, in [0, 1].

    The mean is over the images' prompts. Raises UsageError if there are none.
    """
    changes = []
    for image in images:
        rows, _ = encode_texts(image.prompts, network.tokenizer, network.prompt_length)
        for one, other in zip(network.answer(image.one, rows), network.answer(image.other, rows), strict=True):
            changes.append(float(np.abs(one - other)[image.lungs].mean()))
    if not changes:
        raise UsageError("There are no images to toggle confounders on. Give at least one.")
    return float(np.mean(changes))


def _levels(values: Iterable[float]) -> Levels:
    three, four, five = (float(value) for value in values)
    return three, four, five
