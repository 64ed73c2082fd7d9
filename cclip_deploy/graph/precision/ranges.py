"""Histograms of activations over a set of images, and the ranges chosen from them for quantization.

A range is the largest absolute value that a tensor's codes represent; larger values are clipped.
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
    """Histogram of a tensor's absolute values over [0, span], and the largest value seen.

    `span` is a power of two that doubles when a larger value arrives, so the result does not depend on the order.
    """

    largest: float = 0.0
    span: float = 2.0**-20
    counts: Counts = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, values: NDArray[np.float32]) -> None:
        """Add the values of one image.

        Raises:
            ParityError: a value is not finite.
        """
        magnitudes = np.abs(values.ravel())
        largest = float(magnitudes.max(initial=0.0))
        if not math.isfinite(largest):
            raise ParityError(f"it has the value {largest}")
        self.largest = max(self.largest, largest)
        while self.span <= largest:
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([pairs, np.zeros(BINS // 2, np.int64)])
            self.span *= 2
        bins = np.minimum((magnitudes * np.float32(BINS / self.span)).astype(np.int64), BINS - 1)
        self.counts += np.bincount(bins, minlength=BINS)


def with_outputs(model: ModelProto, tensors: Iterable[str]) -> ModelProto:
    """Return the FP32 graph with these tensors as further outputs; graph inputs among them are skipped."""
    import onnx

    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    known = {value.name for value in (*model.graph.output, *model.graph.input)}
    names = [name for name in tensors if name not in known]
    extended.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names)
    return extended


def ranges_of(
    statistics: Mapping[str, TensorStatistics], method: Method, percentile: float = 99.99
) -> dict[str, float]:
    """Return the range of each tensor.

    Methods: `min-max` represents all values seen; `percentile` represents that percentage of them; `entropy` clips
    where 128 levels have the least Kullback-Leibler divergence from the histogram (Migacz, "8-bit inference with
    TensorRT", 2017).

    Raises:
        UsageError: an unknown method, or a percentile outside (50, 100].
    """
    check_method(method, percentile)
    return {name: _range(found, method, percentile) for name, found in statistics.items()}


def check_method(method: str, percentile: float) -> None:
    """Raise UsageError for an unknown method or a percentile outside (50, 100]."""
    if method not in METHODS:
        raise UsageError(f"There is no calibration method {method!r}. Use {', '.join(METHODS)}.")
    if not 50 < percentile <= 100:
        raise UsageError(f"The percentile must be above 50 and at most 100, got {percentile}. 99.99 is usual.")


def _range(found: TensorStatistics, method: Method, percentile: float) -> float:
    if method == "min-max" or found.largest == 0:
        return found.largest
    width = found.span / BINS
    bins = _least_divergence(found.counts) if method == "entropy" else _bins_holding(found.counts, percentile / 100)
    return min(found.largest, bins * width)


def _bins_holding(counts: Counts, fraction: float) -> int:
    """Return how many of the first bins hold this fraction of all counts."""
    reached = np.cumsum(counts) >= fraction * counts.sum()
    return int(np.argmax(reached)) + 1


def _least_divergence(counts: Counts) -> int:
    """Return at how many bins clipping the histogram to CODES levels gives the least divergence.

    The bin of zero gets the count of its neighbor: a ReLU's exact zeros cost no code and would dominate the histogram.
    """
    shaped: NDArray[Any] = counts.astype(np.float64)
    shaped[0] = shaped[1]
    occupied = int(np.flatnonzero(counts)[-1]) + 1
    candidates = [*range(CODES, occupied, _CANDIDATE_STEP), max(occupied, CODES)]
    return int(min(candidates, key=lambda bins: _divergence(shaped, bins)))


def _divergence(shaped: NDArray[np.float64], bins: int) -> float:
    inside = shaped[:bins]
    clipped = inside.copy()
    clipped[-1] += shaped[bins:].sum()
    level = np.arange(bins) * CODES // bins
    sums = np.bincount(level, weights=inside, minlength=CODES)
    filled = np.bincount(level, weights=inside > 0, minlength=CODES)
    quantized = np.where(inside > 0, (sums / np.maximum(filled, 1))[level], 0)
    if not clipped.sum() or not quantized.sum():
        return math.inf
    p, q = clipped / clipped.sum(), quantized / quantized.sum()
    seen = p > 0
    if (q[seen] == 0).any():
        q = np.where(q == 0, 1e-9, q)
    return float((p[seen] * np.log(p[seen] / q[seen])).sum())
