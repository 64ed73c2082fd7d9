"""Ablation report: Markdown tables, JSON, and a plot of means, intervals, paired differences and tried settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cclip_deploy.ablation.measures import MASK_STATISTICS, Measure
from cclip_deploy.ablation.pairs import Rows, compare_pairs, pair_rows, power_rows
from cclip_deploy.ablation.run import Ablation
from cclip_deploy.bundle.manifest import installed_versions, utc_now
from cclip_deploy.common.files import whole_file
from cclip_deploy.common.html_page import Figure, Section, save_page, write_page
from cclip_deploy.common.html_page import Table as PageTable
from cclip_deploy.common.json_file import json_text
from cclip_deploy.common.names import printable
from cclip_deploy.common.plotting import BLUE, GRAY, INK, QUIET, save_figure
from cclip_deploy.environment.packages import require_packages
from cclip_deploy.evaluation.causal import untrained_mask_statistics
from cclip_deploy.evaluation.seed_statistics import SeedStatistics, paired_difference, seed_statistics

NUMBERS, TABLES, PICTURE, PAGE = "ablation.json", "ablation.md", "ablation.png", "index.html"


@dataclass(frozen=True)
class Table:
    """A heading, column titles and rows of text."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def check_report_packages() -> None:
    """Raise EnvironmentIssue before training if a package for the report is missing."""
    require_packages("An ablation's report", ("scipy", "matplotlib"), "train")


def tables(ablation: Ablation) -> list[Table]:
    """Return all tables in the order of the report."""
    seeds, tried = len(ablation.plan.seeds), sum(len(results) for results in ablation.tuning.values())
    over = f"mean over {seeds} seeds [95 % interval of the mean, Student's t]" if seeds > 1 else "one seed, no interval"
    untrained = "an untrained masker has {:.2f}, {:.2f}, {:.2f}".format(*untrained_mask_statistics())
    return [
        Table(f"Results: {over}", *_score_rows(ablation)),
        Table(f"Paired difference to {ablation.plan.reference}, seed by seed", *_difference_rows(ablation)),
        *_pair_tables(ablation),
        Table(f"Causal masks M3 / M4 / M5, mean over seeds ({untrained})", *_mask_rows(ablation)),
        Table(f"Settings tried: {tried}, each trained once with the tuning seed", *_tuning_rows(ablation)),
    ]


def write_report(folder: Path, ablation: Ablation, command: str) -> None:
    """Write tables, JSON and plot into a folder, each file atomically; raise EnvironmentIssue if the disk is full."""
    for name, text in ((NUMBERS, json_text(to_dict(ablation, command))), (TABLES, _text(ablation))):
        with whole_file(folder / name) as unfinished:
            unfinished.write_text(printable(text), encoding="utf-8")
    draw_arms(ablation, folder / PICTURE)
    save_page(_page(ablation, command), folder / PAGE)


def _page(ablation: Ablation, command: str) -> str:
    plan = ablation.plan
    lead = (
        f"{len(plan.arms)} arms, {len(plan.seeds)} seeds, {len(ablation.results)} trainings. All arms are compared "
        f"with {plan.reference}."
    )
    plot = Figure(PICTURE, "Dots are seeds, rings their means, lines 95 % intervals of the mean.", wide=True)
    sections = [Section("", figures=(plot,))]
    for made in (made for made in tables(ablation) if made.rows):
        shown = PageTable(made.columns, made.rows, frozenset(range(1, len(made.columns))))
        sections.append(Section(made.heading, table=shown))
    sections.append(Section("Provenance", (f"Command: {command}", f"{NUMBERS} contains all numbers of this page.")))
    return write_page("Ablation", lead, sections)


def to_dict(ablation: Ablation, command: str) -> dict[str, Any]:
    """Return the JSON form: all results of every training, and the statistics of the tables."""
    measures = ablation.measures()
    return {
        "schema": 1,
        "created": utc_now(),
        "command": command,
        "versions": installed_versions(),
        "plan": ablation.plan.model_dump(mode="json"),
        "settings_tried": {arm: [result.to_dict() for result in tried] for arm, tried in ablation.tuning.items()},
        "setting_chosen": {arm: number + 1 for arm, number in ablation.choice.items()},
        "trainings": [result.to_dict() for result in ablation.results],
        "arms": {
            arm: {m.name: asdict(seed_statistics(ablation.values(arm, m))) for m in measures}
            for arm in ablation.plan.arms
        },
        "differences": {
            arm: {m.name: asdict(_difference(ablation, arm, m)) for m in measures} for arm in _compared_arms(ablation)
        },
        "pairs": {m.name: _pairs(ablation, m) for m in measures},
    }


def _pairs(ablation: Ablation, measure: Measure) -> list[dict[str, Any]]:
    if len(ablation.plan.seeds) < 2:
        return []
    values = {arm: ablation.values(arm, measure) for arm in ablation.plan.arms}
    return [asdict(pair) for pair in compare_pairs(values)]


