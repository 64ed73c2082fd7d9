"""Every backend raises an error for a file that is not a graph, and for a graph that differs from its manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import BundleError
from cclip_deploy.runtime.backend import Backend
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from cclip_deploy.runtime.openvino.backend import OpenVinoBackend
from tests.bundles import copy_of, reseal

pytestmark = pytest.mark.parametrize("open_backend", [OnnxRuntimeBackend, OpenVinoBackend])
Open = Callable[[Bundle], Backend]


@pytest.mark.parametrize("content", [b"", b"not a graph", bytes(1000)], ids=["empty", "text", "zeros"])
def test_a_file_that_is_not_a_graph_raises(
    tiny_bundle_path: Path, tmp_path: Path, content: bytes, open_backend: Open
) -> None:
    copy = copy_of(tiny_bundle_path, tmp_path)
    (copy / "graphs" / "fused.onnx").write_bytes(content)
    reseal(copy)
    with pytest.raises(BundleError, match=r"fused\.onnx"):
        open_backend(Bundle.open(copy)).load("fused")


def test_a_graph_with_other_inputs_or_outputs_than_the_manifest_raises(
    tiny_bundle_path: Path, tmp_path: Path, open_backend: Open
) -> None:
    copy = copy_of(tiny_bundle_path, tmp_path)
    path, decoder = copy / "graphs" / "prompt_encoder.onnx", copy / "graphs" / "mask_decoder.onnx"
    real = path.read_bytes()
    path.write_bytes(decoder.read_bytes())
    reseal(copy)
    with pytest.raises(BundleError, match=r"prompt_encoder\.onnx .* has inputs .*'features'.*, but the manifest has"):
        open_backend(Bundle.open(copy)).load("prompt_encoder")
    path.write_bytes(real)
    reseal(copy, lambda manifest: manifest["graphs"]["prompt_encoder"]["outputs"][0].update(dtype="float16"))
    with pytest.raises(BundleError, match=r"prompt_encoder\.onnx has outputs .*, but the manifest has .*float16"):
        open_backend(Bundle.open(copy)).load("prompt_encoder")
    reseal(copy, lambda manifest: manifest["graphs"]["prompt_encoder"]["outputs"][0].update(shape=["prompts", 9, 31]))
    with pytest.raises(BundleError, match=r"\['\?', 9, 32\].*, but the manifest has .*\['\?', 9, 31\]"):
        open_backend(Bundle.open(copy)).load("prompt_encoder")
