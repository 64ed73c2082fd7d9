"""The command line as a user meets it: in a process of its own, or in this one where only the parsing matters."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner, Result

from cclip_deploy.cli.app import app

PROGRAM = str(Path(sys.executable).with_name("cclip-deploy"))
LONGEST_SECONDS = 300


def invoke(*arguments: str | Path) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="cclip-deploy")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the installed program."""
    command = [PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_SECONDS)


def interrupt_at(
    message: str, *arguments: str | Path, by: signal.Signals = signal.SIGINT
) -> subprocess.CompletedProcess[str]:
    """Run the installed program, and press Ctrl-C when it says on standard error that a stage begins."""
    process = subprocess.Popen(
        [PROGRAM, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith(message):
            process.send_signal(by)
            break
    stdout, stderr = process.communicate(timeout=LONGEST_SECONDS)
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, said + stderr)
