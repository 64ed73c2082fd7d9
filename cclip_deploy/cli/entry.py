"""Entry wrapper of the console script and of the stage scripts: SIGINT, SIGTERM and exit codes.

Imports little, so that the handlers are installed before anything that takes time to import.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

received: list[int] = []
"""SIGINT and SIGTERM as they came: compiled code may swallow the KeyboardInterrupt that `receive` raises."""


class Interrupted(SystemExit):
    """End of the process after SIGINT (130) or SIGTERM (143); the message is already on standard error."""


def receive(number: int, frame: object) -> NoReturn:
    """Handle SIGINT or SIGTERM: remember it, and raise KeyboardInterrupt."""
    received.append(number)
    raise KeyboardInterrupt


def raise_if_received() -> None:
    """Raise KeyboardInterrupt if a signal came before, even if it was swallowed then."""
    if received:
        raise KeyboardInterrupt


def end_interrupted() -> NoReturn:
    """Print the one line of an interrupted command and end with 128 + signal number."""
    sys.stderr.write("Interrupted; nothing was left half-written.\n")
    raise Interrupted(128 + (received[0] if received else signal.SIGINT))


def start(program: Callable[[], None]) -> None:
    """Run a program; if SIGINT or SIGTERM comes, it ends with one line and 130 or 143, wherever it was."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, receive)
    try:
        program()
    except BaseException as error:
        if not received or isinstance(error, Interrupted):
            raise
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
    if received:
        end_interrupted()


def run_script(main: Callable[[], None]) -> None:
    """Run a stage script's `main` with the errors, messages and exit codes of the command line."""

    def guarded() -> None:
        from cclip_deploy.cli.console import reports_errors

        reports_errors(main)()

    start(guarded)
