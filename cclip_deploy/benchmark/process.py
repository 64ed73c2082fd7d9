"""Time and peak memory of a command in a subprocess; git revision of the package."""

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

# A process inherits the peak memory of its parent, so this small process starts the command, a JSON list in argv[1].
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
TIMEOUT_SECONDS, GIT_TIMEOUT_SECONDS = 600, 20


@dataclass(frozen=True)
class ProcessCost:
    """Median time of `n` runs after one warm-up run, and the largest peak of resident memory."""

    seconds: float
    peak_bytes: int
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def measure_command(command: Sequence[str], runs: int = 3) -> ProcessCost:
    """Run a command once to warm the disk cache, then `runs` times.

    Raises:
        EnvironmentIssue: the command fails; the message contains the end of its standard error.
    """
    costs = [_run_once(command) for _ in range(1 + runs)][1:]
    return ProcessCost(median(c["seconds"] for c in costs), max(c["peak_bytes"] for c in costs), runs)


def source_revision() -> dict[str, Any] | None:
    """Return the git commit of this package and whether tracked files are modified; None if it is not in a checkout."""
    checkout = Path(__file__).resolve().parents[2]
    try:
        top, commit = _git(checkout, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != checkout:  # installed inside the checkout of another project
            return None
        return {"commit": commit, "modified": bool(_git(checkout, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=GIT_TIMEOUT_SECONDS, check=True
    ).stdout.strip()


def _run_once(command: Sequence[str]) -> dict[str, Any]:
    launch = [sys.executable, "-c", LAUNCHER, json.dumps(list(command))]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    cost: dict[str, Any] = json.loads(done.stdout or '{"code": null}')
    if cost["code"] != 0:
        message = " ".join(done.stderr.split())[-300:]
        raise EnvironmentIssue(f"{' '.join(command[:6])} … ended with code {cost['code']}: {message}")
    return cost
