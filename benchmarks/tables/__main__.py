"""Rewrite every table of README.md and docs/ from docs/measurements, or compare them."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.tables.pages import PAGES
from benchmarks.tables.sources import Measurements

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 and name what differs")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository, with README.md and docs/")
    arguments = parser.parse_args()

    measurements, stale = Measurements(arguments.root / "docs" / "measurements"), 0
    for page in PAGES:
        path = arguments.root / page.path
        text = path.read_text(encoding="utf-8")
        names = page.differences(text, measurements)
        stale += len(names)
        for name in names:
            print(f"{page.path}: {name} {'differs from docs/measurements' if arguments.check else 'rewritten'}")
        if names and not arguments.check:
            path.write_text(page.render(text, measurements), encoding="utf-8")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
