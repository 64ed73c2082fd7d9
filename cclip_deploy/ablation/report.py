"""An ablation as a table in Markdown, as JSON, and as a picture: means, spreads, paired differences, settings tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cclip_deploy.ablation.pairs import compare_pairs, pair_rows, power_rows
from cclip_deploy.ablation.run import Ablation
from cclip_deploy.bundle.manifest import installed_versions, utc_now
from cclip_deploy.common.files import whole_file
from cclip_deploy.common.names import json_text, printable
from cclip_deploy.common.plotting import BLUE, GRAY, INK, QUIET, save_figure
from cclip_deploy.environment.packages import require_packages
from cclip_deploy.evaluation.causal import untrained_mask_statistics
from cclip_deploy.evaluation.seed_statistics import SeedStatistics, paired_difference, seed_statistics

NUMBERS, TABLES, PICTURE = "ablation.json", "ablation.md", "ablation.png"
PYRAMID_LEVELS = (3, 4, 5)


@dataclass(frozen=True)
class Measure:
    """A number of every tested training."""

    name: str
    title: str
    digits: int = 3


MEASURES = (
    Measure("dice_test", "Dice"),
    Measure("dice_id", "Dice, id"),
    Measure("dice_neutral", "Dice, neutral"),
    Measure("dice_anti", "Dice, anti"),
    Measure("drop", "drop id − anti"),
    Measure("toggle", "toggle effect", 4),
    Measure("dice_shuffled", "Dice, shuffled prompts"),
)
MASK_FACTS = (("mean", "mean"), ("entropy_bits", "entropy, bits"), ("sd", "standard deviation"))


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def check_report_packages() -> None:
    """EnvironmentIssue where a report could not be made; asked before hours of training."""
    require_packages("An ablation's report", ("scipy", "matplotlib"), "train")


def tables(ablation: Ablation) -> list[Table]:
    """All tables, in the order in which they are read."""
    seeds, tried = len(ablation.plan.seeds), sum(len(results) for results in ablation.tuning.values())
    over = f"mean over {seeds} seeds [95 % interval of the mean, Student's t]" if seeds > 1 else "one seed, no interval"
    untrained = "an untrained masker has {:.2f}, {:.2f}, {:.2f}".format(*untrained_mask_statistics())
    return [
        Table(f"What came out: {over}", *_score_rows(ablation)),
        Table(f"Paired difference to {ablation.plan.reference}, seed by seed", *_difference_rows(ablation)),
        *_pair_tables(ablation),
        Table(f"Causal masks M3 / M4 / M5, mean over seeds ({untrained})", *_mask_rows(ablation)),
        Table(f"Settings tried: {tried}, each trained once with the tuning seed", *_tuning_rows(ablation)),
    ]


def write_report(folder: Path, ablation: Ablation, command: str) -> None:
    """Write tables, numbers and picture into a folder, each file whole; EnvironmentIssue where the disk is full."""
    for name, text in ((NUMBERS, json_text(to_dict(ablation, command))), (TABLES, _text(ablation))):
        with whole_file(folder / name) as unfinished:
            unfinished.write_text(printable(text), encoding="utf-8")
    draw_arms(ablation, folder / PICTURE)


def to_dict(ablation: Ablation, command: str) -> dict[str, Any]:
    """Plain JSON form: every number of every training, and the spreads of the tables."""
    names = [measure.name for measure in _measures(ablation)]
    return {
        "schema": 1,
        "created": utc_now(),
        "command": command,
        "versions": installed_versions(),
        "plan": ablation.plan.model_dump(mode="json"),
        "settings_tried": {arm: [asdict(result) for result in tried] for arm, tried in ablation.tuning.items()},
        "setting_chosen": {arm: number + 1 for arm, number in ablation.choice.items()},
        "trainings": [asdict(result) for result in ablation.results],
        "arms": {
            arm: {name: asdict(seed_statistics(ablation.values(arm, name))) for name in names}
            for arm in ablation.plan.arms
        },
        "differences": {
            arm: {name: asdict(_difference(ablation, arm, name)) for name in names} for arm in _others(ablation)
        },
        "pairs": {name: _pairs(ablation, name) for name in names},
    }


def _pairs(ablation: Ablation, name: str) -> list[dict[str, Any]]:
    if len(ablation.plan.seeds) < 2:
        return []
    values = {arm: ablation.values(arm, name) for arm in ablation.plan.arms}
    return [asdict(pair) for pair in compare_pairs(values)]


def draw_arms(ablation: Ablation, path: Path) -> None:
    """Write a PNG or SVG: for every arm, its trainings as dots, their mean and its interval; one panel a measure."""
    from matplotlib.figure import Figure

    shown = [m for m in _measures(ablation) if m.name in ("dice_test", "dice_id", "dice_anti", "drop", "toggle")]
    arms = list(ablation.plan.arms)
    figure = Figure(
        figsize=(1.2 + 2.5 * len(shown), 1.1 + 0.5 * len(arms)), dpi=120, facecolor="white", layout="constrained"
    )
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, shown, strict=True):
        for place, arm in enumerate(reversed(arms)):
            _draw_spread(
                axes, place, seed_statistics(ablation.values(arm, measure.name)), arm == ablation.plan.reference
            )
        axes.set_title(measure.title, color=INK, loc="left", fontsize=10)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, colors=QUIET)
        axes.grid(axis="x", color=QUIET, alpha=0.2)
        axes.locator_params(axis="x", nbins=4)
        axes.margins(x=0.12)
    panels[0].set_yticks(range(len(arms)), list(reversed(arms)))
    panels[0].set_ylim(-0.6, len(arms) - 0.4)
    save_figure(figure, path)


def _draw_spread(axes: Any, place: int, spread: SeedStatistics, is_reference: bool) -> None:
    color = GRAY if is_reference else BLUE
    if spread.low is not None and spread.high is not None:
        axes.plot([spread.low, spread.high], [place, place], color=color, lw=3, alpha=0.45, solid_capstyle="butt")
    axes.plot(spread.values, [place + 0.22] * len(spread.values), "o", color=color, ms=3, alpha=0.7, mew=0)
    axes.plot([spread.mean], [place], "o", color="white", mec=color, mew=1.8, ms=6)


def _measures(ablation: Ablation) -> list[Measure]:
    known = ablation.results[0].numbers
    return [measure for measure in MEASURES if measure.name in known]


def _others(ablation: Ablation) -> list[str]:
    return [arm for arm in ablation.plan.arms if arm != ablation.plan.reference]


def _difference(ablation: Ablation, arm: str, name: str) -> SeedStatistics:
    return paired_difference(ablation.values(arm, name), ablation.values(ablation.plan.reference, name))


def _score_rows(ablation: Ablation) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    measures = _measures(ablation)
    rows = [
        (arm, *(seed_statistics(ablation.values(arm, m.name)).show(m.digits) for m in measures))
        for arm in ablation.plan.arms
    ]  # fmt: skip
    return ("arm", *(m.title for m in measures)), tuple(rows)


def _difference_rows(ablation: Ablation) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    measures = _measures(ablation)
    rows = [
        (arm, *(_difference(ablation, arm, m.name).show(m.digits, signed=True) for m in measures))
        for arm in _others(ablation)
    ]
    return ("arm", *(m.title for m in measures)), tuple(rows)


def _primary(ablation: Ablation) -> Measure:
    """The measure that arms are tested by: the drop where there are confounders, else Dice."""
    return next(measure for measure in _measures(ablation) if measure.name in ("dice_test", "drop"))


def _pair_tables(ablation: Ablation) -> list[Table]:
    """Of two seeds or more: every pair of arms, and what so few seeds can find."""
    plan, measure = ablation.plan, _primary(ablation)
    if len(plan.seeds) < 2 or len(plan.arms) < 2:
        return []
    values = {arm: ablation.values(arm, measure.name) for arm in plan.arms}
    return [
        Table("Every pair of arms, paired by seed, Student's t", *pair_rows(values, measure.title, measure.digits)),
        Table(
            f"Power of {len(plan.seeds)} seeds for true differences in {measure.title} "
            "(two-sided paired t test at 5 %, standard deviations as measured)",
            *power_rows(values, plan.reference),
        ),
    ]


def _mask_rows(ablation: Ablation) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    def levels(arm: str, fact: str) -> str:
        return " / ".join(
            f"{seed_statistics(ablation.values(arm, f'mask_{fact}_{level}')).mean:.2f}" for level in PYRAMID_LEVELS
        )

    rows = [(arm, *(levels(arm, fact) for fact, _ in MASK_FACTS)) for arm in ablation.plan.arms]
    return ("arm", *(title for _, title in MASK_FACTS)), tuple(rows)


def _tuning_rows(ablation: Ablation) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    rows = []
    for arm, tried in ablation.tuning.items():
        for result in tried:
            dice = "the loss was no number" if result.val_dice is None else f"{result.val_dice:.3f}"
            changes = describe_changes(ablation.plan.settings_of(arm)[result.setting])
            chosen = "chosen" if result.setting == ablation.choice[arm] else ""
            rows.append((arm, str(result.setting + 1), changes, dice, chosen))
    return ("arm", "setting", "what it changes", "Dice, val", ""), tuple(rows)


def describe_changes(changes: Mapping[str, Any]) -> str:
    """A setting in a line: `learning_rate 0.002, game.mask_budget 0.5`."""
    return ", ".join(_flat(changes)) or "nothing"


def _flat(changes: Mapping[str, Any], prefix: str = "") -> Sequence[str]:
    said: list[str] = []
    for key, value in changes.items():
        if isinstance(value, Mapping):
            said += _flat(value, f"{prefix}{key}.")
        else:
            said.append(f"{prefix}{key} {str(value).lower() if isinstance(value, bool) else value}")
    return said


def _text(ablation: Ablation) -> str:
    parts = []
    for table in tables(ablation):
        head = [" | ".join(table.columns), " | ".join("---" for _ in table.columns)]
        lines = [f"| {line} |" for line in [*head, *(" | ".join(row) for row in table.rows)]]
        parts.append("\n".join([f"**{table.heading}**", "", *lines]))
    return "\n\n".join(parts) + "\n"