def draw_arms(ablation: Ablation, path: Path) -> None:
    """Write a PNG or SVG with one panel per measure: for every arm its seeds, their mean and its interval."""
    from matplotlib.figure import Figure as Canvas

    shown = [m for m in ablation.measures() if m.name in ("dice_test", "dice_id", "dice_anti", "drop", "toggle")]
    arms = list(ablation.plan.arms)
    figure = Canvas(
        figsize=(1.2 + 2.5 * len(shown), 1.1 + 0.5 * len(arms)), dpi=120, facecolor="white", layout="constrained"
    )
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, shown, strict=True):
        for place, arm in enumerate(reversed(arms)):
            _draw_seeds(axes, place, seed_statistics(ablation.values(arm, measure)), arm == ablation.plan.reference)
        axes.set_title(measure.title, color=INK, loc="left", fontsize=10)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, colors=QUIET)
        axes.grid(axis="x", color=QUIET, alpha=0.2)
        axes.locator_params(axis="x", nbins=4)
        axes.margins(x=0.12)
    panels[0].set_yticks(range(len(arms)), list(reversed(arms)))
    panels[0].set_ylim(-0.6, len(arms) - 0.4)
    save_figure(figure, path)


def _draw_seeds(axes: Any, place: int, statistics: SeedStatistics, is_reference: bool) -> None:
    color = GRAY if is_reference else BLUE
    if statistics.low is not None and statistics.high is not None:
        axes.plot(
            [statistics.low, statistics.high], [place, place], color=color, lw=3, alpha=0.45, solid_capstyle="butt"
        )
    axes.plot(statistics.values, [place + 0.22] * len(statistics.values), "o", color=color, ms=3, alpha=0.7, mew=0)
    axes.plot([statistics.mean], [place], "o", color="white", mec=color, mew=1.8, ms=6)


def _compared_arms(ablation: Ablation) -> list[str]:
    return [arm for arm in ablation.plan.arms if arm != ablation.plan.reference]


def _difference(ablation: Ablation, arm: str, measure: Measure) -> SeedStatistics:
    return paired_difference(ablation.values(arm, measure), ablation.values(ablation.plan.reference, measure))


def _score_rows(ablation: Ablation) -> Rows:
    measures = ablation.measures()
    rows = [
        (arm, *(seed_statistics(ablation.values(arm, m)).show(m.digits) for m in measures))
        for arm in ablation.plan.arms
    ]
    return ("arm", *(m.title for m in measures)), tuple(rows)


def _difference_rows(ablation: Ablation) -> Rows:
    measures = ablation.measures()
    rows = [
        (arm, *(_difference(ablation, arm, m).show(m.digits, signed=True) for m in measures))
        for arm in _compared_arms(ablation)
    ]
    return ("arm", *(m.title for m in measures)), tuple(rows)


def _primary_measure(ablation: Ablation) -> Measure:
    """Return the measure for the tests: the drop if there are confounders, else Dice."""
    return next(measure for measure in ablation.measures() if measure.name in ("dice_test", "drop"))


def _pair_tables(ablation: Ablation) -> list[Table]:
    """Return the paired tests of all arms and their power; none for a single seed or arm."""
    plan, measure = ablation.plan, _primary_measure(ablation)
    if len(plan.seeds) < 2 or len(plan.arms) < 2:
        return []
    values = {arm: ablation.values(arm, measure) for arm in plan.arms}
    return [
        Table("Every pair of arms, paired by seed, Student's t", *pair_rows(values, measure.title, measure.digits)),
        Table(
            f"Power of {len(plan.seeds)} seeds for true differences in {measure.title} "
            "(two-sided paired t test at 5 %, standard deviations as measured)",
            *power_rows(values, plan.reference),
        ),
    ]


def _mask_rows(ablation: Ablation) -> Rows:
    rows = [
        (arm, *(" / ".join(f"{mean:.2f}" for mean in ablation.mask_means(arm, name)) for name in MASK_STATISTICS))
        for arm in ablation.plan.arms
    ]
    return ("arm", *MASK_STATISTICS.values()), tuple(rows)


def _tuning_rows(ablation: Ablation) -> Rows:
    rows = []
    for arm, tried in ablation.tuning.items():
        for result in tried:
            dice = "loss not finite" if result.val_dice is None else f"{result.val_dice:.3f}"
            changes = describe_changes(ablation.plan.settings_of(arm)[result.setting])
            chosen = "chosen" if result.setting == ablation.choice[arm] else ""
            rows.append((arm, str(result.setting + 1), changes, dice, chosen))
    return ("arm", "setting", "what it changes", "Dice, val", ""), tuple(rows)


def describe_changes(changes: Mapping[str, Any]) -> str:
    """Format a setting as `learning_rate 0.002, game.mask_budget 0.5`."""
    return ", ".join(_flatten(changes)) or "nothing"


def _flatten(changes: Mapping[str, Any], prefix: str = "") -> Sequence[str]:
    lines: list[str] = []
    for key, value in changes.items():
        if isinstance(value, Mapping):
            lines += _flatten(value, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key} {str(value).lower() if isinstance(value, bool) else value}")
    return lines


def _text(ablation: Ablation) -> str:
    parts = []
    for table in tables(ablation):
        head = [" | ".join(table.columns), " | ".join("---" for _ in table.columns)]
        lines = [f"| {line} |" for line in [*head, *(" | ".join(row) for row in table.rows)]]
        parts.append("\n".join([f"**{table.heading}**", "", *lines]))
    return "\n\n".join(parts) + "\n"
