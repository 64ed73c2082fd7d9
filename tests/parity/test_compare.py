"""Parity metrics against closed forms; NaN, other shapes and altered outputs never pass."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import ParityError
from cclip_deploy.parity.compare import (
    LIMITS,
    Check,
    Limits,
    check_graphs,
    mask_checks,
    mask_dices,
    masks_of,
    max_error,
    plain_batch,
    refuse_failures,
    relative_error,
    without_useful_masks,
)
from cclip_deploy.parity.reference import Reference

HW = (4, 6)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_errors_match_their_definitions() -> None:
    value, truth = floats(3, 4, 0), floats(0, 4, 0)
    assert relative_error(value, truth) == 0.75
    assert max_error(value, truth) == 0.75
    assert relative_error(floats(1, -2), floats(1, -2)) == max_error(floats(1, -2), floats(1, -2)) == 0


def test_errors_are_summed_in_float64() -> None:
    truth = np.full(10**6, 1e-3, np.float32)
    value = truth * np.float32(1 + 1e-4)
    expected = (value.astype(np.float64) - truth) / truth.astype(np.float64)
    assert relative_error(value, truth) == pytest.approx(abs(expected[0]), rel=1e-9)
    huge = floats(3e38, 3e38)
    assert relative_error(huge, huge) == 0


def test_a_truth_of_zeros_only_allows_zeros() -> None:
    zero, one = floats(0, 0), floats(0, 1)
    for error in (relative_error, max_error):
        assert error(zero, zero) == 0
        assert error(one, zero) == math.inf


def test_nan_and_infinity_never_pass() -> None:
    truth = floats(1, 2)
    for wrong in (math.nan, math.inf):
        value = floats(1, wrong)
        for metric, error in (("relative_error", relative_error), ("max_error", max_error)):
            assert not LIMITS["fp16"].allow(metric, error(value, truth))
    for metric in ("relative_error", "max_error", "mask_dice", "flipped_share"):
        assert not LIMITS["fp16"].allow(metric, math.nan)


def test_limits_are_inclusive() -> None:
    limits = Limits(relative_error=0.1, max_error=0.2, mask_dice=0.9, flipped_share=0.3)
    for metric, value, past in (
        ("relative_error", 0.1, 0.11), ("max_error", 0.2, 0.21), ("mask_dice", 0.9, 0.89), ("flipped_share", 0.3, 0.31),
    ):  # fmt: skip
        assert limits.allow(metric, value)
        assert not limits.allow(metric, past)


def test_fp32_limits_are_close_to_float32_noise() -> None:
    """docs/decisions/0003: the largest error seen of another order of operations is 5e-6."""
    assert 5e-6 < LIMITS["fp32"].relative_error <= 2e-5
    assert all(
        getattr(LIMITS["fp32"], name) < getattr(LIMITS["fp16"], name)
        for name in ("relative_error", "max_error", "flipped_share")
    )
    assert LIMITS["fp32"].mask_dice > LIMITS["fp16"].mask_dice


def masks(*rows: list[float]) -> np.ndarray:
    """Logits (1, P, 1, W), a row a prompt."""
    return np.array(rows, np.float32)[None, :, None, :]


def flipped(value: np.ndarray, truth: np.ndarray) -> float:
    """The share of pixels in one mask and not in the other."""
    ours, theirs = masks_of(value, truth)
    return float((ours != theirs).mean())


def test_dice_is_that_of_each_mask() -> None:
    truth = masks([1, 1, -1, -1], [1, -1, -1, -1])
    value = masks([1, 1, -1, -1], [1, 1, -1, -1])  # Dice 1 and 2*1/(2+1)
    np.testing.assert_allclose(mask_dices(value, truth), [[1, 2 / 3]])
    assert flipped(value, truth) == 1 / 8
    np.testing.assert_array_equal(mask_dices(truth, truth), [[1, 1]])


def test_two_empty_masks_agree_and_an_empty_with_a_full_one_does_not() -> None:
    empty, full = masks([-1, -1]), masks([1, 1])
    assert mask_dices(empty, empty) == 1
    assert mask_dices(full, full) == 1
    assert mask_dices(full, empty) == mask_dices(empty, full) == 0


def test_a_logit_of_zero_is_inside_the_mask() -> None:
    assert flipped(masks([0.0, 5.0]), masks([1.0, 5.0])) == 0
    assert flipped(masks([0.0, 5.0]), masks([-1.0, 5.0])) == 0.5


def test_only_logits_within_float32_noise_are_not_counted_as_flipped() -> None:
    truth = masks([100.0, 1e-4, 1e-2])
    assert flipped(masks([100.0, -1e-4, 1e-2]), truth) == 0  # 1e-6 of the largest logit
    assert flipped(masks([100.0, 1e-4, -1e-2]), truth) == pytest.approx(1 / 3)  # 1e-4 of it
    assert flipped(masks([100.0, -1.0, 1e-2]), truth) == pytest.approx(1 / 3)  # open, but the value is far off


def judged(precision: str, *areas_and_flips: tuple[int, int], side: int = 96) -> dict[str, Check]:
    """Masks of the given areas in one picture each, of which so many pixels are missing."""
    theirs = np.zeros((1, len(areas_and_flips), side, side), bool)
    ours = theirs.copy()
    for number, (area, flips) in enumerate(areas_and_flips):
        theirs[0, number].flat[:area] = True
        ours[0, number].flat[flips:area] = True
    backend = Constant()
    return {c.metric: c for c in mask_checks("n", "g", backend, ours, theirs, LIMITS[precision])}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_one_flipped_pixel_of_a_tiny_mask_passes(precision: str) -> None:
    """The demo's seeded masks hold 0, 0, 31 and 2 pixels of 96x96; one of two is a Dice of 2/3."""
    found = judged(precision, (0, 0), (0, 0), (31, 1), (2, 1))
    assert "mask_dice" not in found
    assert found["flipped_pixels"].value == 1
    assert all(check.passed for check in found.values())


