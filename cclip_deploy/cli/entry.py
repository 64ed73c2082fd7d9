"""Run the console script and the stage scripts with signal handlers, guarded streams and exit codes.

Imports little, so that the signal handlers are installed before slow imports.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from cclip_deploy.cli.streams import guard_streams

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
received: list[int] = []
"""Signals received so far. Compiled code may swallow the KeyboardInterrupt that `receive` raises."""


class Interrupted(SystemExit):
    """Exit after SIGINT (130), SIGTERM (143) or SIGHUP (129); the message has been printed."""


def receive(number: int, frame: object) -> NoReturn:
    """Signal handler: record the signal and raise KeyboardInterrupt."""
    received.append(number)
    raise KeyboardInterrupt


def raise_if_received() -> None:
    """Raise KeyboardInterrupt if a signal was received, even if its KeyboardInterrupt was swallowed."""
    if received:
        raise KeyboardInterrupt


def end_interrupted() -> NoReturn:
    """Print the message of an interrupted command and exit with 128 + signal number."""
    sys.stderr.write("Interrupted; nothing was left half-written.\n")
    raise Interrupted(128 + (received[0] if received else signal.SIGINT))


def start(program: Callable[[], None]) -> None:
    """Run a program; one of SIGNALS ends it with one line and exit code 128 + signal number.

    An ignored SIGHUP, as under `nohup`, stays ignored. Errors of standard output end the program, see `guard_streams`.
    """
    guard_streams()
    handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT]
    for number in handled:
        signal.signal(number, receive)
    try:
        _run_and_flush(program)
    except BaseException as error:
        if not received or isinstance(error, Interrupted):
            raise
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
    if received:
        end_interrupted()


def _run_and_flush(program: Callable[[], None]) -> None:
    """Run a program and flush standard output, so that a failed write determines the exit code."""
    try:
        program()
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def run_script(main: Callable[[], None]) -> None:
    """Run the `main` of a stage script with the error messages and exit codes of the command line."""

    def guarded() -> None:
        from cclip_deploy.cli.console import reports_errors

        reports_errors(main)()

    start(guarded)
