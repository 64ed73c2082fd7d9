"""What the causal claim can be held to: what the masks let through, and what a sign on the film does to answers."""

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
"""Of the masks of levels 3, 4, 5."""


@dataclass(frozen=True)
class MaskStatistics:
    """The causal masks over a set of pictures; a mask that passes everything has mean 1 and entropy 0."""

    mean: Levels
    entropy_bits: Levels
    """Mean of -m log2(m) - (1 - m) log2(1 - m) over the masks' values m: 0 where all are 0 or 1, 1 where all are ½."""
    sd: Levels
    """Standard deviation over all values: a mask that is the same everywhere selects nothing, whatever its entropy."""


@dataclass(frozen=True)
class ToggledFilm:
    """One film twice, its signs on the one side and on the other, and what it is asked."""

    one: Floats  # (H, W) or (H, W, C) in [0, 1]
    other: Floats
    lungs: Mask  # (H, W)
    prompts: tuple[str, ...]


def measure_causal_masks(model: CausalCLIPSeg, pictures: Iterable[Floats], image_hw: tuple[int, int]) -> MaskStatistics:
    """Over pictures (H, W[, C]) in [0, 1]; the network must be in evaluation mode. UsageError without pictures."""
    import torch

    sums, values = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for pixels in pictures:
            image = torch.from_numpy(to_input(pixels, image_hw, Preprocessing()))
            masks = model.neck.masks(model.neck.levels(model.image_tower(image)))
            for level, mask in enumerate(mask.double() for mask in masks):
                entropy = -(torch.xlogy(mask, mask) + torch.xlogy(1 - mask, 1 - mask)) / np.log(2)
                sums[level] += torch.stack([mask.sum(), entropy.sum(), mask.square().sum()])
                values[level] += mask.numel()
    if not values.all():
        raise UsageError("Masks of no picture have neither mean nor entropy. Give one picture or more.")
    mean, entropy_bits, square = (sums / values[:, None]).T
    return MaskStatistics(*(_levels(v) for v in (mean, entropy_bits, (square - mean.square()).clamp(min=0).sqrt())))


def untrained_mask() -> tuple[float, float, float]:
    """Mean, entropy in bits and standard deviation of the sigmoid of a standard normal.

    A masker ends in a batch norm and a sigmoid, so an untrained one already gives about these numbers on any pictures.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    weights = weights / weights.sum()
    mask = 1 / (1 + np.exp(-nodes))
    entropy = -(mask * np.log2(mask) + (1 - mask) * np.log2(1 - mask))
    mean = float(weights @ mask)
    return mean, float(weights @ entropy), float(np.sqrt(weights @ mask**2 - mean**2))


def measure_toggle(network: EvaluatedModel, films: Iterable[ToggledFilm]) -> float:
    """Mean over prompts of the mean |difference of p| inside the lungs, between a film's two forms; in [0, 1]."""
    changes = []
    for film in films:
        rows, _ = encode_texts(film.prompts, network.tokenizer, network.prompt_length)
        for one, other in zip(network.answer(film.one, rows), network.answer(film.other, rows), strict=True):
            changes.append(float(np.abs(one - other)[film.lungs].mean()))
    if not changes:
        raise UsageError("Signs of no film cannot be toggled. Give one film or more.")
    return float(np.mean(changes))


def _levels(values: Iterable[float]) -> Levels:
    three, four, five = (float(value) for value in values)
    return three, four, five
