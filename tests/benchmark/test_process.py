"""Tests of the time and memory of a command, and of the git revision."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cclip_deploy.benchmark import process
from cclip_deploy.benchmark.process import measure_command, source_revision
from cclip_deploy.errors import EnvironmentIssue

MIB = 2**20


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_time_and_peak_are_those_of_the_command() -> None:
    cost = measure_command(python("import time; x = bytearray(120 * 2**20); time.sleep(0.3)"), runs=2)
    assert 0.3 <= cost.seconds < 5
    assert 120 * MIB <= cost.peak_bytes < 200 * MIB
    assert cost.to_dict() == {"seconds": cost.seconds, "peak_bytes": cost.peak_bytes, "n": 2}


def test_the_peak_of_the_process_that_measures_is_not_counted() -> None:
    ballast = np.ones(400 * MIB, np.uint8)
    assert measure_command(python("pass"), runs=1).peak_bytes < 100 * MIB
    del ballast


def test_the_error_of_a_failed_command_contains_its_message() -> None:
    with pytest.raises(EnvironmentIssue, match=r"ended with code 3: no such film"):
        measure_command(python("import sys; print('no such film', file=sys.stderr); sys.exit(3)"))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout with one commit that seems to contain the package."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "a checkout"
    module = folder / "package" / "evidence" / "process.py"
    module.parent.mkdir(parents=True)
    module.write_text("first\n")
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    monkeypatch.setattr(process, "__file__", str(module))
    return folder


def test_the_commit_is_named_and_whether_a_tracked_file_differs_from_it(checkout: Path) -> None:
    told = subprocess.run(["git", "-C", str(checkout), "log", "--format=%H"], capture_output=True, text=True)
    (checkout / "untracked").write_text("new")
    assert source_revision() == {"commit": told.stdout.strip(), "modified": False}
    (checkout / "package" / "evidence" / "process.py").write_text("second\n")
    assert source_revision() == {"commit": told.stdout.strip(), "modified": True}


def test_the_checkout_of_another_project_is_not_named(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = checkout / ".venv" / "site-packages" / "package" / "evidence" / "process.py"
    monkeypatch.setattr(process, "__file__", str(installed))
    installed.parent.mkdir(parents=True)
    assert source_revision() is None


def test_without_git_there_is_no_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_revision() is None
