"""Files shared by all pytest-xdist workers, built by the first worker that needs them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the path of a file or folder that all workers share; `make` writes it once. Copy it before changing it.

    Other workers wait while it is built. If `make` fails, its partial output is not used.
    """
    own = factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "made-once"
    shared.mkdir(exist_ok=True)
    path = shared / name
    with FileLock(shared / f"{name}.lock"):
        if not path.exists():
            making = factory.mktemp("making") / name
            make(making)
            making.rename(path)
    return path
