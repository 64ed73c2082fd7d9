"""Tests of the diagnosis, with fake packages (missing, broken, crashing, printing) and fake drivers."""

from __future__ import annotations

import ctypes
import re
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cclip_deploy.environment import doctor as machine
from cclip_deploy.environment.doctor import DoctorCheck, Package, blockers, check_package, probe_import


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of sys.path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def put(site: Path, module: str, code: str) -> Package:
    (site / f"{module}.py").write_text(code)
    return Package(module, module.replace("_", "-"), "export", ("export",))


def test_a_missing_package_names_the_extra_that_installs_it() -> None:
    check = check_package(Package("no_such_module_x", "no-such", "medical", ("read DICOM",)))
    assert (check.status, check.remedy) == ("missing", "pip install 'cclip-deploy[medical]'")
    assert check.needed_for == ("read DICOM",)


def test_an_import_that_raises_is_broken_with_the_first_line_of_its_message(site: Path) -> None:
    package = put(site, "fake_broken", "raise ImportError('\\nlibfoo.so.1: cannot open\\nread the manual')")
    check = check_package(package, deep=True)
    assert (check.status, check.detail) == ("broken", "ImportError: libfoo.so.1: cannot open")
    assert check.remedy == "pip install --force-reinstall 'cclip-deploy[export]'"


def test_an_import_that_crashes_is_broken(site: Path) -> None:
    put(site, "fake_fatal", "import os, signal\nos.kill(os.getpid(), signal.SIGILL)")
    assert "code -4" in str(probe_import("fake_fatal").error)


def test_an_import_that_exits_is_broken(site: Path) -> None:
    put(site, "fake_exit", "raise SystemExit('license expired')")
    assert probe_import("fake_exit").error == "SystemExit: license expired"


