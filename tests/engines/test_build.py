"""Engines are added to a bundle completely, with their proofs and hashes, or the bundle stays unchanged."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import onnx
import pytest

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.engines import build
from cclip_deploy.engines.build import SERVED, BuildOptions, build_engines
from cclip_deploy.errors import BundleError, EnvironmentIssue, ParityError, UsageError
from cclip_deploy.graph.precision import float16 as graph_precision
from cclip_deploy.quantization.calibrate import CalibrationOptions
from cclip_deploy.runtime.tensorrt.layers import LayerTable
from cclip_deploy.runtime.tensorrt.settings import EngineSettings
from cclip_deploy.verify.engine_proof import engine_checks
from tests.bundles import copy_of, digests, flip_byte
from tests.conftest import THREADS

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is an extra: pip install 'cclip-deploy[rtx]'")

DECODER_FP32 = BuildOptions("fp32", graphs=("mask_decoder",), threads=THREADS)


@pytest.fixture
def copy(tiny_bundle_path: Path, tmp_path: Path) -> Path:
    return copy_of(tiny_bundle_path, tmp_path / "here")


def test_fp16_adds_a_graph_and_an_engine_for_each_served_graph(
    engine_bundle_path: Path, tiny_bundle_path: Path
) -> None:
    added = digests(engine_bundle_path).keys() - digests(tiny_bundle_path).keys()
    assert added == {
        name
        for graph in SERVED
        for name in (
            f"graphs/{graph}.fp16.onnx", f"engines/{graph}.fp16.tensorrt-rtx.engine",
            f"engines/{graph}.fp16.tensorrt-rtx.layers.json",
        )
    }  # fmt: skip
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=engine_bundle_path).returncode == 0
    bundle = Bundle.open(engine_bundle_path)
    assert bundle.check_all() == ()
    assert bundle.precisions() == ("fp32", "fp16")


def test_the_chain_of_hashes_leads_from_engine_to_checkpoint(engine_bundle_path: Path) -> None:
    manifest = Bundle.open(engine_bundle_path).manifest
    found = digests(engine_bundle_path)
    assert [engine.graph for engine in manifest.engines] == list(SERVED)
    for engine in manifest.engines:
        half, full = manifest.graphs[f"{engine.graph}.fp16"], manifest.graphs[engine.graph]
        assert engine.sha256 == found[engine.file]
        assert engine.graph_sha256 == half.sha256 == found[half.file]
        assert half.made_from_sha256 == full.sha256 == found[full.file]
        assert full.made_from_sha256 == manifest.checkpoint.sha256
        assert (engine.precision, half.precision, engine.backend) == ("fp16", "fp16", "tensorrt-rtx")
        assert engine.build_seconds > 0
        assert (engine_bundle_path / engine.file).stat().st_size > 10_000


def test_graphs_of_another_precision_keep_the_same_inputs_and_outputs(engine_bundle_path: Path) -> None:
    manifest = Bundle.open(engine_bundle_path).manifest
    for graph in SERVED:
        half, full = manifest.graphs[f"{graph}.fp16"], manifest.graphs[graph]
        assert (half.inputs, half.outputs, half.multiply_adds) == (full.inputs, full.outputs, full.multiply_adds)


def test_dynamic_sizes_have_the_requested_bounds_and_are_tuned_for_one(engine_bundle_path: Path) -> None:
    shapes = {engine.graph: engine.shapes for engine in Bundle.open(engine_bundle_path).manifest.engines}
    one, most = (1, 3, 64, 96), (8, 3, 64, 96)
    assert shapes["image_encoder"] == {"image": (one, one, most)}
    assert shapes["prompt_encoder"] == {"tokens": ((1, 24), (1, 24), (16, 24))}
    assert shapes["mask_decoder"] == {
        "features": ((1, 64, 96, 32), (1, 64, 96, 32), (8, 64, 96, 32)),
        "kernel": ((1, 9, 32), (1, 9, 32), (16, 9, 32)),
        "tap_bias": ((1, 9), (1, 9), (16, 9)),
        "bias": ((1,), (1,), (16,)),
    }


def test_the_layer_table_of_an_engine_proves_its_precision(engine_bundle_path: Path) -> None:
    for engine in Bundle.open(engine_bundle_path).manifest.engines:
        proof = json.loads((engine_bundle_path / engine.layers).read_text())
        table = LayerTable.from_dict(proof)
        graph = onnx.load(engine_bundle_path / "graphs" / f"{engine.graph}.fp16.onnx")
        assert set(proof["products"]) <= {node.name for node in graph.graph.node}
        assert proof["products"]
        assert table.product_summary()["fp16"] > 0
        assert "fp32" not in table.product_summary()


def test_a_second_precision_is_added_beside_the_first_and_a_second_build_replaces(
    engine_bundle_path: Path, tmp_path: Path
) -> None:
    copy = copy_of(engine_bundle_path, tmp_path)
    for _ in range(2):
        entries = build_engines(Bundle.open(copy), DECODER_FP32)
        assert [(entry.graph, entry.precision) for entry in entries] == [("mask_decoder", "fp32")]
    engines = Bundle.open(copy).manifest.engines
    assert [(engine.graph, engine.precision) for engine in engines] == [
        *((graph, "fp16") for graph in SERVED), ("mask_decoder", "fp32"),
    ]  # fmt: skip
    assert Bundle.open(copy).check_all() == ()
    assert os.listdir(tmp_path) == [copy.name]


def test_products_of_a_single_row_are_proved_where_they_are_fused_with_casts(copy: Path) -> None:
    """For a single prompt, TensorRT-RTX fuses products with the preceding FP32 layer norms."""
    (engine,) = build_engines(
        Bundle.open(copy), BuildOptions(graphs=("prompt_encoder",), one_alone=True, threads=THREADS)
    )
    table = LayerTable.from_dict(json.loads((copy / engine.layers).read_text()))
    small = [row for row in table.rows if row.is_product and "MulSum" in row.name]
    assert any("Cast" in row.name and "fp32" in row.types for row in small)
    assert {row.precision for row in small} == {"fp16"}
    checks, _ = engine_checks(Bundle.open(copy))
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("stage", ["Building prompt_encoder", "Comparing the fp16", "Converting mask_decoder"])
def test_an_interrupted_build_changes_no_byte_of_the_bundle(copy: Path, stage: str) -> None:
    def interrupt(message: str) -> None:
        if message.startswith(stage):
            raise KeyboardInterrupt

    before, inode = digests(copy), (copy / "graphs" / "fused.onnx").stat().st_ino
    with pytest.raises(KeyboardInterrupt):
        build_engines(
            Bundle.open(copy), BuildOptions(graphs=("prompt_encoder", "mask_decoder"), threads=THREADS), interrupt
        )
    assert digests(copy) == before
    assert (copy / "graphs" / "fused.onnx").stat().st_ino == inode
    assert os.listdir(copy.parent) == [copy.name]


def test_an_interrupted_second_build_changes_no_byte_of_the_first_engines(
    engine_bundle_path: Path, tmp_path: Path
) -> None:
    """Unchanged files are hard links into the copy under construction; writing into one would change both."""
    copy = copy_of(engine_bundle_path, tmp_path)
    before = digests(copy)

    def interrupt(message: str) -> None:
        if message.startswith("Building mask_decoder"):
            raise KeyboardInterrupt

    larger = BuildOptions(graphs=("prompt_encoder", "mask_decoder"), max_prompts=32, threads=THREADS)
    with pytest.raises(KeyboardInterrupt):
        build_engines(Bundle.open(copy), larger, interrupt)
    assert digests(copy) == before
    build_engines(Bundle.open(copy), larger)
    after = digests(copy)
    assert {name for name in after if after[name] != before[name]} >= {
        "SHA256SUMS", "manifest.json", "engines/prompt_encoder.fp16.tensorrt-rtx.engine",
    }  # fmt: skip


def test_ctrl_c_inside_the_builder_changes_no_byte_of_the_bundle(copy: Path) -> None:
    seen: list[str] = []

    def interrupt(message: str) -> None:
        seen.append(message)
        if message.startswith("mask_decoder: "):
            raise KeyboardInterrupt

    before = digests(copy)
    with pytest.raises(KeyboardInterrupt):
        build_engines(Bundle.open(copy), DECODER_FP32, interrupt)
    assert seen[-1].startswith("mask_decoder: ")
    assert digests(copy) == before
    assert os.listdir(copy.parent) == [copy.name]


def test_an_engine_that_is_not_in_the_precision_is_not_added(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the conversion returns the FP32 graph, the check of the built engine fails."""
    monkeypatch.setattr(graph_precision, "to_fp16", lambda model, fp32_nodes: model)
    before = digests(copy)
    with pytest.raises(ParityError, match="FP16 was requested"):
        build_engines(Bundle.open(copy), BuildOptions(graphs=("mask_decoder",), threads=THREADS))
    assert digests(copy) == before
    assert os.listdir(copy.parent) == [copy.name]


