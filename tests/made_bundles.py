"""Fixtures for further bundles, built once per test run. Copy a bundle before changing it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest

from cclip_deploy.bundle.bundle import Bundle, edited_bundle, write_manifest
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.engines.build import SERVED, BuildOptions, build_engines
from cclip_deploy.engines.convert import ConvertOptions, convert_graphs
from cclip_deploy.export import export
from cclip_deploy.export.export import ExportOptions, export_bundle
from cclip_deploy.graph.precision.convert import InputsAndOutputs
from cclip_deploy.quantization.calibrate import CalibrationOptions
from cclip_deploy.runtime.graph_model import load_model
from tests.bundles import copy_of, reseal
from tests.conftest import THREADS, TINY_HW
from tests.made_once import made_once


@pytest.fixture(scope="session")
def plain_bundle_path(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain export (`export --plain`) of the tiny network."""
    options = ExportOptions(TINY_HW, 24, plain=True, threads=THREADS)

    def make(path: Path) -> None:
        export_bundle(tiny_checkpoint, path, options, "test")

    return made_once(tmp_path_factory, "plain.cclip", make)


@pytest.fixture(scope="session")
def engine_bundle_path(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with its three FP16 graphs and TensorRT-RTX engines."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is an extra: pip install 'cclip-deploy[rtx]'")

    def make(path: Path) -> None:
        build_engines(Bundle.open(copy_of(tiny_bundle_path, path.parent, path.name)), BuildOptions(threads=THREADS))

    return made_once(tmp_path_factory, "engines.cclip", make)


def add_precisions(
    path: Path, precisions: Sequence[Precision], keep: tuple[str, ...] = (), io: InputsAndOutputs = "fp32"
) -> None:
    """Convert the bundle's graphs to further precisions without engines; INT8 is calibrated on synthetic images."""
    films = path.parent / "films"
    if not films.exists():
        write_dataset(films, {"train": 8}, TINY_HW, 6)
    calibration = CalibrationOptions((films / "images",), "min-max")
    for precision in precisions:
        bundle = Bundle.open(path)
        chosen = calibration if Precision(precision).is_quantized else None
        options = ConvertOptions(precision, SERVED, chosen, keep, io, THREADS)
        with edited_bundle(bundle) as folder:
            write_manifest(folder, convert_graphs(bundle, options, folder, lambda _: None).manifest)


@pytest.fixture(scope="session")
def low_bundle_path(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle without `fused`, with FP16, INT8 and INT8-FP16 graphs."""

    def make(path: Path) -> None:
        copy_of(tiny_bundle_path, path.parent, path.name)
        (path / "graphs" / "fused.onnx").unlink()
        reseal(path, lambda manifest: manifest["graphs"].pop("fused"))
        add_precisions(path, ("fp16", "int8", "int8-fp16"))

    return made_once(tmp_path_factory, "low.cclip", make)


@pytest.fixture
def traced_before(tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, onnx.ModelProto]:
    """Replace tracing in an export by the tiny bundle's graphs, which a test may modify."""
    bundle = Bundle.open(tiny_bundle_path)
    graphs = {name: load_model(bundle, name) for name in bundle.manifest.graphs}

    def take(*args: Any) -> dict[str, onnx.ModelProto]:
        return dict(graphs)

    monkeypatch.setattr(export, "trace_graphs", take)
    return graphs
