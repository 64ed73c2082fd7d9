"""Wrappers of standard output and standard error that handle a closed pipe, a full disk and a limited encoding."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

CLOSED_PIPE, FULL = 141, 3
"""Exit codes: 128 + SIGPIPE, and that of EnvironmentIssue."""


class OutputLost(SystemExit):
    """Exit because standard output cannot be written; the message has been printed."""


def guard_streams() -> None:
    """Wrap `sys.stdout` and `sys.stderr`, unless the program has already replaced them.

    Characters that the encoding lacks are written as `\\x…` and `\\u…`. A closed pipe at standard output ends the
    process with 141 and no message, a full disk with 3 and a message. Errors of standard error are ignored.
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
        f"Error: Standard output could not be written ({reason}), so the output is incomplete. Free some space or "
        "redirect the output, and run the command again.\n"
    )
    raise OutputLost(FULL)


class _Descriptor(io.FileIO):
    """File descriptor that calls a function on the first failed write and discards all later output."""

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
    """Stand-in for a descriptor that was closed at the start."""

    def write(self, data: Any, /) -> int:
        if not self._lost:
            self._lost = True
            self._on_failure(OSError(errno.EBADF, os.strerror(errno.EBADF)))
        return len(data)


def _guarded(number: int, stream: TextIO | None, on_failure: Callable[[OSError], None]) -> TextIO:
    if stream is None:  # otherwise the next opened file would get this number, and the output
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
