"""What is said of a split: means, pooled numbers, policies, curve, calibration and groups, against plain numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cclip_deploy.datasets.sample import Sample
from cclip_deploy.evaluation.controls import Control
from cclip_deploy.evaluation.metrics import count_levels, measure_outlines, measure_overlap
from cclip_deploy.evaluation.split import ControlAnswer, MeasuredRow, Measurements
from cclip_deploy.evaluation.summary import Evaluation, LeftOut, summarize

RNG = np.random.default_rng(17)
HW = (24, 24)
LEFT, RIGHT = (f"Unilateral pulmonary infection, one infected area, upper {side} lung." for side in ("left", "right"))
CONTROL = Control.single("fixed", (LEFT, LEFT, LEFT, None, None), "same")


def smooth(seed: int) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(np.random.default_rng(seed).normal(size=HW), 3)
    return (0.5 + 0.5 * noise / np.abs(noise).max()).astype(np.float32)


PROBABILITIES = [smooth(seed) for seed in range(5)]
REFERENCES = [smooth(seed + 50) > 0.5 for seed in range(4)] + [np.zeros(HW, np.bool_)]
MASKS = [probability >= 0.5 for probability in PROBABILITIES]


def row(probability: np.ndarray, reference: np.ndarray, controls: dict[str, ControlAnswer]) -> MeasuredRow:
    mask = probability >= 0.5
    return MeasuredRow(
        measure_overlap(mask, reference), measure_outlines(mask, reference), count_levels(probability, reference),
        reference.size, False, controls,
    )  # fmt: skip


def samples(count: int) -> list[Sample]:
    path = Path("a.png")
    return [Sample(path, path, LEFT if n % 2 else RIGHT, "test", f"patient{n // 2}") for n in range(count)]


def evaluate(policy: str = "one", rows: slice = slice(None)) -> Evaluation:
    answers: list[dict[str, ControlAnswer]] = [{"fixed": ControlAnswer(0.1, 0.2)}] * 3 + [{}, {}]
    measured = [row(*pair) for pair in zip(PROBABILITIES, REFERENCES, answers, strict=True)][rows]
    measurements = Measurements(tuple(measured), (), (), tuple(range(len(measured))), ())
    control = Control(CONTROL.name, CONTROL.asked[rows], CONTROL.reasons[rows])
    return summarize(measurements, samples(len(measured)), [control], policy)  # type: ignore[arg-type]


def plain_dice() -> list[float]:
    return [2 * (m & r).sum() / (m.sum() + r.sum()) for m, r in zip(MASKS, REFERENCES, strict=True)]


def test_both_conventions_of_dice_are_reported() -> None:
    scores = evaluate().scores
    assert scores.dice_per_image.value == pytest.approx(np.mean(plain_dice()))
    both = sum((m & r).sum() for m, r in zip(MASKS, REFERENCES, strict=True))
    total = sum(m.sum() + r.sum() for m, r in zip(MASKS, REFERENCES, strict=True))
    assert scores.dice_pooled.value == pytest.approx(2 * both / total)
    assert scores.iou_pooled.value == pytest.approx(both / (total - both))
    assert (scores.dice_per_image.rows, scores.dice_per_image.patients) == (5, 3)


def test_an_empty_reference_counts_or_is_left_out() -> None:
    one, without = evaluate("one").scores, evaluate("leave-out").scores
    assert one.dice_per_image.value == pytest.approx(sum(plain_dice()[:4]) / 5)
    assert without.dice_per_image.value == pytest.approx(sum(plain_dice()[:4]) / 4)
    assert without.dice_pooled == one.dice_pooled
    assert one.empty_found_empty.value == without.empty_found_empty.value == 0
    assert one.hd95_px.rows == 4


def test_rows_with_an_empty_reference_are_left_out_of_every_mean_over_rows() -> None:
    """All means are those of the same rows without the empty one; pooled numbers hold all pixels, as documented."""
    answers = [{"fixed": ControlAnswer(0.1 * n, 0.2 * n)} for n in range(5)]
    every = [row(*pair) for pair in zip(PROBABILITIES, REFERENCES, answers, strict=True)]
    measured, filled = (Measurements(tuple(rows), (), (), tuple(range(len(rows))), ()) for rows in (every, every[:4]))
    without = summarize(measured, samples(5), [CONTROL], "leave-out")
    alone = summarize(filled, samples(4), [Control.single("fixed", (LEFT, LEFT, LEFT, None), "same")], "one")
    for name in ("dice_per_image", "iou_per_image", "hd95_px", "boundary_dice"):
        found, expected = getattr(without.scores, name), getattr(alone.scores, name)
        assert (found.value, found.rows) == (pytest.approx(expected.value), expected.rows), name
    (control,), (expected_control,) = without.controls, alone.controls
    for name in ("true_dice", "dice", "difference", "iou_with_own"):
        found, expected = getattr(control, name), getattr(expected_control, name)
        assert (found.value, found.rows) == (pytest.approx(expected.value), expected.rows), name
    assert control.iou_with_own.value == pytest.approx(0.3), "the mean of 0, 0.2, 0.4 and 0.6"
    assert [p.dice_per_image.value for p in without.curve] == pytest.approx(
        [p.dice_per_image.value for p in alone.curve]
    )
    groups = {(g.by, g.group): g.dice_per_image for g in alone.groups}
    for group in without.groups:
        found = group.dice_per_image
        assert found.rows == (groups[group.by, group.group].rows if found.value is not None else 0)
    assert without.scores.empty_found_empty.rows == 1
    assert without.scores.dice_pooled == summarize(measured, samples(5), [CONTROL], "one").scores.dice_pooled


def test_a_split_of_empty_references_alone_has_no_dice_without_them() -> None:
    found = evaluate("leave-out", slice(4, 5))
    assert found.scores.dice_per_image.value is None
    assert found.scores.hd95_px.value is None
    assert found.curve[9].dice_per_image.value is None
    assert evaluate("one", slice(4, 5)).scores.dice_per_image.value == 0
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_curve_is_the_dice_at_every_threshold() -> None:
    curve = evaluate().curve
    for point in curve:
        masks = [p >= np.float32(point.threshold) for p in PROBABILITIES]
        dice = [measure_overlap(m, r).dice for m, r in zip(masks, REFERENCES, strict=True)]
        assert point.dice_per_image.value == pytest.approx(np.mean(dice))
    assert curve[9].threshold == 0.5
    assert curve[9].dice_pooled.value == pytest.approx(evaluate().scores.dice_pooled.value)


def test_the_calibration_error_is_the_weighted_gap_of_the_bins() -> None:
    found = evaluate()
    probability, inside = np.concatenate(PROBABILITIES).ravel(), np.concatenate(REFERENCES).ravel()
    level = np.minimum(np.digitize(probability, np.arange(1, 20) / 20), 19)
    gap = 0.0
    for k, told in enumerate(found.calibration):
        chosen = level == k
        assert told.pixels == chosen.sum()
        if chosen.any():
            assert told.mean_probability == pytest.approx(probability[chosen].mean(), rel=1e-5)
            assert told.inside_share == pytest.approx(inside[chosen].mean())
            gap += chosen.mean() * abs(probability[chosen].mean() - inside[chosen].mean())
    assert found.scores.expected_calibration_error.value == pytest.approx(gap, rel=1e-4)
    assert found.scores.brier.value == pytest.approx(np.mean((probability - inside) ** 2), rel=1e-5)


def test_a_control_is_compared_with_the_true_prompts_on_its_own_rows() -> None:
    (control,) = evaluate().controls
    assert control.dice.rows == 3
    assert control.true_dice.value == pytest.approx(np.mean(plain_dice()[:3]))
    assert control.difference.value == pytest.approx(np.mean(plain_dice()[:3]) - 0.1)
    assert control.iou_with_own.value == pytest.approx(0.2)


def test_a_control_says_how_many_rows_it_is_of_and_why_not_of_the_others() -> None:
    (control,) = evaluate().controls
    assert (control.coverage.show(), control.coverage.describe_left_out()) == ("3 of 5", "2: same")
    (control,) = evaluate("leave-out", slice(2, 5)).controls
    assert (control.coverage.rows, control.coverage.rows_in_all, control.dice.rows) == (1, 3, 1)
    assert control.coverage.left_out == (LeftOut("same", 2),)


def test_groups_say_how_many_rows_they_know() -> None:
    found = {g.by: g.coverage for g in evaluate().group_coverage}
    assert {by: coverage.show() for by, coverage in found.items()} == {
        "target size": "5 of 5", "side named": "5 of 5", "zones named": "5 of 5",
    }  # fmt: skip
    assert "view" not in {g.by for g in evaluate().groups}


def test_groups_share_out_the_rows() -> None:
    groups = evaluate().groups
    sides = {g.group: g.dice_per_image for g in groups if g.by == "side named"}
    assert {side: estimate.rows for side, estimate in sides.items()} == {"left": 2, "right": 3}
    assert sides["left"].value == pytest.approx(np.mean([plain_dice()[1], plain_dice()[3]]))


def test_the_same_seed_gives_the_same_numbers() -> None:
    assert evaluate() == evaluate()
