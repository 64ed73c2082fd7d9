"""Hardware and software that determine latency, collected without importing the packages."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ENGINE_PACKAGES = (
    "torch",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "openvino",
    "numpy",
)
OTHER_PACKAGES = ("onnx", "onnxscript", "open-clip-torch", "pycuda", "cuda-bindings", "cclip-deploy")

CPU_FLAG_PREFIXES = ("avx", "amx", "fma", "asimd", "sve", "i8mm", "bf16")
ENVIRONMENT_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "OMP_PROC_BIND",
    "GOMP_CPU_AFFINITY",
    "GOMP_SPINCOUNT",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "NVIDIA_TF32_OVERRIDE",
    "LD_PRELOAD",
)

STABLE_GPU_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "max_sm_clock_mhz": "clocks.max.sm",
    "power_limit_w": "power.limit",
}
MOMENTARY_GPU_FIELDS = {
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
    "utilisation_percent": "utilization.gpu",
}
TEXT_GPU_FIELDS = ("name", "driver", "throttle_reasons")
THROTTLE_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
NVIDIA_SMI_SECONDS = 20
CGROUP = Path("/sys/fs/cgroup")


def fingerprint() -> dict[str, Any]:
    """Return the fingerprint of this machine as JSON values; `id` is the `fingerprint_id` of the others.

    `gpu` is None without a working `nvidia-smi`; `gpu_problem` is the error if it fails.
    """
    gpus, gpu_problem = read_gpus()
    facts: dict[str, Any] = {
        "cpu": read_cpu(),
        "memory_bytes": total_memory_bytes(),
        "system": {"os": _os_name(), "kernel": platform.release()},
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": {name: installed_version(name) for name in ENGINE_PACKAGES + OTHER_PACKAGES},
        "environment": {name: os.environ[name] for name in ENVIRONMENT_VARIABLES if name in os.environ},
        "gpu": gpus,
        "gpu_problem": gpu_problem,
        "load_average": list(os.getloadavg()),
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return {"id": fingerprint_id(facts), **facts}


def fingerprint_id(facts: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that are equal for fingerprints whose timings are comparable.

    The hash covers the processor, its cores and quota, the GPUs with driver, clock and power limits, the engine
    libraries, the minor version of Python, and environment variables for threads. It does not cover load, time, current
    clocks, memory, the kernel, and the version of cclip-deploy, whose versions a latency test compares.
    """
    text = json.dumps(dict(_comparable(facts)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(baseline: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Describe each difference that makes the timings of two fingerprints incomparable."""
    before, now = dict(_comparable(baseline)), dict(_comparable(present))
    return [
        f"{key}: {before.get(key)!r} in the baseline, {now.get(key)!r} here"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def read_cpu() -> dict[str, Any]:
    """Return model, architecture, usable cores, container quota in cores, frequency governor and vector flags."""
    lines = _first_of_each_key(_read("/proc/cpuinfo") or "")
    flags = set((lines.get("flags") or lines.get("Features") or "").split())
    return {
        "model": lines.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "usable_cores": usable_cores(),
        "quota_cores": read_cpu_quota(CGROUP),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "flags": sorted(flag for flag in flags if flag.startswith(CPU_FLAG_PREFIXES)),
    }


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_cpu_quota(cgroup: Path) -> float | None:
    """Return the CPU quota of the container in cores (cgroup v2 or v1); None if unlimited."""
    quota_us, period_us = [*(_read(cgroup / "cpu.max") or "max").split(), ""][:2]
    if quota_us == "max":
        quota_us = _read(cgroup / "cpu" / "cpu.cfs_quota_us") or "-1"
        period_us = _read(cgroup / "cpu" / "cpu.cfs_period_us") or "100000"
    return int(quota_us) / int(period_us) if int(quota_us) > 0 else None


def total_memory_bytes(cgroup: Path = CGROUP) -> int:
    """Return the memory of the machine in bytes, or the limit of the container (cgroup v2) if that is lower."""
    limit = _read(cgroup / "memory.max") or "max"
    physical_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return physical_bytes if limit == "max" else min(physical_bytes, int(limit))


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution; None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def read_gpus() -> tuple[list[dict[str, Any]] | None, str | None]:
    """Return the GPUs that `nvidia-smi` lists and None, or None and its error; both None if it is not installed."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None, None
    try:
        gpus = _query_gpus(smi, {**STABLE_GPU_FIELDS, **MOMENTARY_GPU_FIELDS})
    except (OSError, subprocess.SubprocessError) as error:
        return None, _smi_problem(error)
    return _with_throttling(smi, gpus), None


def _with_throttling(smi: str, gpus: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # Drivers differ in the name of the field, and an unknown field fails the whole query.
    for field_name in THROTTLE_FIELDS:
        try:
            rows = _query_gpus(smi, {"throttle_reasons": field_name})
        except (OSError, subprocess.SubprocessError):
            continue
        return [{**gpu, **row} for gpu, row in zip(gpus, rows, strict=True)]
    return [{**gpu, "throttle_reasons": None} for gpu in gpus]


def _query_gpus(smi: str, fields: Mapping[str, str]) -> list[dict[str, Any]]:
    command = [smi, f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True)
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.strip()]
    return [{key: _smi_value(key, text.strip()) for key, text in zip(fields, row, strict=True)} for row in rows]


def _smi_value(key: str, text: str) -> str | float | None:
    if text.startswith("[") or text == "N/A":
        return None
    return text if key in TEXT_GPU_FIELDS else float(text)


def _smi_problem(error: OSError | subprocess.SubprocessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stdout or error.stderr or "").strip().splitlines()
        return f"nvidia-smi ended with {error.returncode}: {lines[0] if lines else 'no message'}"
    return f"nvidia-smi: {error}"


def _comparable(facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in facts.get("cpu", {}).items():
        yield f"cpu.{key}", value
    for index, gpu in enumerate(facts.get("gpu") or []):
        for key in STABLE_GPU_FIELDS:
            yield f"gpu{index}.{key}", gpu.get(key)
    for name in ENGINE_PACKAGES:
        yield f"packages.{name}", facts.get("packages", {}).get(name)
    yield "python", facts.get("python", "").rpartition(".")[0]
    for key, value in facts.get("environment", {}).items():
        yield f"environment.{key}", value


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _first_of_each_key(text: str) -> dict[str, str]:
    pairs = [line.partition(":") for line in reversed(text.splitlines()) if ":" in line]
    return {key.strip(): value.strip() for key, _, value in pairs}


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