@pytest.mark.parametrize(("precision", "flips"), [("fp32", 5), ("fp16", 47), ("bf16", 369), ("int8", 922)])
def test_a_small_mask_that_vanishes_or_appears_elsewhere_still_fails(precision: str, flips: int) -> None:
    small = judged(precision, (0, 0), (5, 5), side=224)  # within what may flip of any mask at this size
    assert small["flipped_pixels"].passed
    theirs = np.zeros((1, 1, 96, 96), bool)
    ours = theirs.copy()
    ours[0, 0].flat[:flips] = True
    found = {c.metric: c for c in mask_checks("n", "g", Constant(), ours, theirs, LIMITS[precision])}
    assert not found["flipped_pixels"].passed


def test_a_mask_of_useful_size_is_checked_by_dice() -> None:
    assert judged("fp16", (185, 18))["mask_dice"].value == pytest.approx(2 * 167 / (185 + 167))
    assert not judged("fp16", (185, 30))["mask_dice"].passed
    assert "mask_dice" not in judged("fp16", (184, 30))  # below 2 % of the picture
    assert "mask_dice" not in judged("fp32", (1900, 1))  # four pixels of it would break 0.999
    assert judged("fp32", (2100, 4))["mask_dice"].passed
    assert not judged("fp32", (2100, 5))["mask_dice"].passed


def reference(pictures: int = 2, prompts: int = 3, name: str = "made") -> Reference:
    """Logits of all signs, for a plain or fused graph."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((pictures, 3, *HW)).astype(np.float32)
    tokens = np.arange(prompts * 5).reshape(prompts, 5)
    return Reference(name, image, tokens, rng.standard_normal((pictures, prompts, *HW)).astype(np.float32))


class Answering:
    """A backend that knows the reference's logits by heart, and looks pictures and prompts up by their first value."""

    name, precision = "fake", "fp32"

    def __init__(self, reference: Reference, batch: int | None = None) -> None:
        self.reference = reference
        self.batch = batch
        self.calls = 0

    def load(self, graph: str) -> None: ...

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls += 1
        if self.batch is not None:
            assert len(inputs["image"]) == len(inputs["tokens"]) == self.batch
        first, heads = self.reference.image[:, 0, 0, 0], self.reference.tokens[:, 0]
        rows = [
            self.reference.logits[first == picture[0, 0, 0], heads == tokens[0]][0]
            for picture, tokens in zip(inputs["image"], inputs["tokens"], strict=True)
        ]
        return {"logits": np.stack(rows)[:, None]}


