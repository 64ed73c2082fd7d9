"""Entry wrapper of the console script and of the stage scripts: signals, standard streams and exit codes.

Imports little, so that the handlers are installed before anything that takes time to import.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from cclip_deploy.cli.streams import guard_streams

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
received: list[int] = []
"""Those of SIGNALS that came: compiled code may swallow the KeyboardInterrupt that `receive` raises."""


class Interrupted(SystemExit):
    """End after SIGINT (130), SIGTERM (143) or SIGHUP (129); the message is already on standard error."""


def receive(number: int, frame: object) -> NoReturn:
    """Handle one of SIGNALS: remember it, and raise KeyboardInterrupt."""
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
    """Run a program; if one of SIGNALS comes, it ends with one line and 128 + its number, wherever it was.

    A SIGHUP that is ignored, as `nohup` has it, stays ignored. What standard output does not take ends the program as
    `guard_streams` says.
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
    """Output that is lost has to be known before the exit code is chosen, not as the interpreter ends."""
    try:
        program()
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def run_script(main: Callable[[], None]) -> None:
    """Run a stage script's `main` with the errors, messages and exit codes of the command line."""

    def guarded() -> None:
        from cclip_deploy.cli.console import reports_errors

        reports_errors(main)()

    start(guarded)
