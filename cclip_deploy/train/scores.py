"""How well masks are found, and whether the prompt is what finds them: Dice with true and with shuffled prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.data.images import read_picture
from cclip_deploy.data.layouts import Referral, read_mask
from cclip_deploy.errors import DataError, UsageError
from cclip_deploy.train.intervals import DIFFERENCE_OF_SHARES, SHARE, Estimate, PatientBootstrap

Predict = Callable[[NDArray[np.float32], str], NDArray[np.float32]]
"""Pixels (H, W) or (H, W, 3) float32 in [0, 1] and a prompt -> the probability of each pixel, (H, W) in [0, 1]."""

THRESHOLD = 0.5


@dataclass(frozen=True)
class DiceScores:
    """Per-image Dice: with each row's own prompt, with another row's, and the paired difference of the two."""

    true: Estimate
    shuffled: Estimate
    drop: Estimate
    true_rows: tuple[float, ...]
    shuffled_rows: tuple[float, ...]


def dice(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """2 |A and B| / (|A| + |B|) of two masks of one shape, in [0, 1]; empty against empty counts 1."""
    if predicted.shape != truth.shape:
        raise UsageError(
            f"Masks of {predicted.shape} and {truth.shape} cannot be compared. Resize the prediction first."
        )
    total = int(np.count_nonzero(predicted)) + int(np.count_nonzero(truth))
    if total == 0:
        return 1.0
    return 2 * int(np.count_nonzero(predicted & truth)) / total


def evaluate_dice(predict: Predict, referrals: Sequence[Referral], *, seed: int = 0) -> DiceScores:
    """Per-image mean Dice at threshold 0.5, with the true prompts and with shuffled ones, against the same masks.

    Args:
        predict: gives the probability in the picture's own size; called twice for each row.
        referrals: rows of one split; at least two different texts.
        seed: of the shuffle and of the bootstrap.
    """
    if not referrals:
        raise DataError("There is nothing to evaluate: the split has no rows. Choose another split.")
    shuffled = shuffle_prompts([referral.text for referral in referrals], seed)
    rows: list[tuple[float, float]] = []
    for referral, other in zip(referrals, shuffled, strict=True):
        pixels, truth = read_picture(referral.image).pixels, read_mask(referral.mask)
        own, wrong = (dice(predict(pixels, text) >= THRESHOLD, truth) for text in (referral.text, other))
        rows.append((own, wrong))
    own_rows, wrong_rows = (np.array(column) for column in zip(*rows, strict=True))
    bootstrap = PatientBootstrap([referral.subject for referral in referrals], seed)
    return DiceScores(
        true=bootstrap.mean(own_rows, SHARE),
        shuffled=bootstrap.mean(wrong_rows, SHARE),
        drop=bootstrap.mean(own_rows - wrong_rows, DIFFERENCE_OF_SHARES),
        true_rows=tuple(own_rows.tolist()),
        shuffled_rows=tuple(wrong_rows.tolist()),
    )


def shuffle_prompts(texts: Sequence[str], seed: int) -> list[str]:
    """The same texts in another order, no row with its own text.

    Rows are grouped by text in a random order and turned by the size of the largest group.

    Raises:
        DataError: one text fills more than half of the rows, so no such order exists.
    """
    counts = Counter(texts)
    text, most = counts.most_common(1)[0]
    if 2 * most > len(texts):
        raise DataError(
            f"{most} of {len(texts)} rows have the text {text!r}, so shuffling leaves some row its own. "
            "Evaluate more rows, or more varied ones."
        )
    rng = np.random.default_rng(seed)
    rank = {text: place for place, text in enumerate(rng.permutation(sorted(counts)).tolist())}
    order = sorted(rng.permutation(len(texts)).tolist(), key=lambda row: rank[texts[row]])
    shuffled = [""] * len(texts)
    for row, source in zip(order, [*order[most:], *order[:most]], strict=True):
        shuffled[row] = texts[source]
    return shuffled