def test_a_graph_that_differs_from_the_reference_is_not_built(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = graph_precision.to_fp16

    def coarse(model: onnx.ModelProto, fp32_nodes: frozenset[str]) -> onnx.ModelProto:
        converted = real(model)
        for tensor in converted.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT16 and len(tensor.dims) > 1:
                values = onnx.numpy_helper.to_array(tensor) * 1.2
                tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype("float16"), tensor.name))
        return converted

    def build_nothing(*args: Any) -> None:
        raise AssertionError("an engine was built")

    monkeypatch.setattr(graph_precision, "to_fp16", coarse)
    monkeypatch.setattr(build, "build_engine", build_nothing)
    before = digests(copy)
    with pytest.raises(
        ParityError, match=r"prompt_encoder/layers \(fp16\), .*: node 'node_embedding' \(Gather\): 0\.2"
    ):
        build_engines(Bundle.open(copy), BuildOptions(graphs=("prompt_encoder",), threads=THREADS))
    assert digests(copy) == before


@pytest.mark.parametrize("name", ["graphs/mask_decoder.onnx", "graphs/fused.onnx", "tokenizer.json"])
def test_nothing_is_built_into_an_altered_bundle(copy: Path, name: str) -> None:
    flip_byte(copy / name)
    before = digests(copy)
    with pytest.raises(BundleError, match=f"{name} was altered"):
        build_engines(Bundle.open(copy), DECODER_FP32)
    assert digests(copy) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(graphs=("image",)), "no graph 'image'; it has"),
        (BuildOptions(graphs=()), "No graph was named"),
        (BuildOptions(graphs=("fused", "fused")), "named twice"),
        (BuildOptions(max_batch=0), "must be 1 or more"),
        (BuildOptions(max_prompts=0), "must be 1 or more"),
        (BuildOptions("half"), "no precision 'half'"),  # type: ignore[arg-type]
        (BuildOptions("int8"), "give --calibration DIR"),
        (BuildOptions("fp8", settings=EngineSettings(("8.0",))), r"FP8 needs a GPU of compute capability 8\.9"),
        (BuildOptions("bf16", settings=EngineSettings(("7.5",))), r"BF16 needs a GPU of compute capability 8\.0"),
        (BuildOptions("fp16", settings=EngineSettings(("ada",))), "'ada' is not a version such as 8.9"),
        (
            BuildOptions("fp32", graphs=("mask_decoder",), settings=EngineSettings(("9.0",))),
            r"does not build for .* 9\.0",
        ),
        (BuildOptions("fp32", io="fp16"), "--io fp16 requires a lower precision"),
        (BuildOptions("fp16", calibration=CalibrationOptions((Path("x"),))), "fp16 has no scales to calibrate"),
        (BuildOptions("fp16", graphs=("mask_decoder",), keep=("neck",)), "block named 'neck'"),
        (BuildOptions("fp32", graphs=("mask_decoder",), workspace_bytes=0), "workspace_bytes must be positive"),
    ],
)
def test_invalid_options_are_refused(copy: Path, options: BuildOptions, message: str) -> None:
    before = digests(copy)
    with pytest.raises(UsageError, match=message):
        build_engines(Bundle.open(copy), options)
    assert digests(copy) == before


def test_a_converted_graph_is_not_converted_again(engine_bundle_path: Path) -> None:
    with pytest.raises(UsageError, match="Name the FP32 graph, mask_decoder"):
        build_engines(Bundle.open(engine_bundle_path), BuildOptions(graphs=("mask_decoder.fp16",)))


def test_a_missing_binding_is_reported_before_anything_changes(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise EnvironmentIssue("not installed")

    monkeypatch.setattr(build, "load_binding", missing)
    before = digests(copy)
    with pytest.raises(EnvironmentIssue):
        build_engines(Bundle.open(copy), DECODER_FP32)
    assert digests(copy) == before


def test_a_plain_bundle_has_none_of_the_served_graphs(plain_bundle_path: Path) -> None:
    with pytest.raises(UsageError, match="no graph 'image_encoder'; it has plain"):
        build_engines(Bundle.open(plain_bundle_path), BuildOptions())
