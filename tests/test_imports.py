"""What a command or a running bundle loads: only what it needs, seen in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HEAVY = (
    "torch",
    "torchvision",
    "open_clip",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "matplotlib",
    "tensorrt",
    "tensorrt_rtx",
    "pydicom",
    "lightning",
    "monai",
)
REPORT = f"""
import json as _json, sys as _sys
print("\\n" + _json.dumps([name for name in {HEAVY!r} if name in _sys.modules]))
"""


def loaded_by(code: str, *arguments: str) -> list[str]:
    """The heavy packages that a fresh Python holds after it ran the code."""
    done = subprocess.run([sys.executable, "-c", code + REPORT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_the_report_sees_what_is_loaded() -> None:
    assert loaded_by("import onnxruntime") == ["onnxruntime"]


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import cclip_deploy") == []


COMMANDS = [
    "demo", "train", "export", "build-engine", "verify", "bench", "predict", "inspect", "doctor", "data", "prompt",
    "synth", "evaluate", "ablate", "tune-precision",
]  # fmt: skip


def test_help_loads_nothing_heavy() -> None:
    """One process asks for every help in turn; nothing heavy is there after any of them."""
    code = f"""
import json, sys
from cclip_deploy.cli.app import main
for arguments in json.loads(sys.argv[1]):
    sys.argv[:] = ["cclip-deploy", *arguments]
    try:
        main()
    except SystemExit as end:
        assert end.code in (0, None), (arguments, end.code)
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    assert not loaded, (arguments, loaded)
"""
    asked = [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)]
    assert loaded_by(code, json.dumps(asked)) == []


def test_running_a_bundle_loads_onnx_runtime_and_nothing_else(tiny_bundle_path: Path, tmp_path: Path) -> None:
    Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30)).save(tmp_path / "film.png")
    code = """
import sys
from pathlib import Path
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.inference.predict import predict
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from cclip_deploy.inference.segmenter import Segmenter
bundle, film, output = map(Path, sys.argv[1:])
opened = Bundle.open(bundle)
done = predict(Segmenter.of_bundle(opened, OnnxRuntimeBackend(opened, threads=1)), [film], ["left lung"], output)
assert len(done.done) == 1 and done.done[0].written.mask.is_file()
"""
    arguments = (str(tiny_bundle_path), str(tmp_path / "film.png"), str(tmp_path / "out"))
    assert loaded_by(code, *arguments) == ["onnxruntime"]


def test_verifying_and_inspecting_load_onnx_runtime_and_nothing_else(tiny_bundle_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.verify.inspect import describe_bundle
from cclip_deploy.verify.verify import VerifyOptions, verify_bundle
assert describe_bundle(Path(sys.argv[1]))["graphs"]
assert verify_bundle(Bundle.open(Path(sys.argv[1])), VerifyOptions(threads=1)).passed
"""
    assert loaded_by(code, str(tiny_bundle_path)) == ["onnxruntime"]
