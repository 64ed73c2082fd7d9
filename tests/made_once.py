"""What every worker of a run needs, made by the first that asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The path of a file or folder called `name` that all workers share; `make` writes it. Copy it before changing it.

    Other workers wait while it is made. What `make` leaves when it fails is never taken for the whole.
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
