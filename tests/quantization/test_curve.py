"""The curve's points are those of the calibration that build-engine makes, and the bundle is left as it was."""

from __future__ import annotations

from pathlib import Path

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.quantization.calibrate import CalibrationOptions
from cclip_deploy.quantization.curve import measure_curve
from tests.bundles import copy_of, digests
from tests.conftest import THREADS, TINY_HW


def test_a_smaller_set_is_part_of_a_larger_one_and_no_byte_changes(tiny_bundle_path: Path, tmp_path: Path) -> None:
    films = tmp_path / "films"
    write_dataset(films, {"train": 3, "test": 2}, TINY_HW, 7)
    copy = copy_of(tiny_bundle_path, tmp_path / "here")
    before = digests(copy)
    options = CalibrationOptions((films,), evaluation_set=(films,))
    points = measure_curve(Bundle.open(copy), options, [1, 50], "int8", ["min-max"], THREADS)
    assert [(point.method, point.pictures) for point in points] == [("min-max", 1), ("min-max", 3)]
    assert all(0.5 < point.agreement.worst <= point.agreement.mean < 1 for point in points)
    assert points[0].agreement.mean != points[1].agreement.mean
    assert digests(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
