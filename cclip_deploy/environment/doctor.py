"""Diagnose what this machine can run; every failed check has a command that fixes it."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from cclip_deploy.environment.fingerprint import installed_version, read_gpus, total_memory_bytes

Status = Literal["ok", "missing", "broken"]

RUN = "run a bundle"
RUN_CUDA = "run a bundle on CUDA"
RUN_OPENVINO = "run a bundle in OpenVINO"
EXPORT = "export"
BUILD_RTX = "build TensorRT-RTX engines"
BUILD_TENSORRT = "build TensorRT engines"
RUN_ENGINES = "run TensorRT engines"
READ_DICOM = "read DICOM"

MINIMUM_PYTHON = (3, 11)
GIB = 2**30
EXPORT_DISK_BYTES = 5 * GIB
EXPORT_MEMORY_BYTES = 8 * GIB
IMPORT_SECONDS = 120
DRIVER_REMEDY = "Install the NVIDIA driver; in a container, start it with: docker run --gpus all"


@dataclass(frozen=True)
class DoctorCheck:
    """Result of one check, with the command that fixes it; `needed_for` lists what fails without it."""

    name: str
    status: Status
    detail: str
    remedy: str | None
    needed_for: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return {**asdict(self), "needed_for": list(self.needed_for)}


@dataclass(frozen=True)
class Package:
    """A module, its distribution, and the extra of cclip-deploy that installs it ("" for none)."""

    module: str
    distribution: str
    extra: str
    needed_for: tuple[str, ...]

    @property
    def remedy(self) -> str:
        """The command that installs it."""
        return f"pip install 'cclip-deploy[{self.extra}]'" if self.extra else "pip install cclip-deploy"


ONNXRUNTIME = Package("onnxruntime", "onnxruntime", "cpu", (RUN,))
OPENVINO = Package("openvino", "openvino", "openvino", (RUN_OPENVINO,))
TENSORRT_RTX = Package("tensorrt_rtx", "tensorrt-rtx", "rtx", (BUILD_RTX,))
TENSORRT = Package("tensorrt", "tensorrt", "tensorrt", (BUILD_TENSORRT, RUN_ENGINES))
PYTHON_PACKAGES = (
    Package("numpy", "numpy", "", (RUN,)),
    Package("pydantic", "pydantic", "", (RUN,)),
    Package("PIL", "pillow", "", (RUN,)),
    Package("tokenizers", "tokenizers", "", (RUN,)),
    Package("ftfy", "ftfy", "", (RUN,)),
    Package("torch", "torch", "export", (EXPORT,)),
    Package("open_clip", "open-clip-torch", "export", (EXPORT,)),
    Package("onnx", "onnx", "export", (EXPORT,)),
    Package("onnxscript", "onnxscript", "export", (EXPORT,)),
    Package("safetensors", "safetensors", "export", (EXPORT,)),
    Package("pydicom", "pydicom", "medical", (READ_DICOM,)),
)
DEVICE_BUFFER_MODULES = {"cuda.bindings": "cuda-bindings", "pycuda": "pycuda"}  # module: distribution


def diagnose(deep: bool = False) -> list[DoctorCheck]:
    """Check Python, packages, driver, disk and memory.

    onnxruntime, openvino and the TensorRT bindings are imported in subprocesses, because only that reveals a broken
    installation; `deep` imports every package, which takes seconds.
    """
    driver = check_driver()
    has_gpu = driver.status == "ok"
    return [
        check_python(),
        *(check_package(package, deep) for package in PYTHON_PACKAGES),
        *check_onnxruntime(has_gpu),
        check_openvino(),
        driver,
        check_binding(TENSORRT_RTX, has_gpu),
        check_binding(TENSORRT, has_gpu),
        check_device_buffers(),
        check_disk(Path.cwd()),
        check_memory(),
    ]


def blockers(checks: Iterable[DoctorCheck], purpose: str = RUN) -> list[DoctorCheck]:
    """Return the failed checks that `purpose` depends on."""
    return [check for check in checks if purpose in check.needed_for and check.status != "ok"]


def check_python() -> DoctorCheck:
    """Check the version of Python."""
    found = ".".join(map(str, sys.version_info[:3]))
    is_enough = sys.version_info[:2] >= MINIMUM_PYTHON
    remedy = None if is_enough else "Install Python 3.11 and make a new environment: python3.11 -m venv .venv"
    return DoctorCheck("python", "ok" if is_enough else "broken", found, remedy, (RUN, EXPORT))


def check_package(package: Package, deep: bool = False) -> DoctorCheck:
    """Check that a package is installed; if `deep`, also import it."""
    if not _is_found(package.module):
        return _missing(package)
    if deep and (error := probe_import(package.module).error):
        return _broken(package, error)
    version = installed_version(package.distribution) or "version unknown"
    return DoctorCheck(package.distribution, "ok", version, None, package.needed_for)


def check_onnxruntime(has_gpu: bool) -> list[DoctorCheck]:
    """Check onnxruntime and its CUDA provider, which onnxruntime lists even without a GPU."""
    if not _is_found(ONNXRUNTIME.module):
        return [_missing(ONNXRUNTIME), _cuda_provider([], has_gpu)]
    probe = probe_import(ONNXRUNTIME.module)
    if probe.error:
        return [_broken(ONNXRUNTIME, probe.error), _cuda_provider([], has_gpu)]
    version = installed_version("onnxruntime") or installed_version("onnxruntime-gpu") or "version unknown"
    detail = f"{version}, providers: {', '.join(probe.providers)}"
    found = DoctorCheck(ONNXRUNTIME.distribution, "ok", detail, None, ONNXRUNTIME.needed_for)
    return [found, _cuda_provider(probe.providers, has_gpu)]


def check_openvino() -> DoctorCheck:
    """Check openvino; the details are the processor and the number formats that it supports."""
    if not _is_found(OPENVINO.module):
        return _missing(OPENVINO)
    probe = probe_import("cclip_deploy.runtime.openvino.backend", "describe_device")
    if probe.error:
        return _broken(OPENVINO, probe.error)
    if not probe.providers:
        return _broken(OPENVINO, "its CPU plugin cannot be loaded")
    version, (processor, *kinds) = installed_version(OPENVINO.distribution) or "version unknown", probe.providers
    return DoctorCheck(
        OPENVINO.distribution, "ok", f"{version}, {processor}: {', '.join(kinds)}", None, OPENVINO.needed_for
    )


def check_binding(package: Package, has_gpu: bool) -> DoctorCheck:
    """Check that a TensorRT binding can be imported; without a driver it can build engines at most."""
    if not _is_found(package.module):
        return _missing(package)
    if error := probe_import(package.module).error:
        return _broken(package, error)
    version = installed_version(package.distribution) or "version unknown"
    if not has_gpu and package is TENSORRT:
        detail = f"{version}; building and running engines needs a GPU, and this machine has none"
        return DoctorCheck(package.distribution, "broken", detail, DRIVER_REMEDY, package.needed_for)
    does = "builds and runs engines" if has_gpu else "builds engines; running them needs an NVIDIA driver and GPU"
    return DoctorCheck(package.distribution, "ok", f"{version}; {does}", None, package.needed_for)


def check_device_buffers() -> DoctorCheck:
    """Check that cuda-python or pycuda is installed, which allocates the memory of engines."""
    found = [
        f"{distribution} {installed_version(distribution)}"
        for module, distribution in DEVICE_BUFFER_MODULES.items()
        if _is_found(module)
    ]
    remedy = None if found else "pip install cuda-python (or pip install 'cclip-deploy[tensorrt]' for pycuda)"
    detail = ", ".join(found) or "neither cuda-python nor pycuda is installed"
    return DoctorCheck("device buffers", "ok" if found else "missing", detail, remedy, (RUN_ENGINES,))


def check_driver(library: str = "libcuda.so.1") -> DoctorCheck:
    """Check that the NVIDIA driver can be loaded and finds a GPU; `nvidia-smi` gives the names, if available."""
    needed_for = (RUN_CUDA, RUN_ENGINES)
    try:
        cuda = ctypes.CDLL(library)
    except OSError as error:
        return DoctorCheck("nvidia driver", "missing", f"no driver: {error}", DRIVER_REMEDY, needed_for)
    count = ctypes.c_int(0)
    code = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if code or not count.value:
        detail = f"{library} can be loaded, but finds {count.value} GPUs (CUDA error {code})"
        return DoctorCheck("nvidia driver", "broken", detail, DRIVER_REMEDY, needed_for)
    gpus, problem = read_gpus()
    named = [f"{gpu['name']} (driver {gpu['driver']})" for gpu in gpus or []]
    detail = ", ".join(named) or f"{count.value} GPUs; {problem or 'nvidia-smi is not on the path'}"
    return DoctorCheck("nvidia driver", "ok", detail, None, needed_for)


def check_disk(folder: Path) -> DoctorCheck:
    """Check the free disk space for an export, temporary files included."""
    free_bytes = shutil.disk_usage(folder).free
    return _resource(
        "free disk", free_bytes, EXPORT_DISK_BYTES, f"in {folder}", "Free some space, or work in another folder"
    )


def check_memory() -> DoctorCheck:
    """Check the memory for tracing the published network."""
    return _resource("memory", total_memory_bytes(), EXPORT_MEMORY_BYTES, "in all", "Export on a larger machine")


@dataclass(frozen=True)
class Probe:
    """Result of an import: the error in one line, or None; and what the module can run on."""

    error: str | None
    providers: tuple[str, ...] = ()


# Prints one line of JSON after the output of the module.
PROBE_CODE = """
import importlib, json, sys
sys.path[:] = json.loads(sys.argv[1])
found = {"error": None, "providers": []}
try:
    module = importlib.import_module(sys.argv[2])
    found["providers"] = getattr(module, sys.argv[3], list)()
