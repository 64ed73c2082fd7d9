"""What only a machine with an NVIDIA GPU can show; skipped, with the reason, elsewhere. Not yet run anywhere."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from cclip_deploy.bundle import Bundle
from cclip_deploy.evidence.parity import check_graphs
from cclip_deploy.evidence.reference import load_references
from cclip_deploy.runtime.onnx_runtime import OnnxRuntimeBackend
from tests.conftest import THREADS


def gpu_reason() -> str | None:
    """Why there is no usable GPU here; None where there is one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1)"
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "a driver, but no GPU"
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "a GPU, but this onnxruntime has no CUDA provider (install onnxruntime-gpu)"
    return None


REASON = gpu_reason()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=f"needs an NVIDIA GPU: {REASON}")]


def test_cuda_provider_agrees_with_pytorch(tiny_bundle_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle_path)
    backend = OnnxRuntimeBackend(bundle, "fp32", "cuda", THREADS)
    checks = list(check_graphs(backend, bundle.manifest.graphs, load_references(bundle)))
    assert checks
    # TF32 may be in use, so the FP16 limit is the one that must hold.
    assert all(check.value <= 2e-2 for check in checks if check.metric == "relative_error")
