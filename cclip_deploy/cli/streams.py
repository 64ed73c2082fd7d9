"""Standard output and standard error that survive a closed pipe, a full disk and a narrow encoding."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

CLOSED_PIPE, FULL = 141, 3
"""Exit codes: 128 + SIGPIPE, as of a program that the signal ends; 3, as of every EnvironmentIssue."""


class OutputLost(SystemExit):
    """End of the process because standard output took no more; what is to be said is already on standard error."""


def guard_streams() -> None:
    """Replace the interpreter's own `sys.stdout` and `sys.stderr`; what a program put in their place is left alone.

    Characters that their encoding lacks are written as `\\x…` and `\\u…`. Where standard output is a pipe that nobody
    reads, the process ends quietly with 141; where it is full or closed, with a message and 3. Messages that standard
    error does not take are dropped: they never change what a run does.
    """
    if sys.stderr is sys.__stderr__:
        sys.stderr = _guarded(2, sys.stderr, lambda error: None)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _guarded(1, sys.stdout, _end)


def _end(error: OSError) -> None:
    if error.errno == errno.EPIPE:
        raise OutputLost(CLOSED_PIPE)
    reason = "it is closed" if error.errno == errno.EBADF else error.strerror
    sys.stderr.write(
        f"Error: Standard output could not be written ({reason}), so what it got is not complete. Free some space or "
        "write it to another place, and run it again.\n"
    )
    raise OutputLost(FULL)


class _Descriptor(io.FileIO):
    """A descriptor whose first failure to write is given to a function; after it everything is dropped."""

    def __init__(self, number: int, on_failure: Callable[[OSError], None]) -> None:
        super().__init__(number, "wb", closefd=False)
        self._on_failure = on_failure
        self._lost = False

    def write(self, data: Any, /) -> int:
        if not self._lost:
            try:
                return super().write(data)
            except OSError as error:
                self._lost = True
                self._on_failure(error)
        return len(data)


class _Closed(_Descriptor):
    """In place of a descriptor that was closed at the start."""

    def write(self, data: Any, /) -> int:
        if not self._lost:
            self._lost = True
            self._on_failure(OSError(errno.EBADF, os.strerror(errno.EBADF)))
        return len(data)


def _guarded(number: int, stream: TextIO | None, on_failure: Callable[[OSError], None]) -> TextIO:
    if stream is None:  # else the next file that is opened would get the number, and with it what is printed
        _reserve(number)
        raw: _Descriptor = _Closed(number, on_failure)
    else:
        with suppress(OSError):
            stream.flush()
        raw = _Descriptor(number, on_failure)
    encoding = "utf-8" if stream is None else stream.encoding
    at_once = number == 2 or raw.isatty()
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=at_once)


def _reserve(number: int) -> None:
    descriptor = os.open(os.devnull, os.O_RDWR)
    if descriptor != number:
        os.dup2(descriptor, number)
        os.close(descriptor)
