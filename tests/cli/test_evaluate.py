"""Tests of `cclip-deploy evaluate` and `cclip-deploy predict --explain`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cclip_deploy.datasets.synthetic.generator import write_dataset
from tests.cli.run import invoke
from tests.test_imports import loaded_by


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "films"
    write_dataset(folder, {"test": 3}, (64, 64), 0, prompts_per_image=2)
    return folder


def test_json_is_one_document_with_intervals(tiny_bundle_path: Path, films: Path, tmp_path: Path) -> None:
    done = invoke("evaluate", tiny_bundle_path, films, "--json", "-o", tmp_path / "report", "--threads", 2)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["data"]["images"] == 3
    dice = told["scores"]["dice_per_image"]
    assert dice["low"] <= dice["value"] <= dice["high"]
    assert [control["name"] for control in told["controls"]][:2] == ["shuffled", "fixed"]
    written = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert written["scores"] == told["scores"]
    assert told["network"]["ran"]["ran"] == "onnxruntime on cpu"
    assert any("Fewer than" in warning for warning in told["warnings"])


def test_the_tables_show_the_empty_mask_policy_and_the_controls(tiny_bundle_path: Path, films: Path) -> None:
    done = invoke("evaluate", tiny_bundle_path, films, "--threads", 2, "--empty-masks", "leave-out")
    assert done.exit_code == 0, done.output
    for part in ("Dice, mean over rows", "Dice, pooled over all pixels", "side-swapped", "are left out of means"):
        assert part in done.stdout
    assert "3 of 3" in done.stderr
    assert "Warning: Fewer than" in done.stdout


def test_backend_and_precision_are_the_options_of_predict(tiny_bundle_path: Path, films: Path) -> None:
    done = invoke("evaluate", tiny_bundle_path, films, "--backend", "tensorrt-rtx", "--precision", "fp16")
    assert done.exit_code == 2
    assert "has no fp16 engine for tensorrt-rtx" in done.stderr
    done = invoke("evaluate", tiny_bundle_path, films, "--precision", "bf16")
    assert done.exit_code == 2
    assert "bf16" in done.stderr


def test_an_existing_report_is_an_error_before_any_work(tiny_bundle_path: Path, films: Path, tmp_path: Path) -> None:
    done = invoke("evaluate", tiny_bundle_path, films, "-o", tmp_path)
    assert done.exit_code == 2
    assert "exists already" in done.stderr
    assert "Reading" not in done.stderr


def test_a_split_without_rows_ends_with_6(tiny_bundle_path: Path, films: Path) -> None:
    done = invoke("evaluate", tiny_bundle_path, films, "--split", "train")
    assert done.exit_code == 6
    assert "no rows of split 'train'" in done.stderr


def test_a_bundle_is_evaluated_without_torch(tiny_bundle_path: Path, films: Path, tmp_path: Path) -> None:
    code = """
import sys
from cclip_deploy.cli.app import main
sys.argv = ["cclip-deploy", "evaluate", sys.argv[1], sys.argv[2], "--json", "--threads", "2"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    assert loaded_by(code, str(tiny_bundle_path), str(films)) == ["onnxruntime"]


def test_predict_explain_writes_a_plot(tiny_bundle_path: Path, films: Path, tmp_path: Path) -> None:
    film = next((films / "images").iterdir())
    done = invoke("predict", tiny_bundle_path, film, "--prompt", "left", "-o", tmp_path, "--explain", "--json",
                  "--threads", 2)  # fmt: skip
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["predictions"]
    assert Path(row["files"]["explanation"]).is_file()


def test_a_checkpoint_without_explain_is_refused(tiny_bundle_path: Path, tiny_checkpoint: Path, films: Path) -> None:
    done = invoke("predict", tiny_bundle_path, films, "--prompt", "left", "--checkpoint", tiny_checkpoint)
    assert done.exit_code == 2
    assert "is only used with --explain" in done.stderr
