"""Engines of every precision, built by TensorRT-RTX: proofs, calibration hashes, and builds that are refused."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.engines.build import SERVED, BuildOptions, build_engines
from cclip_deploy.errors import BundleError, DataError, ParityError, UsageError
from cclip_deploy.graph.precision import float16 as graph_precision
from cclip_deploy.graph.precision import quantize as quantize
from cclip_deploy.quantization import agreement as mask_agreement
from cclip_deploy.quantization.calibrate import CalibrationOptions
from cclip_deploy.runtime.tensorrt.layers import LayerTable
from cclip_deploy.verify.engine_proof import engine_checks
from cclip_deploy.verify.verify import VerifyOptions, verify_bundle
from tests.bundles import copy_of, digests, reseal
from tests.cli.run import invoke
from tests.conftest import THREADS, TINY_HW

pytestmark = pytest.mark.slow

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is an extra: pip install 'cclip-deploy[rtx]'")

IMAGE = ("image_encoder",)


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 16 training images and two test images, in the tiny bundle's size."""
    folder = tmp_path_factory.mktemp("films") / "data"
    write_dataset(folder, {"train": 16, "test": 2}, TINY_HW, 6)
    return folder


@pytest.fixture(scope="session")
def int8_bundle_path(tiny_bundle_path: Path, films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with INT8 engines and an FP16 rest."""
    path = copy_of(tiny_bundle_path, tmp_path_factory.mktemp("int8"), "int8.cclip")
    build_engines(Bundle.open(path), options(films, "int8-fp16", SERVED))
    return path


@pytest.fixture
def copy(tiny_bundle_path: Path, tmp_path: Path) -> Path:
    return copy_of(tiny_bundle_path, tmp_path / "here")


def options(films: Path, precision: Precision, graphs: tuple[str, ...] = IMAGE, **further: Any) -> BuildOptions:
    calibration = CalibrationOptions((films,), "min-max") if "8" in precision else None
    return BuildOptions(precision, graphs=graphs, threads=THREADS, calibration=calibration, **further)


def test_int8_engines_are_proved_product_by_product(int8_bundle_path: Path) -> None:
    bundle = Bundle.open(int8_bundle_path)
    assert {e.graph: e.precision for e in bundle.manifest.engines} == {
        "image_encoder": "int8-fp16", "prompt_encoder": "fp16", "mask_decoder": "fp16",
    }  # fmt: skip
    proof = json.loads((int8_bundle_path / bundle.manifest.engines[0].layers).read_text())
    table, kept = LayerTable.from_dict(proof), set(proof["kept"])
    plan = quantize.plan_quantization(onnx.load(int8_bundle_path / "graphs/image_encoder.onnx"))
    assert kept == set(plan.high_precision)
    assert set(proof["products"]) - kept == {product.node for product in plan.products}
    for node in set(proof["products"]) - kept:
        assert {row.precision for row in table.rows_of(node)} == {"int8"}, node


def test_the_chain_of_hashes_leads_through_the_calibration(int8_bundle_path: Path) -> None:
    bundle = Bundle.open(int8_bundle_path)
    graph, found = bundle.graph("image_encoder.int8-fp16"), digests(int8_bundle_path)
    assert graph.calibration is not None
    assert graph.calibration.sha256 == found[graph.calibration.file]
    assert graph.made_from_sha256 == found["graphs/image_encoder.onnx"]
    record = json.loads((int8_bundle_path / graph.calibration.file).read_text())
    assert record["graph_sha256"] == graph.made_from_sha256
    assert len(record["pictures"]) == 16
    assert bundle.check_all() == ()


def test_an_int8_bundle_verifies_graphs_chain_and_engines(int8_bundle_path: Path) -> None:
    found = verify_bundle(Bundle.open(int8_bundle_path), VerifyOptions(threads=THREADS))
    assert found.passed
    low = {(check.graph, check.backend) for check in found.checks if check.precision == "int8-fp16"}
    assert low == {
        ("image_encoder", "onnxruntime"), ("chain", "onnxruntime"), ("image_encoder", "tensorrt-rtx"),
        ("image_encoder", "onnx"),
    }  # fmt: skip
    assert any("calibrated on 16 images (min-max)" in note for note in found.notes)


def test_a_record_with_more_high_precision_products_than_its_graph_is_refused(
    int8_bundle_path: Path, tmp_path: Path
) -> None:
    copy = copy_of(int8_bundle_path, tmp_path)
    record = copy / Bundle.open(copy).manifest.engines[0].layers
    proof = json.loads(record.read_text())
    first = next(node for node in proof["products"] if node not in proof["kept"])
    record.write_text(json.dumps({**proof, "kept": sorted([*proof["kept"], first])}))
    reseal(copy)
    checks, notes = engine_checks(Bundle.open(copy))
    assert {check.name for check in checks if not check.passed} == {"image_encoder/engine/precision_honoured"}
    assert any(f"differ in the products in a higher precision; first: {first}" in note for note in notes)


def test_predict_reports_the_precision_of_each_graph(int8_bundle_path: Path, films: Path, tmp_path: Path) -> None:
    image = next((films / "images").iterdir())
    arguments = ("predict", int8_bundle_path, image, "--prompt", "lung", "--threads", THREADS, "-o", tmp_path / "out")
    report = json.loads(invoke(*arguments, "--precision", "int8-fp16", "--json").stdout)["ran"]
    assert report["graphs"] == {"image_encoder": "int8-fp16", "prompt_encoder": "fp16", "mask_decoder": "fp16"}
    assert any("in FP32 arithmetic" in note for note in report["notes"])
    done = invoke(*arguments, "--precision", "fp16")
    assert done.exit_code == 2
    assert "has no graph 'image_encoder.fp16'" in " ".join(done.stderr.split())


def test_graphs_that_openvino_cannot_run_are_refused_and_not_verified(
    int8_bundle_path: Path, films: Path, tmp_path: Path
) -> None:
    image = next((films / "images").iterdir())
    openvino = ("--backend", "openvino", "--threads", THREADS)
    done = invoke(
        "predict", int8_bundle_path, image, "--prompt", "lung", "--precision", "int8-fp16", "-o", tmp_path / "out",
        *openvino,
    )  # fmt: skip
    assert done.exit_code == 2
    assert "it cannot run int8-fp16 graphs" in " ".join(done.stderr.split())
    done = invoke("verify", int8_bundle_path, *openvino, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert [(row["graph"], row["backend"]) for row in report["not_verified"]] == [
        ("image_encoder.int8-fp16", "openvino")
    ]
    assert "int8-fp16" not in {check["precision"] for check in report["checks"] if check["backend"] == "openvino"}
    assert {row["precision"] for row in report["ran"]} == {"fp32", "fp16"}
    message = " ".join(invoke("verify", int8_bundle_path, *openvino).stdout.split())
    assert "Not verified: image_encoder.int8-fp16 on openvino: OpenVINO does not compile convolutions" in message


def test_int8_weights_make_the_file_smaller(int8_bundle_path: Path) -> None:
    sizes = {
        n: (int8_bundle_path / f"graphs/{n}.onnx").stat().st_size for n in ("image_encoder", "image_encoder.int8-fp16")
    }
    assert sizes["image_encoder.int8-fp16"] < 0.35 * sizes["image_encoder"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(graph_sha256="0" * 64), "made with another graph"),
        (lambda record: record.pop("pictures"), "not a calibration record"),
    ],
)
def test_a_record_of_another_graph_is_refused(
    change: Any, message: str, int8_bundle_path: Path, tmp_path: Path
) -> None:
    copy = copy_of(int8_bundle_path, tmp_path)
    path = copy / "calibration/image_encoder.int8-fp16.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(BundleError, match="was altered"):
        verify_bundle(Bundle.open(copy), VerifyOptions(threads=THREADS))
    entry = {
        "file": "calibration/image_encoder.int8-fp16.json",
        "sha256": digests(copy)[path.relative_to(copy).as_posix()],
    }
    reseal(copy, lambda m: m["graphs"]["image_encoder.int8-fp16"].update(calibration=entry))
    with pytest.raises(BundleError, match=message):
        verify_bundle(Bundle.open(copy), VerifyOptions(threads=THREADS))


def test_a_quantized_graph_without_a_record_does_not_open(int8_bundle_path: Path, tmp_path: Path) -> None:
    copy = copy_of(int8_bundle_path, tmp_path)
    reseal(copy, lambda m: m["graphs"]["image_encoder.int8-fp16"].update(calibration=None))
    with pytest.raises(BundleError, match="has no calibration record"):
        Bundle.open(copy)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "fp8", "fp8-fp16"])
def test_other_precisions_are_built_and_proved_too(precision: Precision, copy: Path, films: Path) -> None:
    (entry,) = build_engines(Bundle.open(copy), options(films, precision))
    assert entry.precision == precision
    table = LayerTable.from_dict(json.loads((copy / entry.layers).read_text()))
    rest = {"int8": {"fp32"}, "fp8": {"fp32"}, "fp8-fp16": {"fp16"}}.get(precision, set())
    assert set(table.product_summary()) - rest == {precision.removesuffix("-fp16")}
    assert {row.role for row in table.rows if row.types} <= {"product", "other"}
    found = verify_bundle(Bundle.open(copy), VerifyOptions(threads=THREADS))
    assert found.passed


def test_a_high_precision_block_is_proved_to_run_in_the_type_of_the_rest(copy: Path, films: Path) -> None:
    (entry,) = build_engines(Bundle.open(copy), options(films, "int8", keep=("neck.masker3",)))
    proof = json.loads((copy / entry.layers).read_text())
    table = LayerTable.from_dict(proof)
    graph = onnx.load(copy / "graphs/image_encoder.onnx")
    kept = [
        n.name for n in graph.graph.node if any(i.startswith("neck.masker3.") for i in n.input) and n.op_type == "Conv"
    ]
    assert len(kept) == 4
    assert set(kept) <= set(proof["kept"])
    assert {row.precision for node in kept for row in table.rows_of(node)} == {"fp32"}


def test_fp16_inputs_and_outputs_are_optional(copy: Path, films: Path) -> None:
    (entry,) = build_engines(Bundle.open(copy), options(films, "fp16", ("mask_decoder",), io="fp16"))
    graph = Bundle.open(copy).graph("mask_decoder.fp16")
    assert {tensor.dtype for tensor in (*graph.inputs, *graph.outputs)} == {"float16"}
    table = LayerTable.from_dict(json.loads((copy / entry.layers).read_text()))
    types = {t.name: t.type for row in table.rows for t in (*row.inputs, *row.outputs)}
    assert types["features"] == types["logits"] == "fp16"
    assert verify_bundle(Bundle.open(copy), VerifyOptions(threads=THREADS)).passed


def test_an_engine_that_is_not_int8_is_not_published(copy: Path, films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If quantization returns the FP32 graph, the check of the built engine fails, with exit code 4."""
    monkeypatch.setattr(quantize, "quantize", lambda model, *rest: model)
    before = digests(copy)
    with pytest.raises(ParityError, match="INT8 was requested, but the engine does not run in it") as caught:
        build_engines(Bundle.open(copy), options(films, "int8"))
    assert caught.value.exit_code == 4
    assert digests(copy) == before


def test_engines_with_inaccurate_masks_on_the_evaluation_set_are_not_published(
    copy: Path, films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INT8 masks of the untrained tiny network break the limits; with lower limits the engines are published."""
    wanted = BuildOptions(
        "int8", threads=THREADS, calibration=CalibrationOptions((films,), "min-max", evaluation_set=(films,))
    )
    monkeypatch.setattr(mask_agreement, "LEAST_MEAN_DICE", 0.9999)
    before = digests(copy)
    with pytest.raises(
        ParityError, match=r"int8 masks differ too much from FP32's .* mean Dice 0\.\d+ .*Nothing was\s+published"
    ):
        build_engines(Bundle.open(copy), wanted)
    assert digests(copy) == before
    monkeypatch.setattr(mask_agreement, "LEAST_MEAN_DICE", 0.5)
    monkeypatch.setattr(mask_agreement, "LEAST_DICE", 0.5)
    build_engines(Bundle.open(copy), wanted)
    report = json.loads((copy / "reports/int8.masks.json").read_text())
    assert (report["pictures"], report["precision"]) == (2, "int8")
    assert 0.5 < report["worst"] <= report["mean"] < 0.9999


def test_a_layer_that_overflows_in_fp16_is_named(copy: Path, films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = graph_precision.to_fp16

    def overflowing(model: onnx.ModelProto, fp32_nodes: frozenset[str]) -> onnx.ModelProto:
        half = real(model)
        for tensor in half.graph.initializer:
            if tensor.name == "tower.conv3.weight":
                values = onnx.numpy_helper.to_array(tensor) * 0 + 60000
                tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype("float16"), tensor.name))
        return half

    monkeypatch.setattr(graph_precision, "to_fp16", overflowing)
    graph = onnx.load(copy / "graphs/image_encoder.onnx")
    culprit = next(node.name for node in graph.graph.node if "tower.conv3.weight" in node.input)
    before = digests(copy)
    with pytest.raises(ParityError, match=f"fp16 graph of image_encoder .* first at node '{culprit}'"):
        build_engines(Bundle.open(copy), options(films, "fp16"))
    assert digests(copy) == before


def test_graphs_without_products_and_overlapping_images_are_refused(copy: Path, films: Path) -> None:
    before = digests(copy)
    with pytest.raises(UsageError, match="Nothing in prompt_encoder, mask_decoder can be quantized"):
        build_engines(Bundle.open(copy), options(films, "int8", ("prompt_encoder", "mask_decoder")))
    overlapping = CalibrationOptions((films / "images",), evaluation_set=(films,))
    with pytest.raises(DataError, match="in the evaluation set too"):
        build_engines(Bundle.open(copy), BuildOptions("int8", calibration=overlapping))
    assert digests(copy) == before


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--int8",), 2, "give --calibration DIR"),
        (("--bf16", "--fp16"), 2, "cannot be combined"),
        (("--fp32", "--int8"), 2, "cannot be combined"),
        (("--fp16", "--evaluation-set", "{films}"), 2, "needs --calibration"),
        (("--fp8", "--calibration", "{films}", "--compute-capability", "8.0"), 2, "FP8 needs a GPU"),
        (("--int8", "--calibration", "/nowhere"), 6, "/nowhere does not exist"),
        (("--int8", "--calibration", "{films}/images", "--evaluation-set", "{films}"), 6, "evaluation set too"),
    ],
)
def test_invalid_flags_end_with_their_exit_code(
    flags: tuple[str, ...], code: int, message: str, copy: Path, films: Path
) -> None:
    done = invoke("build-engine", copy, "--no-calibration-cache", *(flag.format(films=films) for flag in flags))
    assert done.exit_code == code, done.stderr
    assert message in " ".join(done.stderr.split())


def test_the_command_builds_int8_and_reports_calibration_and_evaluation_images(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the format of QaTa-COV19. The tiny network is untrained, so its limits are lowered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mask_agreement, "LEAST_MEAN_DICE", 0.3)
    monkeypatch.setattr(mask_agreement, "LEAST_DICE", 0.3)
    write_dataset(tmp_path / "set", {"train": 8, "val": 2, "test": 3}, TINY_HW, 6, layout="qata")
    done = invoke(
        "build-engine", copy, "--int8", "--fp16", "--calibration", tmp_path / "set", "--evaluation-set",
        tmp_path / "set", "--calibration-method", "min-max", "--evaluation-pictures", "2", "--threads", THREADS,
        "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert [engine["precision"] for engine in report["engines"]] == ["int8-fp16", "fp16", "fp16"]
    assert list((tmp_path / "cache").rglob("*.json"))
    train, test = (
        {"name": "set", "layout": "lvit", "split": split, "images": count, "patients": count,
         "images_without_patient": 0}
        for split, count in (("train", 8), ("test", 3))
    )  # fmt: skip
    assert report["calibration"] == {
        "pictures": 8, "patients": 8, "sources": [train], "evaluation_pictures": 3, "evaluation_sources": [test],
        "failed": [],
    }  # fmt: skip
    agreement = report["mask_agreement"]
    assert (agreement["pictures"], agreement["patients"], agreement["sources"]) == (2, 2, [test])


def test_an_unreadable_calibration_image_is_named_instead_of_the_bundle(
    copy: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root ignores permissions, so opening one file is made to fail."""
    shutil.copytree(films, tmp_path / "films")
    refused, real = tmp_path / "films" / "images" / "train-00003.png", Path.open

    def opening(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == refused and arguments == ("rb",) and sys._getframe(1).f_code.co_name.startswith("sha256"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", opening)
    before = digests(copy)
    done = invoke("build-engine", copy, "--int8", "--calibration", tmp_path / "films", "--no-calibration-cache")
    assert done.exit_code == 6, done.stderr
    message = " ".join(done.stderr.split())
    assert "train-00003.png cannot be read: Permission denied" in message
    assert "could not be written" not in message
    assert digests(copy) == before


def test_a_patient_in_both_sets_ends_the_command_with_code_6(copy: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", {"train": 8, "test": 2}, TINY_HW, 6)
    table = tmp_path / "set" / "table.csv"
    table.write_text(table.read_text().replace("synthetic-test-00001", "synthetic-train-00003"))
    done = invoke(
        "build-engine", copy, "--int8", "--calibration", tmp_path / "set", "--evaluation-set", tmp_path / "set"
    )
    assert done.exit_code == 6, done.stderr
    assert "1 of 8 calibration images are of 1 patient in the evaluation set too (first synthetic-train-00003)" in (
        " ".join(done.stderr.split())
    )