def test_an_import_that_hangs_is_broken(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(site, "fake_hang", "import time\ntime.sleep(30)")
    monkeypatch.setattr(machine, "IMPORT_SECONDS", 0.5)
    assert probe_import("fake_hang").error == "import took more than 0.5 s"


def test_the_output_of_a_module_is_ignored(site: Path) -> None:
    put(site, "fake_noisy", "import sys\nprint('{\"error\": 1}', end='')\nprint('warning', file=sys.stderr)")
    assert probe_import("fake_noisy") == machine.Probe(None)


def test_packages_are_imported_only_with_deep(site: Path) -> None:
    package = put(site, "fake_late", "raise RuntimeError('imported')")
    assert check_package(package).status == "ok"
    assert check_package(package, deep=True).detail == "RuntimeError: imported"


ONNXRUNTIME_WITH_CUDA = "def get_available_providers():\n    return ['CUDAExecutionProvider', 'CPUExecutionProvider']\n"


def test_a_cuda_provider_without_a_gpu_is_broken_while_onnxruntime_itself_is_ok(site: Path) -> None:
    put(site, "onnxruntime", ONNXRUNTIME_WITH_CUDA)
    main, cuda = machine.check_onnxruntime(has_gpu=False)
    assert main.status == "ok"
    assert "providers: CUDAExecutionProvider, CPUExecutionProvider" in main.detail
    assert cuda.status == "broken"
    assert "would run on the CPU" in cuda.detail
    assert "driver" in str(cuda.remedy)
    assert blockers([main, cuda]) == []


def test_a_cuda_provider_with_a_gpu_is_ok(site: Path) -> None:
    put(site, "onnxruntime", ONNXRUNTIME_WITH_CUDA)
    assert [check.status for check in machine.check_onnxruntime(has_gpu=True)] == ["ok", "ok"]


def test_two_installed_builds_of_onnxruntime_are_broken(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(site, "onnxruntime", ONNXRUNTIME_WITH_CUDA)
    monkeypatch.setattr(machine, "installed_version", lambda _: "1.32.0")
    cuda = machine.check_onnxruntime(has_gpu=True)[1]
    assert cuda.status == "broken"
    assert str(cuda.remedy).startswith("pip uninstall -y onnxruntime onnxruntime-gpu &&")


def test_an_onnxruntime_that_does_not_import_blocks_running_a_bundle(site: Path) -> None:
    put(site, "onnxruntime", "raise ImportError('bad wheel')")
    main, cuda = machine.check_onnxruntime(has_gpu=False)
    assert (main.status, main.detail, cuda.status) == ("broken", "ImportError: bad wheel", "missing")
    assert blockers([main, cuda]) == [main]


def test_openvino_reports_version_processor_and_number_formats() -> None:
    check = machine.check_openvino()
    assert (check.status, check.remedy) == ("ok", None)
    assert str(machine.installed_version("openvino")) in check.detail
    assert "FP32" in check.detail


def test_an_openvino_that_does_not_import_is_broken_and_blocks_no_bundle(site: Path) -> None:
    put(site, "openvino", "raise ImportError('libtbb.so.12: cannot open')")
    check = machine.check_openvino()
    assert (check.status, blockers([check])) == ("broken", [])
    assert "libtbb" in check.detail
    assert check.remedy == "pip install --force-reinstall 'cclip-deploy[openvino]'"


def test_tensorrt_rtx_builds_without_a_gpu_and_plain_tensorrt_does_not(site: Path) -> None:
    put(site, "tensorrt_rtx", "")
    put(site, "tensorrt", "")
    rtx = machine.check_binding(machine.TENSORRT_RTX, has_gpu=False)
    plain = machine.check_binding(machine.TENSORRT, has_gpu=False)
    assert rtx.status == "ok"
    assert "builds engines; running them needs" in rtx.detail
    assert plain.status == "broken"
    assert machine.check_binding(machine.TENSORRT, has_gpu=True).status == "ok"


class FakeCuda:
    """Fake libcuda.so.1 with the two functions that are called."""

    def __init__(self, code: int, gpus: int) -> None:
        self.code, self.gpus = code, gpus

    def cuInit(self, flags: int) -> int:
        return self.code

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.gpus
        return 0


def test_a_missing_driver_has_a_remedy() -> None:
    check = machine.check_driver("libno-such-driver.so.1")
    assert check.status == "missing"
    assert "libno-such-driver.so.1" in check.detail
    assert "--gpus all" in str(check.remedy)


@pytest.mark.parametrize(("code", "gpus", "status"), [(0, 2, "ok"), (0, 0, "broken"), (999, 2, "broken")])
def test_a_driver_counts_its_gpus(code: int, gpus: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeCuda(code, gpus))
    monkeypatch.setattr(machine, "read_gpus", lambda: (None, "nvidia-smi ended with 18: mismatch"))
    check = machine.check_driver()
    assert check.status == status
    assert ("2 GPUs; nvidia-smi ended with 18" in check.detail) == (status == "ok")


def test_gpus_are_named_by_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeCuda(0, 1))
    monkeypatch.setattr(machine, "read_gpus", lambda: ([{"name": "NVIDIA L4", "driver": "550.54"}], None))
    assert machine.check_driver().detail == "NVIDIA L4 (driver 550.54)"


@pytest.mark.parametrize(("free_gib", "status"), [(4.9, "missing"), (5.0, "ok")])
def test_a_full_disk_blocks_export(
    free_gib: float, status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=int(free_gib * 2**30)))
    check = machine.check_disk(tmp_path)
    assert (check.status, check.needed_for) == (status, ("export",))
    assert (check.remedy is None) == (status == "ok")


def test_this_machine_can_run_a_bundle_and_every_problem_has_a_remedy() -> None:
    checks = machine.diagnose()
    assert blockers(checks) == []
    assert len({check.name for check in checks}) == len(checks)
    assert all((check.status == "ok") == (check.remedy is None) for check in checks)


def test_the_extra_of_every_remedy_contains_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    brought = {"": project["dependencies"], **project["optional-dependencies"]}
    bindings = (machine.ONNXRUNTIME, machine.OPENVINO, machine.TENSORRT_RTX, machine.TENSORRT)
    for package in (*machine.PYTHON_PACKAGES, *bindings):
        names = [re.split(r"[^\w-]", requirement)[0].replace("_", "-") for requirement in brought[package.extra]]
        assert package.distribution in names


def test_device_buffers_need_one_of_two_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "DEVICE_BUFFER_MODULES", {"no_such.parent": "no-such", "numpy": "numpy"})
    assert machine.check_device_buffers().status == "ok"
    monkeypatch.setattr(machine, "DEVICE_BUFFER_MODULES", {"no_such.parent": "no-such"})
    check = machine.check_device_buffers()
    assert (check.status, str(check.remedy)[:24]) == ("missing", "pip install cuda-python ")


def test_blockers_are_those_of_the_purpose() -> None:
    good = DoctorCheck("numpy", "ok", "2.4", None, ("run a bundle", "export"))
    absent = DoctorCheck("torch", "missing", "not installed", "pip install", ("export",))
    assert blockers([good, absent]) == []
    assert blockers([good, absent], machine.EXPORT) == [absent]
