"""Tests of `cclip-deploy export`: usage errors, existing outputs, interruption."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.export import export
from tests.bundles import copy_of, digests
from tests.cli.run import interrupt_at, invoke, run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder to export to."""
    made = tmp_path / "out"
    made.mkdir()
    return made


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image-size", "100"], "Image size 100x100: 100 is not a positive multiple of 32. Use 96, for example."),
        (["--image-size", "224x230"], "230 is not a positive multiple of 32"),
        (["--image-size", "big"], "Image size 'big' is not N or HxW"),
        (["--prompt-length", "78"], "prompt length of 78 is out of range. Use 3 to 77"),
        (["--batch", "2"], "--batch requires --plain"),
        (["--plain", "--with-masks"], "exclude --plain"),
    ],
)
def test_a_wrong_option_prints_one_message_and_ends_with_2(
    arguments: list[str], said: str, tiny_checkpoint: Path, folder: Path
) -> None:
    done = invoke("export", tiny_checkpoint, "-o", folder / "new.cclip", *arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert os.listdir(folder) == []


def test_an_existing_output_is_an_error_and_force_replaces_only_bundles(
    tiny_checkpoint: Path, tiny_bundle_path: Path, folder: Path
) -> None:
    before = digests(tiny_bundle_path)
    done = invoke("export", tiny_checkpoint, "-o", tiny_bundle_path)
    assert (done.exit_code, done.stderr.count("exists already")) == (2, 1)
    assert digests(tiny_bundle_path) == before
    (folder / "thesis.txt").write_text("mine")
    done = invoke("export", tiny_checkpoint, "-o", folder, "--force")
    assert (done.exit_code, done.stderr.count("is not a bundle")) == (2, 1)
    assert os.listdir(folder) == ["thesis.txt"]


def test_files_that_are_not_checkpoints_are_named(tmp_path: Path, folder: Path, tiny_checkpoint: Path) -> None:
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "picture.png")
    (tmp_path / "short.safetensors").write_bytes(tiny_checkpoint.read_bytes()[:1_000_000])
    torch.save({"layer.weight": torch.ones(3)}, tmp_path / "stranger.pth")
    for name in ("picture.png", "short.safetensors", "stranger.pth", "absent.pth"):
        done = invoke("export", tmp_path / name, "-o", folder / "new.cclip")
        assert done.exit_code == 6, name
        assert done.stderr.splitlines()[-1].startswith("Error: ")
        assert name in done.stderr.splitlines()[-1]
        assert done.stdout == ""
    assert os.listdir(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["Reading ", "Tracing image_encoder"])
def test_ctrl_c_ends_with_130_and_leaves_nothing(stage: str, tiny_checkpoint: Path, folder: Path) -> None:
    done = interrupt_at(
        stage, "export", tiny_checkpoint, "-o", folder / "new.cclip", "--image-size", "32", "--threads", "1"
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("Interrupted; nothing was left half-written.\n")
    assert "Traceback" not in done.stderr
    assert os.listdir(folder) == []


@pytest.mark.slow
def test_kill_leaves_nothing(tiny_checkpoint: Path, folder: Path) -> None:
    done = interrupt_at(
        "Tracing prompt_encoder", "export", tiny_checkpoint, "-o", folder / "new.cclip", "--image-size", "32",
        "--threads", "1", by=signal.SIGTERM,
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(folder) == []


@pytest.mark.slow
def test_a_checkpoint_goes_through_export_inspect_verify_and_predict(tiny_checkpoint: Path, folder: Path) -> None:
    """With another size than in the other tests, a short prompt and all optional outputs; export in a subprocess."""
    bundle = folder / "square.cclip"
    done = run(
        "export", tiny_checkpoint, "-o", bundle, "--image-size", "64", "--prompt-length", "8", "--with-masks",
        "--with-confounding", "--threads", "2", "--json",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told.keys() == {"schema", "bundle", "tensors_dropped", "graphs"}
    assert (told["bundle"], told["tensors_dropped"]) == (str(bundle), 0)
    assert told["graphs"].keys() == {"prompt_encoder", "image_encoder", "mask_decoder", "fused"}
    for graph in told["graphs"].values():
        assert graph.keys() == {"multiply_adds", "relative_error"}
        assert 0 < graph["relative_error"] <= 1e-5
    facts = json.loads(invoke("inspect", bundle, "--json").stdout)
    outputs = [tensor["name"] for tensor in facts["graphs"]["image_encoder"]["outputs"]]
    assert outputs == ["features", "mask3", "mask4", "mask5", "confounding_features"]
    assert facts["command"].startswith("cclip-deploy export ")
    verified = invoke("verify", bundle, "--threads", "2", "--json")
    assert verified.exit_code == 0
    checked = {check["name"] for check in json.loads(verified.stdout)["checks"]}
    assert "image_encoder/seeded/confounding_features" in checked
    Image.fromarray(np.arange(80 * 50, dtype=np.uint16).reshape(80, 50)).save(folder / "film.png")
    predicted = invoke(
        "predict", bundle, folder / "film.png", "--prompt", "left lung", "-o", folder / "masks", "--json"
    )
    assert predicted.exit_code == 0, predicted.stderr
    prompt = "both the upper left and the lower right lung"
    too_long = invoke("predict", bundle, folder / "film.png", "--prompt", prompt, "-o", folder / "masks", "--json")
    assert too_long.exit_code == 2
    assert "room for 8" in too_long.stderr


@pytest.mark.slow
def test_export_prints_a_table_and_force_replaces_a_bundle(
    tiny_checkpoint: Path, tiny_bundle_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    graphs = {path.stem: onnx.load(path) for path in sorted((tiny_bundle_path / "graphs").iterdir())}
    monkeypatch.setattr(export, "trace_graphs", lambda *args: dict(graphs))
    copy = copy_of(tiny_bundle_path, folder)
    done = invoke(
        "export", tiny_checkpoint, "-o", copy, "--force", "--image-size", "64x96", "--prompt-length", "24",
        "--with-masks", "--threads", "2",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "compared with PyTorch" in done.stdout
    assert "mask_decoder" in done.stdout
    assert "Comparing every graph with PyTorch" in done.stderr
    assert Bundle.open(copy).manifest.command != "test"
    assert os.listdir(folder) == [copy.name]