@pytest.mark.parametrize("batch", [1, 2, 4, 7])
def test_a_plain_graph_runs_all_pairs_in_full_batches(batch: int) -> None:
    made = reference()
    backend = Answering(made, batch)
    checks = list(check_graphs(backend, ["plain"], [made], batch))
    assert backend.calls == -(-6 // batch)
    assert [check.metric for check in checks] == ["relative_error", "max_error", "flipped_share", "flipped_pixels"]
    assert [check.value for check in checks] == [0, 0, 0, 0]
    assert all(check.passed for check in checks)


def test_fused_runs_all_pairs_at_once() -> None:
    made = reference()
    backend = Answering(made, batch=6)
    assert all(check.passed for check in check_graphs(backend, ["fused"], [made]))
    assert backend.calls == 1


def test_an_output_for_the_wrong_prompt_fails() -> None:
    made = reference()
    swapped = Reference("made", made.image, made.tokens[::-1], made.logits)
    checks = {check.metric: check for check in check_graphs(Answering(swapped), ["fused"], [made])}
    assert not checks["relative_error"].passed
    assert not checks["max_error"].passed


class Constant:
    """A backend that gives the same outputs whatever it is asked."""

    name, precision = "constant", "fp16"

    def __init__(self, **outputs: np.ndarray) -> None:
        self.outputs = outputs

    def load(self, graph: str) -> None: ...

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.outputs


def test_an_output_of_nan_fails_its_error_checks_and_is_null_in_json() -> None:
    made = reference()
    logits = made.logits.reshape(6, 1, *HW).copy()
    logits[3, 0, 1, 1] = np.nan
    checks = {check.metric: check for check in check_graphs(Constant(logits=logits), ["fused"], [made])}
    assert not checks["relative_error"].passed
    assert not checks["max_error"].passed
    written = json.loads(json.dumps(checks["max_error"].to_dict(), allow_nan=False))
    assert written == {
        "name": "fused/made/logits", "graph": "fused", "backend": "constant", "precision": "fp16",
        "metric": "max_error", "value": None, "limit": LIMITS["fp16"].max_error, "passed": False, "detail": None,
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(6, 1, 1, 6), (1, 1, *HW), (6, 1, 6, 4)])
def test_an_output_of_another_shape_raises_even_if_numpy_would_broadcast_it(shape: tuple[int, ...]) -> None:
    with pytest.raises(ParityError, match=r"fused gives logits of shape"):
        list(check_graphs(Constant(logits=np.ones(shape, np.float32)), ["fused"], [reference()]))


def test_encoders_and_the_chain_are_compared_where_all_three_graphs_are_there(tiny_bundle: Bundle) -> None:
    from cclip_deploy.parity.reference import load_references
    from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend

    backend = OnnxRuntimeBackend(tiny_bundle, threads=2)
    references = load_references(tiny_bundle)[:1]
    checks = list(check_graphs(backend, tiny_bundle.manifest.graphs, references))
    assert all(check.passed for check in checks)
    assert {check.name for check in checks} == {
        "image_encoder/seeded/features", "image_encoder/seeded/mask3", "image_encoder/seeded/mask4",
        "image_encoder/seeded/mask5", "prompt_encoder/seeded/kernel", "prompt_encoder/seeded/tap_bias",
        "prompt_encoder/seeded/bias", "mask_decoder/seeded/logits", "fused/seeded/logits", "chain/seeded/logits",
    }  # fmt: skip
    two = list(check_graphs(backend, ["prompt_encoder", "mask_decoder"], references))
    assert {check.graph for check in two} == {"prompt_encoder", "mask_decoder"}
    assert plain_batch(tiny_bundle.manifest) == 1


def made_check(**changes: Any) -> Check:
    values: dict[str, Any] = {
        "name": "fused/seeded/logits", "graph": "fused", "backend": "onnxruntime", "precision": "fp32",
        "metric": "relative_error", "value": 0.5, "limit": 1e-5, "passed": False,
    }  # fmt: skip
    return Check(**{**values, **changes})


def test_failures_raise_with_the_first_of_them() -> None:
    refuse_failures([made_check(passed=True, value=0)])
    said = r"1 of 2 .*first: fused/seeded/logits \(fp32\),? relative_error is 0\.5"
    with pytest.raises(ParityError, match=said) as caught:
        refuse_failures([made_check(passed=True), made_check()])
    assert caught.value.exit_code == 4


def test_references_without_a_mask_of_useful_size_are_named() -> None:
    image, tokens = np.zeros((2, 3, 10, 10), np.float32), np.zeros((3, 5), np.int64)

    def of_areas(name: str, *areas: int) -> Reference:
        logits = np.full((2, 3, 100), -1, np.float32)
        for number, area in enumerate(areas):
            logits[number % 2, number // 2, :area] = 1
        return Reference(name, image, tokens, logits.reshape(2, 3, 10, 10))

    references = [
        of_areas("flat", 0, 100, 0, 100), of_areas("tiny", 0, 1, 99), of_areas("small", 0, 2), of_areas("most", 98),
    ]  # fmt: skip
    assert without_useful_masks(references) == ["flat", "tiny"]


def test_the_chain_encodes_one_image_at_a_time(tiny_bundle: Bundle) -> None:
    """As a segmenter does: a backend may have a form of its own for one picture."""
    from cclip_deploy.parity.reference import load_references
    from cclip_deploy.runtime.backend import Arrays
    from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend

    seen: list[int] = []

    class Watched(OnnxRuntimeBackend):
        def run(self, graph: str, inputs: Arrays) -> dict[str, np.ndarray]:
            if graph == "image_encoder":
                seen.append(len(inputs["image"]))
            return super().run(graph, inputs)

    reference = load_references(tiny_bundle)[0]
    checks = list(check_graphs(Watched(tiny_bundle, threads=2), [], [reference], with_chain=True))
    assert seen == [1] * len(reference.image)
    assert len(seen) > 1
    assert all(check.passed for check in checks)
