"""Distribution-free confidence interval of a median."""

from __future__ import annotations

from itertools import accumulate
from math import comb

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95


def median_interval(values: ArrayLike) -> tuple[float, float] | None:
    """Return two order statistics of `values`, (n,), that enclose the median with probability 95 % or more.

    The k-th smallest and k-th largest values miss it with probability 2 P(B < k), B ~ Binomial(n, 1/2); k is the
    largest for which this is at most 5 %. None for fewer than six values, for which there is no such k.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = ordered.size
    missed = accumulate(2 * comb(n, below) / 2**n for below in range(n // 2))
    k = sum(chance <= 1 - CONFIDENCE for chance in missed)
    return (float(ordered[k - 1]), float(ordered[n - k])) if k else None
