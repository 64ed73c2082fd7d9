"""Tests of the accuracy of candidates relative to PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cclip_deploy.benchmark.accuracy import ReferencePairs, with_accuracy
from cclip_deploy.benchmark.candidate import BenchCandidate, Form, Role
from cclip_deploy.benchmark.plan import BenchInputs
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import ParityError

SIDE = 20
RAMP = np.linspace(-1, 1, SIDE * SIDE, dtype=np.float32).reshape(1, 1, SIDE, SIDE)
"""Logits of a mask that fills the lower half."""
PAIRS = ReferencePairs(np.zeros((2, 3, 1, 1), np.float32), np.zeros((2, 3), np.int64), np.repeat(RAMP, 2, axis=0), ())
TIMED = BenchInputs(np.zeros((1, 3, 1, 1), np.float32), np.zeros((1, 3), np.int64))


def candidate(role: Role, precision: str, shift: float) -> BenchCandidate:
    """A candidate whose logits are all too high by `shift`."""

    def answer(image: Any, tokens: Any) -> Any:
        return RAMP + np.float32(shift)

    return BenchCandidate(
        "it",
        "any",
        precision,
        "image and prompt",
        lambda: None,
        role=role,
        form=Form.PLAIN,
        device="cpu",
        answer=answer,
    )


def judged(of: BenchCandidate, pairs: ReferencePairs = PAIRS) -> tuple[list[BenchCandidate], list[dict[str, str]]]:
    left_out: list[dict[str, str]] = []
    return with_accuracy([of], pairs, TIMED, lambda *_: RAMP, left_out), left_out


def test_a_baseline_in_bf16_stays_with_its_error_and_its_dice() -> None:
    (row,), left_out = judged(candidate("baseline", "bf16", 0.03))
    assert left_out == []
    facts = row.facts()
    assert facts["relative_error"] == pytest.approx(0.03 / np.sqrt(np.mean(RAMP**2)), rel=1e-4)
    inside, more = SIDE * SIDE // 2, int((RAMP >= -0.03).sum())
    assert facts["mask_dice"] == facts["mask_dice_worst"] == pytest.approx(2 * inside / (inside + more))
    assert facts["precision_class"] == "bf16"


@pytest.mark.parametrize(("precision", "shift"), [("fp32", 0.03), ("bf16", 0.3), ("bf16", float("nan"))])
def test_a_baseline_above_the_limit_of_its_precision_is_left_out(precision: str, shift: float) -> None:
    kept, left_out = judged(candidate("baseline", precision, shift))
    assert kept == []
    assert left_out[0]["name"] == "it"
    assert "computes something else: relative error" in left_out[0]["reason"]


def test_the_limit_of_a_bundle_is_that_of_its_precision() -> None:
    assert len(judged(candidate("bundle", "int8-fp16", 0.1))[0]) == 1
    for precision, shift in (("fp32", 1e-3), ("int8-fp16", 0.4)):
        with pytest.raises(ParityError, match="to PyTorch, above its limit"):
            judged(candidate("bundle", precision, shift))


def test_dice_is_not_measured_on_nearly_empty_or_full_masks() -> None:
    tiny, full = RAMP - 0.97, RAMP + 0.97
    half_useful = replace(PAIRS, logits=np.concatenate([tiny, RAMP]))
    assert half_useful.is_useful() == [False, True]
    (row,), _ = judged(replace(candidate("baseline", "bf16", 0), answer=lambda *_: half_useful.logits[1:]), PAIRS)
    assert row.facts()["mask_dice"] == 1.0
    useless = replace(PAIRS, logits=np.concatenate([tiny, full]))
    assert useless.accuracy(lambda *_: tiny, TIMED, tiny).mask_dice is None


def test_the_pairs_with_masks_closest_to_half_an_image_are_selected(tiny_bundle: Bundle, tiny_network: Any) -> None:
    pairs = ReferencePairs.of(tiny_bundle, tiny_network)
    told = pairs.to_dict()
    import torch

    with torch.inference_mode():
        again = tiny_network.causal_logits(torch.from_numpy(pairs.images), torch.from_numpy(pairs.tokens)).numpy()
    np.testing.assert_allclose(again, pairs.logits, rtol=1e-3, atol=1e-4)
    fractions = [pair["mask_fraction"] for pair in told["pairs"]]
    assert fractions == pytest.approx((again >= 0).mean(axis=(1, 2, 3)).tolist(), abs=1e-3)
    assert sorted(fractions, key=lambda fraction: abs(fraction - 0.5)) == fractions
