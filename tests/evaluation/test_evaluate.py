"""Tests of evaluating a checkpoint and its bundle, and of the report."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.bundle.bundle import Bundle, edited_bundle, write_manifest
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.datasets.flat import read_flat
from cclip_deploy.datasets.mask_file import read_mask
from cclip_deploy.datasets.synthetic.generator import SyntheticOptions, write_dataset
from cclip_deploy.engines.convert import ConvertOptions, convert_graphs
from cclip_deploy.errors import BundleError, DataError, EnvironmentIssue, UsageError
from cclip_deploy.evaluation.bootstrap import FEW_PATIENTS
from cclip_deploy.evaluation.evaluate import EvaluationOptions, EvaluationResult, NetworkConfig, evaluate
from cclip_deploy.evaluation.report import check_report_folder, remarks, write_report
from cclip_deploy.evaluation.summary import Scores
from cclip_deploy.imaging.reading import read_image
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.model.checkpoint import save_checkpoint
from cclip_deploy.model.config import InputForm
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.quantization.calibrate import CalibrationOptions
from cclip_deploy.runtime.registry import BackendConfig, BackendName, open_backend
from tests.bundles import copy_of
from tests.conftest import THREADS, TINY_HW

FILM_HW = (80, 72)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six test images of another size than the network's, with three prompts each, some without a target."""
    folder = tmp_path_factory.mktemp("data") / "films"
    write_dataset(folder, {"test": 6}, FILM_HW, 0, prompts_per_image=3, options=SyntheticOptions(absent_share=0.3))
    return folder


@pytest.fixture(scope="module")
def of_checkpoint(tiny_checkpoint: Path, films: Path) -> EvaluationResult:
    choice = NetworkConfig(tiny_checkpoint, threads=THREADS, image_hw=TINY_HW, prompt_length=24)
    return evaluate(choice, films, EvaluationOptions(worst=2))


@pytest.fixture(scope="module")
def of_bundle(tiny_bundle_path: Path, films: Path) -> EvaluationResult:
    return evaluate(NetworkConfig(tiny_bundle_path, threads=THREADS), films, EvaluationOptions(worst=2))


def row_dice(result: EvaluationResult) -> np.ndarray:
    return np.array([row.overlap.dice for row in result.measurements.rows])


def test_a_bundle_and_its_checkpoint_agree(of_bundle: EvaluationResult, of_checkpoint: EvaluationResult) -> None:
    np.testing.assert_allclose(row_dice(of_bundle), row_dice(of_checkpoint), atol=2e-3)
    for one, other in zip(of_bundle.evaluation.controls, of_checkpoint.evaluation.controls, strict=True):
        assert one.dice.value == pytest.approx(other.dice.value, abs=2e-3)
    assert of_bundle.evaluation.scores.brier.value == pytest.approx(
        of_checkpoint.evaluation.scores.brier.value, abs=1e-5
    )
    assert of_bundle.network["checkpoint_sha256"] == of_checkpoint.network["checkpoint_sha256"]
    assert (of_bundle.network["backend"], of_checkpoint.network["backend"]) == ("onnxruntime", "pytorch")


def test_a_checkpoint_is_evaluated_at_its_stored_input_form(
    tiny_network: CausalCLIPSeg, films: Path, tmp_path: Path, of_checkpoint: EvaluationResult
) -> None:
    save_checkpoint(tiny_network, tmp_path / "trained.safetensors", InputForm(TINY_HW, 24))
    found = evaluate(
        NetworkConfig(tmp_path / "trained.safetensors", threads=THREADS), films, EvaluationOptions(worst=0)
    )
    assert (found.network["image_hw"], found.network["prompt_length"]) == (list(TINY_HW), 24)
    np.testing.assert_array_equal(row_dice(found), row_dice(of_checkpoint))


def test_backends_agree(tiny_bundle_path: Path, films: Path, of_bundle: EvaluationResult) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is an extra: pip install 'cclip-deploy[openvino]'")
    choice = NetworkConfig(tiny_bundle_path, BackendConfig("openvino", threads=THREADS))
    np.testing.assert_allclose(row_dice(evaluate(choice, films, EvaluationOptions())), row_dice(of_bundle), atol=2e-3)


