"""The packages that are loaded neither store nor send data about the user.

Before: ONNX Runtime 1.32 wrote a device id and events (processor, system, paths, graph names, error texts) below
~/.cache/Microsoft/DeveloperTools at its import, and looked up a host of Microsoft's some ten seconds later.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.run import PROGRAM

ROOT = Path(__file__).parents[2]
SECONDS = 15
RUNTIME_EXTRAS = ("cpu", "openvino", "export", "train", "rtx", "medical", "parquet")
NAMESPACE = ("unshare", "--map-root-user", "--net")
"""A network namespace of its own: without a route, so nothing can leave, and whatever tries is counted."""


def has_namespaces() -> bool:
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


WATCH = f"""
import json, subprocess, sys, time
from pathlib import Path

def tries():  # packets that were sent, and those that found no route, since the namespace was made
    rows = [line.split() for line in Path("/proc/self/net/snmp").read_text().splitlines() if line.startswith("Ip:")]
    four = dict(zip(rows[0], rows[1]))
    six = dict(line.split() for line in Path("/proc/self/net/snmp6").read_text().splitlines())
    return sum(map(int, (four["OutRequests"], four["OutNoRoutes"], six["Ip6OutRequests"], six["Ip6OutNoRoutes"])))

done = subprocess.Popen([sys.executable, "-c", sys.argv[1] + "\\nimport time; time.sleep({SECONDS})", *sys.argv[2:]])
code = done.wait()
print("\\n" + json.dumps([code, tries()]))
"""


def watched(home: Path, code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """A process that runs the code and then waits, as a service does; it ends with its exit code and the tries."""
    home.mkdir()
    command = [*NAMESPACE, sys.executable, "-c", WATCH, code, *map(str, arguments)]
    return subprocess.Popen(command, env=of_a_user(home), stdout=subprocess.PIPE, text=True)


def result_of(process: subprocess.Popen[str], home: Path) -> tuple[int, int, list[str]]:
    """The exit code, how often anything was sent or looked up, and the files that were left in the home folder."""
    output, _ = process.communicate(timeout=120)
    code, tries = json.loads(output.splitlines()[-1])
    return code, tries, files_in(home)


def of_a_user(home: Path) -> dict[str, str]:
    """The environment of somebody who never chose anything; ONNX Runtime is silent by itself where CI is set.

    matplotlib keeps a list of the machine's fonts in the folder that MPLCONFIGDIR names.
    """
    chosen = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "CI", "TF_BUILD", "JENKINS_URL")
    kept = {key: value for key, value in os.environ.items() if key not in chosen}
    return kept | {"HOME": str(home), "MPLCONFIGDIR": str(home.with_name("fonts"))}


def files_in(home: Path) -> list[str]:
    return sorted(path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file())


def loaded_at_run_time() -> list[str]:
    """The modules of every package that pyproject.toml lets a user install and that is installed here."""
    wanted = {
        re.split(r"[^\w.-]", line, maxsplit=1)[0].lower().replace("_", "-")
        for line in metadata.requires("cclip-deploy") or []
        if "extra ==" not in line or any(f"extra == '{extra}'" in line for extra in RUNTIME_EXTRAS)
    } - {"cclip-deploy"}
    modules = metadata.packages_distributions()
    found = [
        module
        for module, distributions in modules.items()
        if any(name.lower().replace("_", "-") in wanted for name in distributions) and module.isidentifier()
    ]
    return sorted(module for module in found if not module.startswith("_") and module != "pylab")


USE_EVERYTHING = """
import importlib, sys
from pathlib import Path
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from cclip_deploy.runtime.openvino.backend import OpenVinoBackend
bundle = Bundle.open(Path(sys.argv[1]))
for backend in (OnnxRuntimeBackend(bundle, threads=1), OpenVinoBackend(bundle, threads=1)):
    backend.load("mask_decoder")
for name in sys.argv[2:]:
    importlib.import_module(name)
"""


@pytest.mark.skipif(not has_namespaces(), reason="needs user and network namespaces: apt-get install util-linux")
def test_no_package_sends_looks_up_or_keeps_anything(tiny_bundle_path: Path, tmp_path: Path) -> None:
    """And a bare ONNX Runtime does both, else the watch shows nothing; that part can go when it stops."""
    modules = loaded_at_run_time()
    assert {"onnxruntime", "openvino", "torch", "open_clip", "onnx", "onnxscript", "lightning", "monai", "tokenizers",
            "ftfy", "pydicom", "matplotlib", "tensorboard"} <= set(modules)  # fmt: skip
    bare_home, home = tmp_path / "bare" / "home", tmp_path / "ours" / "home"
    bare_home.parent.mkdir()
    home.parent.mkdir()
    bare = watched(bare_home, "import onnxruntime")
    ours = watched(home, USE_EVERYTHING, tiny_bundle_path, *modules)

    code, tries, kept = result_of(bare, bare_home)
    assert code == 0
    assert tries > 0
    assert any("deviceid" in name for name in kept)
    assert result_of(ours, home) == (0, 0, [])


def test_onnx_runtime_is_never_imported_before_the_package_that_silences_it() -> None:
    """In every script and module; the tests' conftest.py sets the variable for all tests."""
    bare = [
        str(path.relative_to(ROOT))
        for folder in ("cclip_deploy", "benchmarks", "export", "engines", "training")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if (isinstance(node, ast.Import) and any(name.name.split(".")[0] == "onnxruntime" for name in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "onnxruntime")
    ]
    assert bare == []


def test_predict_keeps_nothing_in_the_home_folder(tiny_bundle_path: Path, tmp_path: Path) -> None:
    image, home = tmp_path / "image.png", tmp_path / "home"
    home.mkdir()
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(image)
    arguments = (tiny_bundle_path, image, "--prompt", "left lung", "--threads", "1", "-o", tmp_path / "out")
    command = list(map(str, (PROGRAM, "predict", *arguments)))
    done = subprocess.run(command, env=of_a_user(home), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_in(home) == []
