"""Cost and masks of every precision of a bundle: what docs/precision.md shows."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import installed_versions, utc_now
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.engines.build import BuildOptions, build_engines
from cclip_deploy.parity.compare import Check
from cclip_deploy.quantization.agreement import MaskAgreement, evaluation_images, measure_mask_agreement
from cclip_deploy.quantization.calibrate import CalibrationOptions, choose_pictures, default_cache
from cclip_deploy.runtime.tensorrt.layers import LayerTable
from cclip_deploy.verify.verify import VerifyOptions, verify_bundle

FEATURES = "image_encoder/pictures/features"
"""The check of `verify` whose error the table shows: on images, as noise lies outside of the calibrated ranges."""


@dataclass(frozen=True)
class PrecisionCost:
    """The engines of one precision and their masks.

    Attributes:
        precision: of the image encoder's products.
        layers: the image engine's products and convolutions by the type they run in, from the build log.
        engine_bytes: size of every engine, by graph.
        build_seconds: the builder's own time for every engine, by graph.
        peak_bytes: the largest resident memory of the whole build, conversion and calibration included.
        masks: Dice of ONNX Runtime's masks to FP32's.
    """

    precision: Precision
    layers: dict[str, int]
    engine_bytes: dict[str, int]
    build_seconds: dict[str, float]
    peak_bytes: int
    masks: MaskAgreement

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return {**vars(self), "masks": self.masks.model_dump(mode="json")}


def measure_precisions(
    path: Path, precisions: Sequence[Precision], calibration: Path, evaluation: Path, threads: int,
    on_progress: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Build a bundle's engines in each precision, verify the bundle, and judge the masks of each.

    Masks are measured, not held to limits, so that a precision whose masks are poor has a row, too.

    Args:
        path: the bundle, which the engines are added to.
        precisions: other than fp32.
        calibration: images, or a data set whose training split calibrates.
        evaluation: images, or a data set whose test split judges.
        threads: of ONNX Runtime.
        on_progress: is called with a line of text.

    Returns:
        JSON: network, versions, and under `rows` each `PrecisionCost` with `features_error`, the relative error of
        the image encoder's features in `verify`, and `failed_checks`.

    Raises:
        DataError, UsageError: as `choose_pictures`, also where an image is in both sets.
        ParityError: graphs of a precision break the parity limits.
    """
    both = CalibrationOptions((calibration,), evaluation_set=(evaluation,))
    for line in choose_pictures(both).describe():
        on_progress(line)
    options = CalibrationOptions((calibration,), cache=default_cache())
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        costs = []
        for precision in precisions:
            on_progress(f"Building and judging {precision}")
            costs.append(pool.submit(measure_precision, path, precision, options, both, threads).result())
    bundle = Bundle.open(path)
    checks = verify_bundle(bundle, VerifyOptions(threads=threads)).checks
    return {
        "schema": 1,
        "created": utc_now(),
        "versions": installed_versions(),
        "network": {"name": bundle.manifest.model["name"], "image_hw": list(bundle.manifest.image_hw)},
        "rows": [{**cost.to_dict(), **_in_verify(checks, cost.precision)} for cost in costs],
    }


def measure_precision(
    path: Path, precision: Precision, calibration: CalibrationOptions, judging: CalibrationOptions, threads: int
) -> PrecisionCost:
    """One precision; run it in a process of its own, whose peak memory is this build's."""
    chosen = calibration if Precision(precision).is_quantized else None
    engines = build_engines(Bundle.open(path), BuildOptions(precision, threads=threads, calibration=chosen), print)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    layers = LayerTable.from_dict(json.loads((path / engines[0].layers).read_bytes()))
    return PrecisionCost(
        precision,
        dict(layers.product_summary()),
        {engine.graph: (path / engine.file).stat().st_size for engine in engines},
        {engine.graph: engine.build_seconds for engine in engines},
        peak,
        measure_mask_agreement(Bundle.open(path), precision, evaluation_images(judging), threads),
    )


def _in_verify(checks: Sequence[Check], precision: Precision) -> dict[str, Any]:
    ours = [check for check in checks if check.precision == precision]
    errors = [c.value for c in ours if (c.name, c.metric) == (FEATURES, "relative_error")]
    return {"features_error": max(errors), "failed_checks": sum(not check.passed for check in ours)}
