"""Cache of calibration ranges between runs: one checksummed JSON file per calibration."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

from cclip_deploy.common.files import whole_file

FORMAT = 1


def read_entry(cache: Path, key: str, on_progress: Callable[[str], None]) -> dict[str, float] | None:
    """Return the cached ranges of a key; None if there is no entry, or an altered one, which is reported."""
    path = _path(cache, key)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        ranges = {str(name): float(value) for name, value in content["ranges"].items()}
        if content["sha256"] == _digest(key, ranges) and all(map(math.isfinite, ranges.values())):
            return ranges
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    on_progress(f"{path} was altered; calibrating again")
    return None


def write_entry(cache: Path, key: str, ranges: dict[str, float]) -> None:
    """Write the ranges of a key atomically; raise EnvironmentIssue if the folder cannot be written."""
    with whole_file(_path(cache, key)) as unfinished:
        unfinished.write_text(json.dumps({"sha256": _digest(key, ranges), "ranges": ranges}), encoding="utf-8")


def _path(cache: Path, key: str) -> Path:
    return cache / f"{key}.v{FORMAT}.json"


def _digest(key: str, ranges: dict[str, float]) -> str:
    return hashlib.sha256(json.dumps([key, ranges], sort_keys=True).encode()).hexdigest()
