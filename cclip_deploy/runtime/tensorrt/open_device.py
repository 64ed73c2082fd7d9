"""Open a GPU through cuda-python or pycuda."""

from __future__ import annotations

from typing import get_args

from cclip_deploy.errors import UsageError
from cclip_deploy.runtime.tensorrt.cuda_python import CudaPythonGpu
from cclip_deploy.runtime.tensorrt.device import Gpu, GpuInterface
from cclip_deploy.runtime.tensorrt.pycuda import PyCudaGpu


def open_gpu(interface: GpuInterface = "cuda-python") -> Gpu:
    """Open device 0 through the given package.

    Raises:
        UsageError: `interface` has another value.
        EnvironmentIssue: the package, the driver or a GPU is missing, or the driver is too old; with the remedy.
    """
    if interface == "cuda-python":
        return CudaPythonGpu()
    if interface == "pycuda":
        return PyCudaGpu()
    raise UsageError(f"GPU interface {interface!r} is none of {', '.join(get_args(GpuInterface))}.")
