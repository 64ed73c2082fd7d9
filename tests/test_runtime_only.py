"""A server's environment, without torch and onnx, runs a bundle; `make` creates it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.bundles import copy_of, flip_byte
from tests.imaging.test_dicom import write_dicom

ENVIRONMENT = Path(__file__).parents[1] / ".venv-runtime"
PROGRAM = ENVIRONMENT / "bin" / "cclip-deploy"

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason=f"{ENVIRONMENT} does not exist; make it: make pytest")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the program of the runtime-only environment, away from the repository."""
    command = [str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd="/")


@pytest.mark.parametrize("package", ["torch", "onnx", "onnxscript", "open_clip", "tensorrt_rtx", "safetensors"])
def test_the_environment_has_none_of_the_packages_that_export(package: str) -> None:
    command = [str(ENVIRONMENT / "bin" / "python"), "-c", f"import {package}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


def test_it_predicts_on_a_dicom_film_with_two_prompts(tiny_bundle_path: Path, tmp_path: Path) -> None:
    film = np.random.default_rng(0).integers(0, 4096, (60, 50)).astype(np.uint16)
    write_dicom(tmp_path / "film.dcm", film, bits=12, PhotometricInterpretation="MONOCHROME1")
    done = run(
        "predict", tiny_bundle_path, tmp_path / "film.dcm", "--prompt", "left lung", "--prompt", "Two infected areas.",
        "-o", tmp_path / "out", "--threads", "1", "--json",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    rows = json.loads(done.stdout)["predictions"]
    assert len(rows) == 2
    for row in rows:
        with Image.open(row["files"]["mask"]) as mask:
            assert mask.size == (50, 60)
            share = float((np.asarray(mask) == 255).mean())
        assert row["area_share"] == pytest.approx(share)


def test_it_verifies_and_says_where_it_fails(tiny_bundle_path: Path, tmp_path: Path) -> None:
    done = run("verify", tiny_bundle_path, "--threads", "1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["passed"] is True
    copy = copy_of(tiny_bundle_path, tmp_path)
    flip_byte(copy / "graphs" / "fused.onnx")
    assert run("verify", copy).returncode == 6


def test_it_inspects_and_benches(tiny_bundle_path: Path) -> None:
    facts = json.loads(run("inspect", tiny_bundle_path, "--json").stdout)
    assert all(graph["multiply_adds"] > 0 for graph in facts["graphs"].values())
    done = run("bench", tiny_bundle_path, "--rounds", "3", "--warmup", "0", "--threads", "1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["results"]) == 4


def test_what_needs_more_is_an_error_that_names_the_extra(tiny_bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(b"weights")
    for arguments in (
        ("export", tmp_path / "model.pth", "-o", tmp_path / "new.cclip"),
        ("verify", tiny_bundle_path, "--checkpoint", tmp_path / "model.pth"),
        ("bench", tiny_bundle_path, "--checkpoint", tmp_path / "model.pth"),
    ):
        done = run(*arguments)
        assert done.returncode == 3, done.stderr
        assert "pip install 'cclip-deploy[export]'" in done.stderr
        assert "Traceback" not in done.stderr
    done = run("build-engine", tiny_bundle_path)
    assert done.returncode == 3
    assert "pip install 'cclip-deploy[rtx]'" in done.stderr


def test_its_doctor_says_that_bundles_run_and_export_does_not() -> None:
    done = run("doctor", "--json")
    assert done.returncode == 0
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["onnxruntime"]["status"] == "ok"
    assert checks["torch"]["status"] == "missing"
    assert checks["torch"]["remedy"] == "pip install 'cclip-deploy[export]'"
    assert all({"name", "status", "remedy"} <= check.keys() for check in checks.values())
