"""Whether a network follows its prompts: Dice with the rows' own sentences and with the other ones of the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cclip_deploy.datasets.sample import Sample
from cclip_deploy.errors import DataError
from cclip_deploy.evaluation.bootstrap import Estimate
from cclip_deploy.evaluation.controls import make_controls
from cclip_deploy.evaluation.metrics import BOUNDARY_TOLERANCE_PX
from cclip_deploy.evaluation.models import EvaluatedModel
from cclip_deploy.evaluation.split import MeasuringOptions, measure_split
from cclip_deploy.evaluation.summary import summarize


@dataclass(frozen=True)
class DiceScores:
    """Mean Dice over rows: with each row's own prompt, averaged over the other prompts, and the paired difference."""

    true: Estimate
    shuffled: Estimate
    drop: Estimate


def evaluate_dice(network: EvaluatedModel, samples: Sequence[Sample], *, seed: int = 0) -> DiceScores:
    """Dice at the network's threshold with the true prompts and with all others, against the same masks.

    Every image passes the image encoder once. `seed` is that of the intervals. DataError without rows, or where all
    rows have one sentence.
    """
    if not samples:
        raise DataError("There is nothing to evaluate: the split has no rows. Choose another split.")
    shuffled = make_controls([sample.text for sample in samples], seed)[0]
    if shuffled.missing is not None:
        raise DataError(f"There are no other prompts to compare with: {shuffled.missing}. Evaluate more varied rows.")
    options = MeasuringOptions(network.threshold, BOUNDARY_TOLERANCE_PX, worst=0)
    measured = measure_split(network, samples, [shuffled], options)
    (score,) = summarize(measured, samples, [shuffled], "one", seed).controls
    return DiceScores(score.true_dice, score.dice, score.difference)
