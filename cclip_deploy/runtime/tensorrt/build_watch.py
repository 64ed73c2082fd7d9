"""Messages, progress and cancellation of an engine build, including signals that arrive inside the binding."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cclip_deploy.runtime.tensorrt.binding import join_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType


class BuildWatch:
    """Collects a build's messages, reports its progress, and cancels it.

    The bindings discard exceptions raised inside callbacks. `cancel` therefore stores the exception in `cause`, the
    next step of the progress monitor ends the build, and `raise_if_cancelled` raises it after the build has returned.
    """

    def __init__(self, on_progress: Callable[[str], None] | None, started: float) -> None:
        self.severities: list[str] = []
        self.messages: list[str] = []
        self.cause: BaseException | None = None
        self._on_progress = on_progress
        self._started = started

    def note(self, severity: str, message: str) -> None:
        self.severities.append(severity)
        self.messages.append(message)

    def phase_starts(self, phase: str, parent: str | None, steps: int) -> None:
        if parent is None or parent == "Building engine":
            self.report(phase)

    def report(self, phase: str) -> None:
        if self._on_progress is None or self.cause is not None:
            return
        try:
            self._on_progress(f"{phase} ({time.perf_counter() - self._started:.1f} s)")
        except BaseException as error:
            self.cancel(error)

    def cancel(self, cause: BaseException) -> None:
        self.cause = self.cause or cause

    def should_continue(self) -> bool:
        return self.cause is None

    def raise_if_cancelled(self) -> None:
        if self.cause is not None:
            raise self.cause

    def lines(self) -> Iterator[str]:
        return (f"[{severity}] {text}" for severity, text in zip(self.severities, self.messages, strict=True))

    def errors(self) -> str:
        pairs = zip(self.severities, self.messages, strict=True)
        return join_errors([message for severity, message in pairs if severity in ("ERROR", "INTERNAL_ERROR")])


@contextmanager
def signals_cancel(watch: BuildWatch) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP cancel the build; exceptions of their handlers are raised after it has returned.

    A handler runs wherever Python code runs, also in the logger that the binding calls, where the binding would discard
    its exception.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    callables = {number: handler for number, handler in handlers.items() if callable(handler)}

    def handle(number: int, frame: FrameType | None) -> None:
        try:
            callables[signal.Signals(number)](number, frame)
        except BaseException as error:
            watch.cancel(error)

    for number in callables:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in callables.items():
            signal.signal(number, handler)
        watch.raise_if_cancelled()
