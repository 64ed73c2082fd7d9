"""Time and peak memory of a command in a process of its own; the git revision that is running."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cclip_deploy.errors import EnvironmentIssue

# A process inherits the peak of the one that starts it, so a small one stands between: argument 1 is the command, JSON.
LAUNCHER = """
import json, os, subprocess, sys, time
command = json.loads(sys.argv[1])
started = time.perf_counter()
process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - started
unit = 1 if sys.platform == "darwin" else 1024
process.returncode = code = os.waitstatus_to_exitcode(status)
print(json.dumps({"seconds": seconds, "peak_bytes": usage.ru_maxrss * unit, "code": code}))
"""
LONGEST_SECONDS, GIT_SECONDS = 600, 20


@dataclass(frozen=True)
class ProcessCost:
    """Median time of `n` runs after one that does not count, and the largest peak of resident memory."""

    seconds: float
    peak_bytes: int
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)


def measure_command(command: Sequence[str], runs: int = 3) -> ProcessCost:
    """Run a command once to warm the disk, then `runs` times.

    Raises:
        EnvironmentIssue: it does not end well; what it said on standard error is in the message.
    """
    told = [_run_once(command) for _ in range(1 + runs)][1:]
    return ProcessCost(median(t["seconds"] for t in told), max(t["peak_bytes"] for t in told), runs)


def source_revision() -> dict[str, Any] | None:
    """Commit of the git checkout that this package runs from, and whether tracked files differ; None without one."""
    checkout = Path(__file__).resolve().parents[2]
    try:
        top, commit = _git(checkout, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != checkout:  # installed below another project's checkout
            return None
        return {"commit": commit, "modified": bool(_git(checkout, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True).stdout.strip()


def _run_once(command: Sequence[str]) -> dict[str, Any]:
    launch = [sys.executable, "-c", LAUNCHER, json.dumps(list(command))]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=LONGEST_SECONDS)
    told: dict[str, Any] = json.loads(done.stdout or '{"code": null}')
    if told["code"] != 0:
        said = " ".join(done.stderr.split())[-300:]
        raise EnvironmentIssue(f"{' '.join(command[:6])} … ended with code {told['code']}: {said}")
    return told
