"""Metrics of single masks against closed forms and MONAI."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from cclip_deploy.errors import UsageError
from cclip_deploy.evaluation.metrics import PROBABILITY_BINS, measure_boundary, measure_overlap, probability_histogram

RNG = np.random.default_rng(11)


def box(top: int, left: int, bottom: int, right: int, hw: tuple[int, int] = (40, 50)) -> np.ndarray:
    mask = np.zeros(hw, np.bool_)
    mask[top:bottom, left:right] = True
    return mask


def blobs(seed: int, hw: tuple[int, int] = (48, 40)) -> np.ndarray:
    """Return irregular regions, some of which touch the border."""
    from scipy.ndimage import gaussian_filter

    return np.asarray(gaussian_filter(np.random.default_rng(seed).normal(size=hw), 4) > 0.03)


def test_overlap_of_two_boxes() -> None:
    found = measure_overlap(box(0, 0, 10, 10), box(5, 0, 15, 10))
    assert (found.both, found.predicted, found.reference) == (50, 100, 100)
    assert found.dice == pytest.approx(0.5)
    assert found.iou == pytest.approx(1 / 3)


def test_overlap_of_empty_masks() -> None:
    nothing, something = box(0, 0, 0, 0), box(0, 0, 1, 1)
    assert (measure_overlap(nothing, nothing).dice, measure_overlap(nothing, nothing).iou) == (1, 1)
    assert (measure_overlap(something, nothing).dice, measure_overlap(nothing, something).iou) == (0, 0)


@pytest.mark.parametrize("shift", [0, 1, 3, 7])
def test_boundary_distance_of_a_shifted_box_is_the_shift(shift: int) -> None:
    found = measure_boundary(box(10, 10, 30, 20), box(10, 10 + shift, 30, 20 + shift))
    assert found is not None
    assert found.hd95_px == pytest.approx(shift)


def test_boundaries_far_apart_have_zero_boundary_dice() -> None:
    found = measure_boundary(box(0, 0, 4, 4), box(20, 20, 24, 24))
    assert found is not None
    assert found.boundary_dice == 0


@pytest.mark.parametrize("tolerance_px", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_boundary_metrics_match_monai(seed: int, tolerance_px: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
        metrics = pytest.importorskip("monai.metrics")
        one, other = blobs(seed), blobs(seed + 100)
        tensors = [torch.from_numpy(mask)[None, None] for mask in (one, other)]
        distance = metrics.compute_hausdorff_distance(*tensors, include_background=True, percentile=95)
        dice = metrics.compute_surface_dice(*tensors, [tolerance_px], include_background=True)
    found = measure_boundary(one, other, tolerance_px)
    assert found is not None
    assert found.hd95_px == pytest.approx(float(distance), abs=1e-4)
    assert found.boundary_dice == pytest.approx(float(dice), abs=1e-6)


def test_boundary_metrics_of_an_empty_mask_are_undefined() -> None:
    assert measure_boundary(box(0, 0, 0, 0), box(0, 0, 5, 5)) is None
    assert measure_boundary(box(0, 0, 5, 5), box(0, 0, 0, 0)) is None


def test_histogram_counts_every_pixel_in_its_bin() -> None:
    probability = np.array([[0.0, 0.049, 0.05, 0.5], [0.499, 0.95, 1.0, 0.7]], np.float32)
    reference = np.array([[False, True, False, True], [False, True, True, False]])
    found = probability_histogram(probability, reference)
    every = found.inside + found.outside
    assert {level: int(count) for level, count in enumerate(every) if count} == {0: 2, 1: 1, 9: 1, 10: 1, 14: 1, 19: 2}
    assert (found.inside[0], found.inside[10], found.inside[19]) == (1, 1, 2)
    assert found.probability.sum() == pytest.approx(probability.sum())
    assert found.squared_error == pytest.approx(((probability - reference) ** 2).sum())


def test_histogram_gives_the_mask_areas_at_every_threshold() -> None:
    probability, reference = RNG.random((30, 20), np.float32), RNG.random((30, 20)) < 0.3
    found = probability_histogram(probability, reference)
    for step in range(1, PROBABILITY_BINS):
        mask = probability >= np.float32(step / PROBABILITY_BINS)
        assert (found.inside[step:].sum(), found.outside[step:].sum()) == (
            (mask & reference).sum(),
            (mask & ~reference).sum(),
        )


def test_masks_of_different_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="Resize the prediction"):
        measure_overlap(box(0, 0, 1, 1), box(0, 0, 1, 1, (3, 3)))
    with pytest.raises(UsageError, match="Resize the prediction"):
        measure_boundary(box(0, 0, 1, 1), box(0, 0, 1, 1, (3, 3)))
