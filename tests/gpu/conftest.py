"""Bundles with engines of every precision, and the file that the results go to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.engines.build import BuildOptions, build_engines
from cclip_deploy.environment.fingerprint import fingerprint
from cclip_deploy.quantization.calibrate import CalibrationOptions
from cclip_deploy.runtime.tensorrt.binding import BindingName
from cclip_deploy.runtime.tensorrt.device import Gpu, GpuFacts
from cclip_deploy.runtime.tensorrt.open_device import open_gpu
from tests.bundles import copy_of
from tests.conftest import THREADS, TINY_HW
from tests.gpu.machine import binding_reason
from tests.gpu.results import GpuResults

RESULTS = GpuResults()
BuildOnce = Callable[[BindingName, Precision], Bundle]


@pytest.fixture(scope="session")
def gpu() -> Iterator[Gpu]:
    """Device 0 through cuda-python."""
    opened = open_gpu()
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def facts(gpu: Gpu) -> GpuFacts:
    return gpu.facts


@pytest.fixture(scope="session")
def results() -> GpuResults:
    """What the run has found so far."""
    RESULTS.machine = fingerprint()
    return RESULTS


@pytest.fixture(scope="session")
def build_once(
    tiny_bundle_path: Path, facts: GpuFacts, results: GpuResults, tmp_path_factory: pytest.TempPathFactory
) -> BuildOnce:
    """Builds the tiny bundle's engines for a binding in a precision; each combination once."""
    built: dict[tuple[str, str], Path] = {}
    films = tmp_path_factory.mktemp("films") / "data"
    write_dataset(films, {"train": 16, "test": 2}, TINY_HW, 6)

    def build(binding: BindingName, precision: Precision) -> Bundle:
        if reason := binding_reason(binding, facts.compute_capability):
            pytest.skip(reason)
        if precision == "fp8" and tuple(map(int, facts.compute_capability.split("."))) < (8, 9):
            pytest.skip(f"FP8 needs compute capability 8.9, this GPU has {facts.compute_capability}")
        if (binding, precision) not in built:
            path = copy_of(tiny_bundle_path, tmp_path_factory.mktemp("engines"), f"{precision}.cclip")
            calibration = CalibrationOptions((films,), "min-max") if Precision(precision).is_quantized else None
            options = BuildOptions(precision, binding, threads=THREADS, calibration=calibration)
            for entry in build_engines(Bundle.open(path), options):
                results.add(
                    "Builds", engine=entry.graph, binding=binding, precision=entry.precision, target=entry.target,
                    megabytes=(path / entry.file).stat().st_size / 1e6, seconds=entry.build_seconds,
                )  # fmt: skip
            built[binding, precision] = path
        return Bundle.open(built[binding, precision])

    return build


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Note how each test of this folder ended."""
    report: Any = yield
    if item.get_closest_marker("gpu") and (report.when == "call" or report.skipped):
        reason = f": {report.longrepr[2]}" if report.skipped and isinstance(report.longrepr, tuple) else ""
        RESULTS.outcomes[item.name] = f"{report.outcome}{reason}"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the results where they were asked for, if anything was measured."""
    folder = os.environ.get("CCLIP_GPU_RESULTS")
    if folder and RESULTS.tables:
        for path in RESULTS.write(Path(folder)):
            print(f"\nResults in {path}: commit it.")
