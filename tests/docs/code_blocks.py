"""Commands in the code blocks of README and docs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "benchmarks/*.md", "engines/*.md", "export/*.md", "training/*.md")


def commands(page: str) -> Iterator[list[str]]:
    """Yield the arguments of each `cclip-deploy` and `python` command in a page, in order, without comments."""
    in_fence = False
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        in_fence ^= line.lstrip().startswith("```")
        if (in_fence or line.startswith("    ")) and re.match(r"\s*(cclip-deploy|python) ", line):
            command = ""
            for part in shlex.split(line, comments=True, posix=True):
                if part == "&&":
                    break
                command += f" {shlex.quote(part)}"
            yield shlex.split(command)


def all_commands() -> list[tuple[str, list[str]]]:
    """Return (page, arguments) of every command."""
    pages = sorted(path.relative_to(ROOT).as_posix() for pattern in PAGES for path in ROOT.glob(pattern))
    return [(page, arguments) for page in pages for arguments in commands(page)]
