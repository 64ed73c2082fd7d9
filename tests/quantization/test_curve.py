"""Curve points equal the calibrations of build-engine, and the bundle is not changed."""

from __future__ import annotations

from pathlib import Path

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.quantization.calibrate import CalibrationOptions
from cclip_deploy.quantization.curve import measure_curve
from tests.bundles import copy_of, digests
from tests.conftest import THREADS, TINY_HW


def test_points_use_growing_subsets_and_no_byte_of_the_bundle_changes(tiny_bundle_path: Path, tmp_path: Path) -> None:
    data_set = tmp_path / "data-set"
    write_dataset(data_set, {"train": 3, "test": 2}, TINY_HW, 7)
    copy = copy_of(tiny_bundle_path, tmp_path / "here")
    before = digests(copy)
    options = CalibrationOptions((data_set,), evaluation_set=(data_set,))
    points = measure_curve(Bundle.open(copy), options, [1, 50], "int8", ["min-max"], THREADS)
    assert [(point.method, point.pictures) for point in points] == [("min-max", 1), ("min-max", 3)]
    assert all(0.5 < point.agreement.worst <= point.agreement.mean < 1 for point in points)
    assert points[0].agreement.mean != points[1].agreement.mean
    assert digests(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
