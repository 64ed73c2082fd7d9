"""Tests of the fingerprint and its id, with a fake nvidia-smi."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from cclip_deploy.environment import fingerprint as module
from cclip_deploy.environment.fingerprint import differences, fingerprint, fingerprint_id, read_gpus

SMI = """#!/bin/sh
case "$*" in
  *clocks_event_reasons*) echo 'Field "clocks_event_reasons.active" is not a valid field to query.'; exit 2 ;;
  *clocks_throttle_reasons*) echo 0x0000000000000004; echo 0x0000000000000000 ;;
  *) echo "NVIDIA L4, 550.54, 23034, 2040, 72.00, 300, 6251, 41, 0"
     echo "NVIDIA L4, 550.54, 23034, 2040, [N/A], 210, 405, 39, 0" ;;
esac
"""

FACTS: dict[str, Any] = {
    "cpu": {"model": "Xeon", "usable_cores": 2, "quota_cores": None, "flags": ["avx2"]},
    "memory_bytes": 1,
    "system": {"os": "Debian", "kernel": "6.1"},
    "python": "CPython 3.11.7",
    "packages": {"onnxruntime": "1.32.0", "cclip-deploy": "0.1.0", "onnx": "1.23.2"},
    "environment": {"OMP_NUM_THREADS": "2"},
    "gpu": [{"name": "NVIDIA L4", "driver": "550.54", "max_sm_clock_mhz": 2040.0, "sm_clock_mhz": 300.0}],
    "load_average": [0.1, 0.1, 0.1],
    "time_utc": "2026-11-01T00:00:00+00:00",
}


def put_smi(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = folder / "nvidia-smi"
    script.write_text(text)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def changed(*path: str | int, to: object) -> dict[str, Any]:
    facts = copy.deepcopy(FACTS)
    place: Any = facts
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return facts


def test_the_fingerprint_is_json_and_describes_the_system() -> None:
    facts = json.loads(json.dumps(fingerprint()))
    assert facts["cpu"]["usable_cores"] == len(os.sched_getaffinity(0))
    assert facts["cpu"]["model"]
    assert facts["packages"]["numpy"] == version("numpy")
    assert module.installed_version("no-such-distribution") is None
    assert facts["system"]["kernel"] == os.uname().release
    assert facts["id"] == fingerprint_id(facts) == fingerprint()["id"]


def test_fingerprint_imports_no_backend_and_no_numpy() -> None:
    code = (
        "import sys; from cclip_deploy.environment.fingerprint import fingerprint; fingerprint(); "
        "heavy = {'torch', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'open_clip', 'numpy'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("load_average",), [9.0, 9.0, 9.0]),
        (("time_utc",), "2027-01-01T00:00:00+00:00"),
        (("memory_bytes",), 2),
        (("system", "kernel"), "6.2"),
        (("python",), "CPython 3.11.9"),
        (("packages", "cclip-deploy"), "0.2.0"),
        (("gpu", 0, "sm_clock_mhz"), 1500.0),
    ],
)
def test_the_id_ignores_what_does_not_affect_timings(path: tuple[str | int, ...], to: object) -> None:
    other = changed(*path, to=to)
    assert fingerprint_id(other) == fingerprint_id(FACTS)
    assert differences(FACTS, other) == []


@pytest.mark.parametrize(
    ("path", "to", "said"),
    [
        (("cpu", "model"), "EPYC", "cpu.model: 'Xeon' in the baseline, 'EPYC' here"),
        (("cpu", "usable_cores"), 4, "cpu.usable_cores: 2 in the baseline, 4 here"),
        (("cpu", "quota_cores"), 1.5, "cpu.quota_cores: None in the baseline, 1.5 here"),
        (("cpu", "flags"), [], "cpu.flags: ['avx2'] in the baseline, [] here"),
        (("python",), "CPython 3.12.1", "python: 'CPython 3.11' in the baseline, 'CPython 3.12' here"),
        (("packages", "onnxruntime"), "1.33.0", "packages.onnxruntime: '1.32.0' in the baseline, '1.33.0' here"),
        (("environment",), {}, "environment.OMP_NUM_THREADS: '2' in the baseline, None here"),
        (("gpu", 0, "driver"), "570.1", "gpu0.driver: '550.54' in the baseline, '570.1' here"),
        (("gpu", 0, "max_sm_clock_mhz"), 1000.0, "gpu0.max_sm_clock_mhz: 2040.0 in the baseline, 1000.0 here"),
    ],
)
def test_the_id_changes_with_what_affects_timings_and_the_difference_is_named(
    path: tuple[str | int, ...], to: object, said: str
) -> None:
    other = changed(*path, to=to)
    assert fingerprint_id(other) != fingerprint_id(FACTS)
    assert differences(FACTS, other) == [said]


def test_a_lost_gpu_is_a_difference() -> None:
    assert "gpu0.name: 'NVIDIA L4' in the baseline, None here" in differences(FACTS, changed("gpu", to=None))


def test_gpus_are_read_with_their_clocks_and_the_older_name_of_throttling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_smi(tmp_path, SMI, monkeypatch)
    gpus, problem = read_gpus()
    assert problem is None
    assert gpus is not None
    assert gpus[0] == {
        "name": "NVIDIA L4",
        "driver": "550.54",
        "memory_mib": 23034.0,
        "max_sm_clock_mhz": 2040.0,
        "power_limit_w": 72.0,
        "sm_clock_mhz": 300.0,
        "memory_clock_mhz": 6251.0,
        "temperature_c": 41.0,
        "utilisation_percent": 0.0,
        "throttle_reasons": "0x0000000000000004",
    }
    assert gpus[1]["power_limit_w"] is None
    assert gpus[1]["throttle_reasons"] == "0x0000000000000000"


def test_without_nvidia_smi_there_is_no_gpu_and_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_gpus() == (None, None)


def test_the_message_of_a_failing_nvidia_smi_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_smi(
        tmp_path, "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n", monkeypatch
    )
    gpus, problem = read_gpus()
    assert gpus is None
    assert problem == "nvidia-smi ended with 18: Failed to initialize NVML: Driver/library version mismatch"


def test_an_nvidia_smi_that_hangs_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_smi(tmp_path, "#!/bin/sh\nexec sleep 5\n", monkeypatch)
    monkeypatch.setattr(module, "NVIDIA_SMI_SECONDS", 0.2)
    gpus, problem = read_gpus()
    assert gpus is None
    assert "timed out" in str(problem)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_cpu_quota_of_a_container_is_read(files: dict[str, str], cores: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert module.read_cpu_quota(tmp_path) == cores


def test_memory_is_that_of_the_machine_or_the_limit_of_the_container(tmp_path: Path) -> None:
    machine_bytes = module.total_memory_bytes(tmp_path)
    stated_kib = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert machine_bytes == int(stated_kib.split()[1]) * 1024
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert module.total_memory_bytes(tmp_path) == 2**30
    (tmp_path / "memory.max").write_text("max\n")
    assert module.total_memory_bytes(tmp_path) == machine_bytes
