"""Run a function in a forked child process with a limit on additional memory."""

from __future__ import annotations

import faulthandler
import gc
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

MIB = 2**20
SECONDS = 120


def prepare_child() -> None:
    """Call this first in a forked child. Work of more than `SECONDS` prints a traceback and ends with status 1.

    Garbage of the parent is never collected: the destructors of its sessions would wait for threads that a fork lacks.
    """
    gc.freeze()
    faulthandler.dump_traceback_later(SECONDS, exit=True)


def within(mib: int, function: Callable[[], object]) -> str:
    """What came of a call: its result or its error, as `Type: text`; a child that was killed fails the test."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("the size of a process is read from Linux's /proc")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        prepare_child()
        os.write(writing, _limited(mib, function).encode(errors="replace")[:4000])
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with status {status}"
    return said


def _limited(mib: int, function: Callable[[], object]) -> str:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + mib * MIB
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        result = function()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return f"{type(result).__name__}: {result!r}"
