"""Run the command line in a subprocess or in this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from typer.testing import CliRunner, Result

from cclip_deploy.cli.commands import app

PROGRAM = str(Path(sys.executable).with_name("cclip-deploy"))
LONGEST_SECONDS = 300


def invoke(*arguments: str | Path) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="cclip-deploy")


def run(*arguments: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the installed program, with further environment variables."""
    command = [PROGRAM, *map(str, arguments)]
    surroundings = {**os.environ, **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_SECONDS, env=surroundings)


def interrupt_at(
    message: str, *arguments: str | Path, by: signal.Signals = signal.SIGINT
) -> subprocess.CompletedProcess[str]:
    """Run the installed program and send it a signal after a line on standard error that starts with `message`."""
    return run(*arguments, env=signal_itself(by, f"stderr {message}"))


def interrupt_import(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the installed program and send it SIGINT when it starts to import `module`."""
    return run(*arguments, env=signal_itself(signal.SIGINT, f"import {module}"))


def signal_itself(number: signal.Signals, point: str) -> dict[str, str]:
    """Return environment variables with which Python sends itself a signal."""
    return _at_start(SIGNAL_AT=f"{int(number)} {point}")


def without(*packages: str) -> dict[str, str]:
    """Return environment variables with which packages seem not to be installed."""
    return _at_start(ABSENT=",".join(packages))


def _at_start(**variables: str) -> dict[str, str]:
    """Return variables for tests/cli/at_start/sitecustomize.py, and the path to it."""
    folder = Path(__file__).with_name("at_start")
    path = os.pathsep.join(part for part in (str(folder), os.environ.get("PYTHONPATH")) if part)
    return {"PYTHONPATH": path, **variables}
