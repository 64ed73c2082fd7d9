"""Loaded by Python at its start where this folder is on PYTHONPATH; changes the process as the environment says.

SIGNAL_AT: it sends itself a signal at one point, so that no test waits for the point to hit it from outside.
"NUMBER import MODULE": as the import of a module begins; "NUMBER stderr TEXT": after a line that begins with TEXT.
ABSENT: names of packages, with commas between them, that are not installed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

for package in filter(None, os.environ.get("ABSENT", "").split(",")):
    sys.modules[package] = None  # type: ignore[assignment]  # find_spec and import find nothing

number, kind, value = os.environ.pop("SIGNAL_AT", "0 nowhere ").split(" ", 2)


class SignalAtImport(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == value:
            sys.meta_path.remove(self)
            signal.raise_signal(int(number))


class SignalAfterLine:
    """Standard error, until a line on it begins with the text."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._line = ""

    def write(self, text: str) -> int:
        written: int = self._stream.write(text)
        self._line += text
        while "\n" in self._line:
            line, _, self._line = self._line.partition("\n")
            if line.startswith(value):
                sys.stderr = self._stream
                signal.raise_signal(int(number))
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


if kind == "import":
    sys.meta_path.insert(0, SignalAtImport())
elif kind == "stderr":
    sys.stderr = SignalAfterLine(sys.stderr)
