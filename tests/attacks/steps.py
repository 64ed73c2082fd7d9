"""Counts the lines of Python that run: a bound on work that does not depend on the machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def counted_lines() -> Iterator[list[int]]:
    """Counts the lines of Python that run in a block, in functions called from it."""
    steps = [0]

    def trace(frame: object, event: str, argument: object) -> object:
        steps[0] += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        yield steps
    finally:
        sys.settrace(before)
