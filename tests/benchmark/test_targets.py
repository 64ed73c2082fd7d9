"""Tests of the figures, against values computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cclip_deploy.benchmark.candidate import BenchCandidate, Form, Role, Setting
from cclip_deploy.benchmark.latency import Timing
from cclip_deploy.benchmark.plan import WHOLE
from cclip_deploy.benchmark.process import ProcessCost
from cclip_deploy.benchmark.targets import Figure, figures, ratio_baselines
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import Manifest

PRODUCT = 3072**3
PLAIN_MULTIPLY_ADDS = 88e9
ROUNDS = np.tile([1.0, 1.1, 0.9], 4)  # a slower round is slower for all, so ratios do not see it


def row(ms: float, role: Role, form: Form, backend: str = "onnxruntime", **fields: Any) -> tuple[BenchCandidate, float]:
    """A candidate with a meaningless name, and its time."""
    fields = {"device": "cpu", "precision": "fp32", **fields}
    name, precision = f"{form}-{ms}-{fields['device']}", fields.pop("precision")
    return BenchCandidate(name, backend, precision, WHOLE, lambda: None, role=role, form=form, **fields), ms


ROWS = (
    row(125.0, "bundle", Form.FUSED, includes_prompt_encoding=True),
    row(100.0, "bundle", Form.CACHED, includes_prompt_encoding=False),
    row(90.0, "bundle", Form.IMAGE, multiply_adds=21_000_000_000),
    row(1.8, "bundle", Form.MORE),
    row(2500.0, "bundle", Form.NEW_PROMPTS, workload=(1, 128), includes_prompt_encoding=True),
    row(640.0, "bundle", Form.CACHED_PROMPTS, workload=(1, 128), includes_prompt_encoding=False),
    row(40.0, "bundle", Form.CACHED, precision="int8"),
    row(1500.0, "baseline", Form.EAGER, "pytorch"),
    row(1200.0, "baseline", Form.EAGER, "pytorch", setting=Setting.CHANNELS_LAST),
    row(800.0, "baseline", Form.EAGER_CAUSAL, "pytorch"),
    row(500.0, "baseline", Form.PLAIN, multiply_adds=int(PLAIN_MULTIPLY_ADDS)),
    row(350.0, "baseline", Form.PLAIN, "openvino", setting=Setting.OPENVINO_F32),
    row(200.0, "baseline", Form.PLAIN, "openvino", setting=Setting.OPENVINO_DEFAULTS, precision="bf16"),
    row(10.0, "baseline", Form.EAGER, "pytorch", device="cuda"),
    row(270.0, "machine", Form.PRODUCT, "pytorch", multiply_adds=PRODUCT),
)


@pytest.fixture
def rn101(tiny_bundle_path: Path) -> Manifest:
    """The manifest of the tiny bundle, with the name and the size that have targets."""
    manifest = Bundle.open(tiny_bundle_path).manifest
    return manifest.model_copy(update={"model": {**manifest.model, "name": "rn101"}, "image_hw": (224, 224)})


def found(manifest: Manifest, rows: Sequence[tuple[BenchCandidate, float]] = ROWS) -> list[Figure]:
    timings = {candidate.name: Timing(ms * ROUNDS, np.array([])) for candidate, ms in rows}
    processes = {"onnxruntime": ProcessCost(3.5, 10**9, 3)}
    return figures(manifest, [candidate for candidate, _ in rows], timings, processes)


def speed_up(told: list[Figure], form: Form, compared_with: str, precision: str = "fp32") -> Figure:
    (only,) = (
        figure
        for figure in told
        if (figure.subject.form, figure.subject.compared_with, figure.subject.precision)
        == (str(form), compared_with, precision)
    )
    return only


@pytest.mark.parametrize(
    ("form", "compared_with", "value", "met"),
    [
        (Form.FUSED, "plain", 4.0, None),
        (Form.FUSED, "eager", 9.6, None),
        (Form.FUSED, "defaults", 1.6, None),
        (Form.CACHED, "plain", 5.0, True),
        (Form.CACHED, "eager", 12.0, True),  # channels last, the faster of the two
        (Form.CACHED, "eager causal", 8.0, None),
        (Form.CACHED, "fastest", 3.5, False),  # of those in FP32
        (Form.CACHED, "defaults", 2.0, None),
        (Form.NEW_PROMPTS, "plain", 25.6, None),
        (Form.NEW_PROMPTS, "defaults", 10.24, None),
        (Form.CACHED_PROMPTS, "plain", 100.0, True),
        (Form.CACHED_PROMPTS, "eager", 240.0, None),
    ],
)
def test_speed_ups_match_values_computed_by_hand(
    rn101: Manifest, form: Form, compared_with: str, value: float, met: bool | None
) -> None:
    figure = speed_up(found(rn101), form, compared_with)
    assert figure.value == pytest.approx(value)
    assert figure.met is met
    assert (figure.low, figure.high) == (pytest.approx(value), pytest.approx(value))
    assert figure.n == 12


def test_a_lower_precision_has_figures_and_no_targets(rn101: Manifest) -> None:
    figure = speed_up(found(rn101), Form.CACHED, "plain", "int8")
    assert (figure.value, figure.goal) == (pytest.approx(12.5), None)


@pytest.mark.parametrize(
    ("what", "value", "met"),
    [
        ("one more prompt, of the image pass", 2.0, True),
        ("128 cached prompts on one image, time per prompt and image", 5.0, None),
        ("128 new prompts on one image, time per prompt and image", 2500 / 128, None),
        (
            "of the sgemm peak: 21.3 G multiply-adds in the time of the image pass",
            100 * 21.3e9 / PRODUCT * 270 / 90,
            True,
        ),
        ("of the sgemm peak: the image pass", 100 * 21e9 / PRODUCT * 270 / 90, None),
        ("of the sgemm peak: the plain export", 100 * PLAIN_MULTIPLY_ADDS / PRODUCT * 270 / 500, None),
        ("peak memory of predict", 1e9, True),
        ("predict, start to end, warm disk", 3.5, False),
    ],
)
def test_figures_match_values_computed_by_hand(rn101: Manifest, what: str, value: float, met: bool | None) -> None:
    figure = {figure.what: figure for figure in found(rn101)}[what]
    assert figure.value == pytest.approx(value)
    assert figure.met is met


def test_what_includes_encoding_the_prompt_comes_before_what_does_not(rn101: Manifest) -> None:
    told = [f.subject for f in found(rn101) if f.subject.compared_with == "plain" and f.subject.precision == "fp32"]
    assert [(s.form, s.includes_prompt_encoding) for s in told] == [
        ("fused", True), ("cached prompt", False), ("new prompts", True), ("cached prompts", False),
    ]  # fmt: skip


def test_extrapolated_figures_are_marked(rn101: Manifest) -> None:
    told = {(f.subject.form, f.extrapolated) for f in found(rn101) if f.extrapolated}
    assert told == {(form, "128 × one run of the same round") for form in ("new prompts", "cached prompts")}


def test_a_baseline_is_named_with_its_setting_and_the_precision_that_it_ran_in(rn101: Manifest) -> None:
    figure = speed_up(found(rn101), Form.FUSED, "defaults")
    assert (figure.subject.baseline_precision, figure.backend) == ("bf16", "onnxruntime")
    assert figure.what.endswith("against OpenVINO with its defaults (plain export in BF16)")
    assert speed_up(found(rn101), Form.FUSED, "eager").what.endswith("PyTorch eager, whole network, channels last")


def test_counted_multiply_adds_are_the_manifests(rn101: Manifest) -> None:
    counts = {name: rn101.graphs[name].multiply_adds for name in ("image_encoder", "prompt_encoder", "mask_decoder")}
    told = {figure.what: figure.value for figure in found(rn101)}
    assert told["multiply-adds, one image and one new prompt"] == sum(counts.values())
    cached = counts["image_encoder"] + counts["mask_decoder"]
    assert told["multiply-adds, one image and one cached prompt"] == cached
    assert told["multiply-adds of the plain export"] == PLAIN_MULTIPLY_ADDS
    what = "multiply-adds of the plain export, against one image and one cached prompt"
    assert told[what] == pytest.approx(PLAIN_MULTIPLY_ADDS / cached)


def test_another_network_has_figures_and_no_targets(tiny_bundle: Bundle) -> None:
    shown = found(tiny_bundle.manifest)
    assert len(shown) > 20
    assert {figure.goal for figure in shown} == {None}


def test_ratios_have_the_same_targets_at_another_size(rn101: Manifest) -> None:
    goals = [figure.goal for figure in found(rn101.model_copy(update={"image_hw": (416, 416)})) if figure.goal]
    assert sorted(goals) == [2.0, 3.8, 4.0, 10.5, 100.0]


def test_a_baseline_on_another_device_is_not_compared(rn101: Manifest) -> None:
    on_gpu = [row(5.0, "bundle", Form.CACHED, "tensorrt", device="cuda", includes_prompt_encoding=False)]
    told = [f.subject for f in found(rn101, [*ROWS, *on_gpu]) if f.backend == "tensorrt"]
    assert {subject.baseline for subject in told} == {"pytorch eager-10.0-cuda"}


def test_ratios_are_against_baselines_by_role_or_else_within_the_bundle() -> None:
    candidates = [candidate for candidate, _ in ROWS]
    assert ratio_baselines(candidates) == [
        "pytorch eager-1500.0-cpu", "pytorch eager-1200.0-cpu", "plain export-500.0-cpu", "plain export-200.0-cpu",
        "pytorch eager-10.0-cuda",
    ]  # fmt: skip
    assert ratio_baselines([c for c in candidates if c.role == "bundle"]) == ["fused-125.0-cpu"]
