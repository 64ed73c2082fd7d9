"""The command line as a user meets it: in a process of its own, or in this one where only the parsing matters."""

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
    """Run the installed program, which gets a signal right after a line on standard error that begins so."""
    return run(*arguments, env=signal_itself(by, f"stderr {message}"))


def interrupt_import(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the installed program, and press Ctrl-C as it begins to import a module."""
    return run(*arguments, env=signal_itself(signal.SIGINT, f"import {module}"))


def signal_itself(number: signal.Signals, point: str) -> dict[str, str]:
    """Environment variables of a Python that sends itself a signal."""
    return _at_start(SIGNAL_AT=f"{int(number)} {point}")


def without(*packages: str) -> dict[str, str]:
    """Environment variables of a Python in which packages are not installed."""
    return _at_start(ABSENT=",".join(packages))


def _at_start(**variables: str) -> dict[str, str]:
    """Variables that tests/cli/at_start/sitecustomize.py reads, and the path to it."""
    folder = Path(__file__).with_name("at_start")
    path = os.pathsep.join(part for part in (str(folder), os.environ.get("PYTHONPATH")) if part)
    return {"PYTHONPATH": path, **variables}
