"""From activations to ranges: what the tensors of a graph held over a set of pictures, and how much of it to represent.

A range is the largest absolute value that a tensor's codes stand for; what lies beyond is cut off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.errors import ParityError, UsageError

if TYPE_CHECKING:
    from onnx import ModelProto

Method = Literal["min-max", "entropy", "percentile"]
METHODS: tuple[Method, ...] = get_args(Method)

BINS = 4096
CODES = 128
"""Absolute codes of a signed byte: 0 to 127."""
_CANDIDATE_STEP = 32

Counts = NDArray[np.int64]


@dataclass
class TensorStatistics:
    """A histogram of a tensor's absolute values over [0, span], and the largest seen.

    `span` is a power of two that doubles when a larger value comes, so the result does not depend on who comes first.
    """

    largest: float = 0.0
    span: float = 2.0**-20
    counts: Counts = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, values: NDArray[np.float32]) -> None:
        """Count the values of one picture.

        Raises:
            ParityError: a value is not finite.
        """
        sizes = np.abs(values.ravel())
        largest = float(sizes.max(initial=0.0))
        if not math.isfinite(largest):
            raise ParityError(f"it holds {largest}")
        self.largest = max(self.largest, largest)
        while self.span <= largest:
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([pairs, np.zeros(BINS // 2, np.int64)])
            self.span *= 2
        places = np.minimum((sizes * np.float32(BINS / self.span)).astype(np.int64), BINS - 1)
        self.counts += np.bincount(places, minlength=BINS)


def with_outputs(model: ModelProto, tensors: Iterable[str]) -> ModelProto:
    """The FP32 graph with these of its tensors as outputs beside its own; graph inputs among them are passed over."""
    import onnx

    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    known = {value.name for value in (*model.graph.output, *model.graph.input)}
    names = [name for name in tensors if name not in known]
    shown.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names)
    return shown


def ranges_of(
    statistics: Mapping[str, TensorStatistics], method: Method, percentile: float = 99.99
) -> dict[str, float]:
    """The range of each tensor.

    `min-max` represents everything seen; `percentile` that share of the values; `entropy` cuts where 128 levels say the
    most about the histogram, by the least Kullback-Leibler divergence (Migacz, "8-bit inference with TensorRT", 2017).

    Raises:
        UsageError: an unknown method or a percentile outside (50, 100].
    """
    if method not in METHODS:
        raise UsageError(f"There is no calibration method {method!r}. Use {', '.join(METHODS)}.")
    if not 50 < percentile <= 100:
        raise UsageError(
            f"A percentile of {percentile} makes no sense here. Use one above 50, up to 100; 99.99 is usual."
        )
    return {name: _range(found, method, percentile) for name, found in statistics.items()}


def _range(found: TensorStatistics, method: Method, percentile: float) -> float:
    if method == "min-max" or found.largest == 0:
        return found.largest
    width = found.span / BINS
    bins = _least_divergence(found.counts) if method == "entropy" else _bins_holding(found.counts, percentile / 100)
    return min(found.largest, bins * width)


def _bins_holding(counts: Counts, share: float) -> int:
    """How many of the first bins hold this share of all counts."""
    reached = np.cumsum(counts) >= share * counts.sum()
    return int(np.argmax(reached)) + 1


def _least_divergence(counts: Counts) -> int:
    """How many of the first bins to keep, so that the histogram, cut there and put in CODES levels, diverges least.

    The bin of zero counts as the one beside it: a ReLU's exact zeros cost no code and would hide everything else.
    """
    shaped: NDArray[Any] = counts.astype(np.float64)
    shaped[0] = shaped[1]
    occupied = int(np.flatnonzero(counts)[-1]) + 1
    candidates = [*range(CODES, occupied, _CANDIDATE_STEP), max(occupied, CODES)]
    return int(min(candidates, key=lambda bins: _divergence(shaped, bins)))


def _divergence(shaped: NDArray[np.float64], bins: int) -> float:
    kept = shaped[:bins]
    clipped = kept.copy()
    clipped[-1] += shaped[bins:].sum()
    level = np.arange(bins) * CODES // bins
    sums = np.bincount(level, weights=kept, minlength=CODES)
    filled = np.bincount(level, weights=kept > 0, minlength=CODES)
    spread = np.where(kept > 0, (sums / np.maximum(filled, 1))[level], 0)
    if not clipped.sum() or not spread.sum():
        return math.inf
    p, q = clipped / clipped.sum(), spread / spread.sum()
    seen = p > 0
    if (q[seen] == 0).any():
        q = np.where(q == 0, 1e-9, q)
    return float((p[seen] * np.log(p[seen] / q[seen])).sum())