@pytest.fixture(scope="module")
def low_bundle_path(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with FP16 graphs and an INT8 image encoder."""
    folder = tmp_path_factory.mktemp("low")
    path = copy_of(tiny_bundle_path, folder)
    write_dataset(folder / "data", {"train": 8}, TINY_HW, 5)
    calibration = CalibrationOptions((folder / "data",), "min-max")
    graphs = ("image_encoder", "prompt_encoder", "mask_decoder")
    for wanted in (ConvertOptions("fp16", graphs, threads=THREADS), ConvertOptions("int8", graphs, calibration)):
        bundle = Bundle.open(path)
        with edited_bundle(bundle) as unfinished:
            write_manifest(unfinished, convert_graphs(bundle, wanted, unfinished, print).manifest)
    return path


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("precision", "rest"), [("fp16", "fp16"), ("int8", "fp32")])
def test_low_precision_results_match_the_segmenter(
    backend: BackendName, precision: Precision, rest: str, low_bundle_path: Path, films: Path,
    of_bundle: EvaluationResult,
) -> None:  # fmt: skip
    """Dice of every row equals that of the segmenter's probabilities, and differs from FP32."""
    pytest.importorskip(backend)
    result = evaluate(
        NetworkConfig(low_bundle_path, BackendConfig(backend, threads=THREADS), precision), films, EvaluationOptions()
    )
    bundle = Bundle.open(low_bundle_path)
    segmenter = Segmenter.of_bundle(bundle, open_backend(BackendConfig(backend, threads=THREADS), bundle, precision))
    expected = []
    for row in read_flat(films):
        probability = next(segmenter.probabilities(read_image(row.image).pixels, [row.text]))
        predicted, reference = probability >= 0.5, read_mask(row.mask)
        total = predicted.sum() + reference.sum()
        expected.append(2 * (predicted & reference).sum() / total if total else 1.0)
    np.testing.assert_allclose(row_dice(result), expected, atol=1e-12)
    assert not np.array_equal(row_dice(result), row_dice(of_bundle))
    assert result.network["graphs"] == {"image_encoder": precision, "prompt_encoder": rest, "mask_decoder": rest}
    assert (result.network["backend"], result.network["precision"]) == (backend, precision)
    assert f"Ran in {backend} on cpu: image_encoder in {precision}, prompt_encoder in {rest}" in " ".join(
        remarks(result)
    )


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-fp16", "fp8"])
def test_a_precision_that_the_bundle_lacks_is_an_error(precision: str, tiny_bundle_path: Path, films: Path) -> None:
    with pytest.raises(UsageError, match=f"build-engine BUNDLE --{precision.replace('-', ' --')}"):
        evaluate(NetworkConfig(tiny_bundle_path, precision=precision), films, EvaluationOptions())


def test_missing_engines_are_an_error_without_fallback(tiny_bundle_path: Path, films: Path) -> None:
    runs = BackendConfig("tensorrt-rtx", allow_fallback=True)
    with pytest.raises(UsageError, match="build-engine BUNDLE --fp16 --backend tensorrt-rtx"):
        evaluate(NetworkConfig(tiny_bundle_path, runs, "fp16"), films, EvaluationOptions())


def test_a_fallback_is_reported(tiny_bundle_path: Path, films: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(EnvironmentIssue, match="CUDAExecutionProvider"):
        evaluate(NetworkConfig(tiny_bundle_path, BackendConfig(device="cuda")), films, EvaluationOptions())
    choice = NetworkConfig(tiny_bundle_path, BackendConfig(device="cuda", threads=THREADS, allow_fallback=True))
    result = evaluate(choice, films, EvaluationOptions())
    assert (result.network["ran"]["asked"], result.network["ran"]["ran"]) == (
        "onnxruntime on cuda", "onnxruntime on cpu",
    )  # fmt: skip
    assert any("onnxruntime on cuda was requested and did not run" in remark for remark in remarks(result))


def test_metrics_are_computed_at_the_original_image_size(of_bundle: EvaluationResult) -> None:
    assert {row.pixels for row in of_bundle.measurements.rows} == {FILM_HW[0] * FILM_HW[1]}


def test_the_split_is_described(of_bundle: EvaluationResult) -> None:
    data = of_bundle.data
    assert (data.images, data.patients, data.split, data.layout, data.patients_known) == (6, 6, "test", "flat", True)
    empty = sum(not row.overlap.reference for row in of_bundle.measurements.rows)
    assert data.empty_masks == empty > 0


def test_long_prompts_are_truncated_and_counted(tiny_checkpoint: Path, films: Path) -> None:
    choice = NetworkConfig(tiny_checkpoint, threads=THREADS, image_hw=(32, 32), prompt_length=8)
    result = evaluate(choice, films, EvaluationOptions())
    assert result.data.cut_prompts == result.data.rows > 0
    assert any("longer than 8 tokens" in remark for remark in remarks(result))


@pytest.fixture
def copy(films: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(films, tmp_path / "copy"))


def keep_rows(folder: Path, count: int) -> None:
    (table,) = folder.glob("*.csv")
    table.write_text("".join(table.read_text().splitlines(keepends=True)[: count + 1]))


def test_one_image_has_values_without_intervals(tiny_bundle_path: Path, copy: Path, tmp_path: Path) -> None:
    keep_rows(copy, 1)
    result = evaluate(NetworkConfig(tiny_bundle_path, threads=THREADS), copy, EvaluationOptions())
    dice = result.evaluation.scores.dice_per_image
    assert dice.value is not None
    assert (dice.low, dice.high, dice.patients) == (None, None, 1)
    assert {c.name for c in result.evaluation.controls if c.missing} == {"shuffled", "fixed"}
    assert any("only one patient" in warning for warning in result.warnings())
    write_report(tmp_path / "report", result)


def test_a_split_of_only_empty_references_can_be_reported(tiny_bundle_path: Path, copy: Path, tmp_path: Path) -> None:
    for mask in (copy / "masks").iterdir():
        Image.new("L", FILM_HW[::-1]).save(mask)
    choice = NetworkConfig(tiny_bundle_path, threads=THREADS)
    result = evaluate(choice, copy, EvaluationOptions(empty="leave-out"))
    assert result.evaluation.scores.dice_per_image.value is None
    assert result.evaluation.scores.empty_found_empty.rows == result.data.rows
    write_report(tmp_path / "report", result)
    assert "False positives" in (tmp_path / "report" / "index.html").read_text()


def test_a_missing_split_is_refused(tiny_bundle_path: Path, films: Path) -> None:
    with pytest.raises(DataError, match="no rows of split 'val'; its splits: test"):
        evaluate(NetworkConfig(tiny_bundle_path), films, EvaluationOptions(split="val"))


def test_an_empty_table_is_refused(tiny_bundle_path: Path, copy: Path) -> None:
    keep_rows(copy, 0)
    with pytest.raises(DataError, match="is empty"):
        evaluate(NetworkConfig(tiny_bundle_path), copy, EvaluationOptions())


def test_a_missing_mask_is_refused_before_computing(tiny_bundle_path: Path, copy: Path) -> None:
    lost = sorted((copy / "masks").iterdir())[-1]
    lost.unlink()
    with pytest.raises(DataError, match=lost.name):
        evaluate(NetworkConfig(tiny_bundle_path), copy, EvaluationOptions())


def test_options_that_do_not_apply_are_refused(tiny_bundle_path: Path, tiny_checkpoint: Path, films: Path) -> None:
    with pytest.raises(UsageError, match="are for a checkpoint"):
        evaluate(NetworkConfig(tiny_bundle_path, image_hw=(64, 64)), films, EvaluationOptions())
    with pytest.raises(UsageError, match="Export it"):
        evaluate(NetworkConfig(tiny_checkpoint, BackendConfig("openvino")), films, EvaluationOptions())
    with pytest.raises(UsageError, match="Export it"):
        evaluate(NetworkConfig(tiny_checkpoint, precision="fp16"), films, EvaluationOptions())
    with pytest.raises(BundleError, match="There is no"):
        evaluate(NetworkConfig(films / "nothing"), films, EvaluationOptions())


@pytest.mark.parametrize("wrong", [{"threshold": 1.0}, {"tolerance_px": -1.0}, {"worst": -1}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, float], films: Path) -> None:
    with pytest.raises(UsageError):
        evaluate(NetworkConfig(films), films, EvaluationOptions(**wrong))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def report(of_bundle: EvaluationResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports") / "report"
    write_report(folder, of_bundle)
    return folder


def test_the_page_is_self_contained(report: Path) -> None:
    page = (report / "index.html").read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) >= 4 + 2
    assert all(source.startswith("data:image/") for source in sources)
    plots = [base64.b64decode(s.partition(",")[2]) for s in sources if s.startswith("data:image/svg")]
    assert len(plots) == 4
    assert "http" not in re.sub(r"data:[^\"]*", "", page)


def test_page_and_json_have_the_same_numbers(report: Path, of_bundle: EvaluationResult) -> None:
    numbers = json.loads((report / "evaluation.json").read_text())
    assert numbers["scores"]["dice_per_image"]["value"] == pytest.approx(row_dice(of_bundle).mean())
    assert numbers["policy"]["empty_reference"] == "one"
    assert f"<b>{numbers['scores']['dice_per_image']['value']:.3f}</b>" in (report / "index.html").read_text()


def test_page_and_json_warn_of_few_patients(report: Path, of_bundle: EvaluationResult) -> None:
    (warning,) = json.loads((report / "evaluation.json").read_text())["warnings"]
    assert warning.startswith(f"Fewer than {FEW_PATIENTS} patients: The split.")
    assert f"<strong>Warning:</strong> {warning}</p>" in (report / "index.html").read_text()


def test_the_warning_names_scores_of_few_patients(of_bundle: EvaluationResult) -> None:
    data = replace(of_bundle.data, patients=FEW_PATIENTS)
    (warning,) = replace(of_bundle, data=data).warnings()
    assert "hd95_px" in warning
    enough = {f.name: replace(getattr(of_bundle.evaluation.scores, f.name), patients=FEW_PATIENTS)
              for f in fields(Scores)}  # fmt: skip
    evaluation = replace(of_bundle.evaluation, scores=Scores(**enough))
    assert replace(of_bundle, data=data, evaluation=evaluation).warnings() == []


def test_every_row_is_in_the_table(report: Path, of_bundle: EvaluationResult) -> None:
    with (report / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["dice"]) for row in rows] == row_dice(of_bundle).tolist()
    assert {"text", "patient", "hd95_px", "dice_side_swapped", "prompt_cut"} < set(rows[0])


def test_the_same_result_gives_the_same_page(report: Path, of_bundle: EvaluationResult, tmp_path: Path) -> None:
    write_report(tmp_path / "again", of_bundle)
    assert (tmp_path / "again" / "index.html").read_bytes() == (report / "index.html").read_bytes()


def test_only_a_report_is_replaced(report: Path, of_bundle: EvaluationResult, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--force"):
        check_report_folder(report, replace=False)
    check_report_folder(report, replace=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(UsageError, match="will not replace it"):
        write_report(tmp_path / "thesis", of_bundle, replace=True)
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_coverage_is_reported_for_every_control_and_grouping(of_bundle: EvaluationResult, report: Path) -> None:
    numbers, rows = json.loads((report / "evaluation.json").read_text()), of_bundle.data.rows
    for control in numbers["controls"]:
        coverage = control["coverage"]
        assert coverage["rows"] + sum(left["rows"] for left in coverage["left_out"]) == coverage["rows_in_all"] == rows
        assert coverage["rows"] == control["dice"]["rows"]
    assert {group["by"]: group["coverage"]["rows"] for group in numbers["group_coverage"]} == {
        "target size": rows, "side named": rows, "zones named": rows,
    }  # fmt: skip
    page, found = (report / "index.html").read_text(), remarks(of_bundle)
    fixed = next(c["coverage"] for c in numbers["controls"] if c["name"] == "fixed")
    assert fixed["rows"] < rows
    assert f"<td>{fixed['rows']} of {rows}</td>" in re.sub(r"<td[^>]*>", "<td>", page)
    assert any(remark.startswith(f"Control fixed: {fixed['rows']} of {rows} rows; left out:") for remark in found)
    assert f"Groups by side named: known for {rows} of {rows} rows." in found
