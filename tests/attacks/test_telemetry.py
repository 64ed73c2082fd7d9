"""What third-party packages keep of a user: nothing. ONNX Runtime 1.32 wrote a device id and events at its import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.run import PROGRAM


def files_below(home: Path, *command: str | Path) -> list[str]:
    """The files that a process leaves in a home folder of its own; in CI, ONNX Runtime keeps none by itself."""
    home.mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "CI")}
    done = subprocess.run([*map(str, command)], env=environment | {"HOME": str(home)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return sorted(path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file())


def test_a_bare_onnx_runtime_does_keep_something(tmp_path: Path) -> None:
    """Else the other tests show nothing. It can go when ONNX Runtime stops."""
    kept = files_below(tmp_path / "home", sys.executable, "-c", "import onnxruntime")
    assert any("deviceid" in name for name in kept)


@pytest.mark.parametrize(
    "code",
    [
        "import cclip_deploy, onnxruntime",
        "import cclip_deploy, onnxslim",
        "from cclip_deploy.runtime.openvino import load_openvino; load_openvino()",
        "import cclip_deploy, tokenizers",
        "import cclip_deploy, pydicom",
    ],
)
def test_packages_that_are_loaded_after_ours_keep_nothing(code: str, tmp_path: Path) -> None:
    assert files_below(tmp_path / "home", sys.executable, "-c", code) == []


def test_predict_keeps_nothing_in_the_home_folder(tiny_bundle_path: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(image)
    arguments = (tiny_bundle_path, image, "--prompt", "left lung", "--threads", "1", "-o", tmp_path / "out")
    assert files_below(tmp_path / "home", PROGRAM, "predict", *arguments) == []
