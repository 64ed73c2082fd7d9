"""Figures from timings that are known, against what they come to by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cclip_deploy.bundle import Bundle
from cclip_deploy.evidence.latency import Candidate, Timing
from cclip_deploy.evidence.process import ProcessCost
from cclip_deploy.manifest import Manifest
from cclip_deploy.pipeline.bench_plan import IMAGE, MACHINE, WHOLE
from cclip_deploy.pipeline.goals import Figure, figures
from cclip_deploy.pipeline.peers import PRODUCT_SIDE, SGEMM

TIMES_MS = {
    "cached prompt fp32": 100.0, "image pass fp32": 90.0, "one more prompt fp32": 1.8, "pytorch eager": 1200.0,
    "plain export": 500.0, "plain export, OpenVINO": 350.0, "1 × image, 128 × prompt fp32": 640.0, SGEMM: 270.0,
}  # fmt: skip
MANY = "1 × image, 128 × prompt fp32"


def stage_of(name: str) -> str:
    stages = {"image pass fp32": IMAGE, SGEMM: MACHINE, MANY: "many", "one more prompt fp32": "more"}
    return stages.get(name, WHOLE)


def candidate(name: str) -> Candidate:
    extra: dict[str, object] = {"ours": name.endswith("fp32")}
    if name == MANY:
        extra["workload"] = (1, 128)
    return Candidate(name, "any", "fp32", stage_of(name), lambda: None, extra)


@pytest.fixture
def rn101(tiny_bundle_path: Path) -> Manifest:
    """The tiny bundle's manifest, under the name and size that have goals."""
    manifest = Bundle.open(tiny_bundle_path).manifest
    return manifest.model_copy(update={"model": {**manifest.model, "name": "rn101"}, "image_hw": (224, 224)})


def found(manifest: Manifest) -> dict[str, Figure]:
    noise = np.array([1.0, 1.1, 0.9, 1.2, 0.8, 1.0])  # a slower round is slower for all, so ratios do not see it
    timings = {name: Timing(ms * noise, np.array([])) for name, ms in TIMES_MS.items()}
    processes = {"onnxruntime": ProcessCost(3.5, 10**9, 3)}
    return {f.what: f for f in figures(manifest, [candidate(n) for n in TIMES_MS], timings, processes, 0)}


@pytest.mark.parametrize(
    ("what", "value", "met"),
    [
        ("image pass and cached prompt against the plain export in ONNX Runtime", 5.0, True),
        ("image pass and cached prompt against PyTorch eager, whole network", 12.0, True),
        ("image pass and cached prompt against the fastest peer (plain export, OpenVINO)", 3.5, False),
        ("one more prompt, share of the image pass", 2.0, True),
        ("128 prompts on one image, time per prompt and image", 5.0, None),
        ("128 prompts on one image against the plain export", 100.0, True),
        (
            "sgemm peak's time for 21.3 G multiply-adds, share of the image pass",
            100 * 21.3e9 / PRODUCT_SIDE**3 * 270 / 90,
            True,
        ),
        ("peak memory of predict", 1e9, True),
        ("predict, start to end, warm disk", 3.5, False),
    ],
)
def test_a_figure_is_what_it_comes_to_by_hand(rn101: Manifest, what: str, value: float, met: bool | None) -> None:
    figure = found(rn101)[what]
    assert figure.value == pytest.approx(value)
    assert figure.met is met
    if figure.unit in ("×", "%"):
        assert (figure.low, figure.high) == (pytest.approx(value), pytest.approx(value))


def test_what_was_not_run_that_often_says_so(rn101: Manifest) -> None:
    told = {what: figure.extrapolated for what, figure in found(rn101).items() if figure.extrapolated}
    assert told == {"128 prompts on one image against the plain export": "128 × one run of the same round"}


def test_counted_multiply_adds_are_the_manifests(rn101: Manifest) -> None:
    graphs = rn101.graphs
    total = sum(graphs[name].multiply_adds for name in ("image_encoder", "prompt_encoder", "mask_decoder"))
    assert found(rn101)["multiply-adds, one image and one prompt"].value == total
    share = found(rn101)["share of the sgemm peak that the image pass's counted multiply-adds reach"]
    assert share.value == pytest.approx(100 * graphs["image_encoder"].multiply_adds / PRODUCT_SIDE**3 * 270 / 90)


def test_another_network_has_figures_and_no_goals(tiny_bundle: Bundle) -> None:
    shown = found(tiny_bundle.manifest)
    assert len(shown) == 10  # without the share that is of the goal's size only
    assert {figure.goal for figure in shown.values()} == {None}


def test_at_another_size_the_ratios_keep_their_goals(rn101: Manifest) -> None:
    goals = {what: f.goal for what, f in found(rn101.model_copy(update={"image_hw": (416, 416)})).items() if f.goal}
    assert sorted(goals.values()) == [2.0, 3.8, 4.0, 10.5, 100.0]
