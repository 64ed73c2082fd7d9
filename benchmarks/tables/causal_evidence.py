"""Tables of docs/causal-evidence.md, from the result of `cclip-deploy ablate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.tables.markers import Page
from benchmarks.tables.sources import Measurements, markdown
from cclip_deploy.ablation.pairs import pair_rows, power_rows
from cclip_deploy.ablation.report import describe_changes

FILE = "ablation_synthetic_tiny.json"
MEASURES = {
    "dice_id": "Dice, id",
    "dice_neutral": "Dice, neutral",
    "dice_anti": "Dice, anti",
    "drop": "drop id − anti",
    "toggle": "toggle effect",
}


def scores(measurements: Measurements) -> str:
    """Render the mean of every arm over the seeds, with Student's interval."""
    return _spreads(measurements.read(FILE)["arms"], tuple(MEASURES), sign="")


def differences(measurements: Measurements) -> str:
    """Render the paired difference of every arm to the reference, by seed."""
    return _spreads(measurements.read(FILE)["differences"], ("dice_id", "dice_anti", "drop", "toggle"), sign="+")


def masks(measurements: Measurements) -> str:
    """Render mean, entropy and standard deviation of the three masks."""
    trainings = measurements.read(FILE)["trainings"]
    facts = {"mean": "mean, M3 / M4 / M5", "entropy_bits": "entropy, bits", "sd": "standard deviation"}
    arms = dict.fromkeys(training["arm"] for training in trainings)

    def levels(arm: str, fact: str) -> str:
        numbers = [training["numbers"] for training in trainings if training["arm"] == arm]
        return " / ".join(f"{fmean(n[f'mask_{fact}_{level}'] for n in numbers):.2f}" for level in (3, 4, 5))

    return markdown(("arm", *facts.values()), [(arm, *(levels(arm, fact) for fact in facts)) for arm in arms])


def pairs(measurements: Measurements) -> str:
    """Render the paired difference of the drop between every two arms, by seed."""
    return markdown(*pair_rows(_drops(measurements), MEASURES["drop"]))


def power(measurements: Measurements) -> str:
    """Render the power of the seeds to detect a difference of the drop."""
    return markdown(*power_rows(_drops(measurements), "off"))


def settings(measurements: Measurements) -> str:
    """Render every setting with its Dice on the validation split."""
    result = measurements.read(FILE)
    rows = []
    for arm, tried in result["settings_tried"].items():
        for training in tried:
            number = training["setting"] + 1
            changes = describe_changes(result["plan"]["arms"][arm]["settings"][training["setting"]])
            chosen = "chosen" if number == result["setting_chosen"][arm] else ""
            rows.append((arm, str(number), changes, f"{training['val_dice']:.3f}", chosen))
    return markdown(("arm", "setting", "what it changes", "Dice, val", ""), rows)


def _drops(measurements: Measurements) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for training in measurements.read(FILE)["trainings"]:
        found.setdefault(training["arm"], []).append(training["numbers"]["drop"])
    return found


def _spreads(arms: Mapping[str, Mapping[str, Any]], measures: Sequence[str], sign: str) -> str:
    def show(measure: str, spread: Mapping[str, Any]) -> str:
        form = f"{sign}.{4 if measure == 'toggle' else 3}f"
        mean, low, high = (format(spread[key], form) for key in ("mean", "low", "high"))
        return f"{mean} [{low}, {high}]"

    rows = [(arm, *(show(measure, spreads[measure]) for measure in measures)) for arm, spreads in arms.items()]
    return markdown(("arm", *(MEASURES[measure] for measure in measures)), rows)


PAGE = Page(
    "docs/causal-evidence.md",
    {
        "ablation scores": scores,
        "ablation differences": differences,
        "ablation pairs": pairs,
        "ablation power": power,
        "ablation masks": masks,
        "ablation settings": settings,
    },
    {},
)