except BaseException as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found["error"] = ": ".join([type(error).__name__, *lines[:1]])
print("\\n" + json.dumps(found), flush=True)
"""


def probe_import(module: str, lister: str = "get_available_providers") -> Probe:
    """Import `module` in a subprocess, because it may crash, and call its function `lister`."""
    path = json.dumps([folder or os.getcwd() for folder in sys.path])
    command = [sys.executable, "-P", "-c", PROBE_CODE, path, module, lister]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return Probe(f"import took more than {IMPORT_SECONDS} s")
    try:
        found = json.loads(done.stdout.splitlines()[-1])
        return Probe(found["error"], tuple(found["providers"]))
    except (IndexError, ValueError, TypeError, KeyError):
        return Probe(f"the import ended the process with code {done.returncode} (a negative code is a signal)")


def _cuda_provider(providers: Iterable[str], has_gpu: bool) -> DoctorCheck:
    name, needed_for = "onnxruntime CUDA", (RUN_CUDA,)
    reinstall = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'cclip-deploy[gpu]'"
    if installed_version("onnxruntime") and installed_version("onnxruntime-gpu"):
        detail = "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files"
        return DoctorCheck(name, "broken", detail, reinstall, needed_for)
    if "CUDAExecutionProvider" not in providers:
        return DoctorCheck(name, "missing", "this onnxruntime was not built with it", reinstall, needed_for)
    if not has_gpu:
        detail = "CUDAExecutionProvider is listed but unusable without an NVIDIA GPU: sessions would run on the CPU"
        return DoctorCheck(name, "broken", detail, DRIVER_REMEDY, needed_for)
    return DoctorCheck(name, "ok", "CUDAExecutionProvider and a GPU are available", None, needed_for)


def _is_found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # missing parent of a dotted name; partly imported module
        return False


def _missing(package: Package) -> DoctorCheck:
    return DoctorCheck(package.distribution, "missing", "not installed", package.remedy, package.needed_for)


def _broken(package: Package, error: str) -> DoctorCheck:
    remedy = package.remedy.replace("install", "install --force-reinstall", 1)
    return DoctorCheck(package.distribution, "broken", error, remedy, package.needed_for)


def _resource(name: str, found_bytes: int, needed_bytes: int, where: str, remedy: str) -> DoctorCheck:
    detail = f"{found_bytes / GIB:.1f} GiB {where}; exporting the published network needs {needed_bytes / GIB:.0f}"
    is_enough = found_bytes >= needed_bytes
    return DoctorCheck(name, "ok" if is_enough else "missing", detail, None if is_enough else remedy, (EXPORT,))
