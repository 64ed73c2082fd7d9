"""Measures of one trained network in an ablation: what a trial computes, its result file stores and a report shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from cclip_deploy.evaluation.causal import MaskStatistics

PYRAMID_LEVELS = (3, 4, 5)
MASK_STATISTICS = {"mean": "mean", "entropy_bits": "entropy, bits", "sd": "standard deviation"}
"""Fields of `MaskStatistics`, each with its title in the tables."""


def _measure(title: str, digits: int = 3) -> Any:
    return field(default=None, metadata={"title": title, "digits": digits})


@dataclass(frozen=True)
class TrialMeasures:
    """Measures on test rows; None if the ablation's data does not define them.

    A data set has one test set ("test"). Synthetic images have three: "id" with the training's confounders, "neutral"
    and "anti". Field names are the keys of the JSON files.
    """

    masks: MaskStatistics
    dice_test: float | None = _measure("Dice")
    dice_id: float | None = _measure("Dice, id")
    dice_neutral: float | None = _measure("Dice, neutral")
    dice_anti: float | None = _measure("Dice, anti")
    drop: float | None = _measure("drop id − anti")
    toggle: float | None = _measure("toggle effect", digits=4)
    dice_shuffled: float | None = _measure("Dice, shuffled prompts")

    def to_dict(self) -> dict[str, float]:
        """Return the JSON form: defined measures, and each mask statistic by level, such as "mask_mean_3"."""
        values = {measure.name: getattr(self, measure.name) for measure in MEASURES}
        masks = {
            f"mask_{name}_{level}": value
            for name in MASK_STATISTICS
            for level, value in zip(PYRAMID_LEVELS, getattr(self.masks, name), strict=True)
        }
        return {name: value for name, value in values.items() if value is not None} | masks

    @staticmethod
    def from_dict(values: Mapping[str, float]) -> TrialMeasures:
        """Return the measures that `to_dict` described."""
        masks = {name: tuple(values[f"mask_{name}_{level}"] for level in PYRAMID_LEVELS) for name in MASK_STATISTICS}
        others = {name: value for name, value in values.items() if not name.startswith("mask_")}
        return TrialMeasures(MaskStatistics(**masks), **others)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Measure:
    """A measure that is compared between arms: its name, column title and number of digits."""

    name: str
    title: str
    digits: int

    def of(self, measures: TrialMeasures) -> float | None:
        """Return this measure's value."""
        value: float | None = getattr(measures, self.name)
        return value


MEASURES = tuple(Measure(f.name, **f.metadata) for f in fields(TrialMeasures) if f.metadata)
