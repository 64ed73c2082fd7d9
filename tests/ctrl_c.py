"""Ctrl-C at a point of the process itself, so that no test waits for a moment."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from cclip_deploy.runtime.tensorrt.build_watch import BuildWatch


@contextmanager
def handled_by(handler: Callable[..., object]) -> Iterator[None]:
    """SIGINT and SIGTERM are handled by a function within the block."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def press_in_the_log(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Ctrl-C comes inside the logger that TensorRT's binding calls, at every message that begins so."""
    note = BuildWatch.note

    def press(watch: BuildWatch, severity: str, message: str) -> None:
        note(watch, severity, message)
        if message.startswith(moment):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(BuildWatch, "note", press)
