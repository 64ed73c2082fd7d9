"""docs/security.md has a row for every kind of input, and the tests that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "security.md"


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_every_row_is_whole_and_names_tests_that_exist() -> None:
    assert rows()
    for row in rows():
        assert len(row) == 4, row
        links = re.findall(r"\]\(([^)]+)\)", row[3])
        assert links, row
        for link in links:
            assert (PAGE.parent / link).resolve().is_file(), link


def test_every_file_of_attacks_has_a_row() -> None:
    named = {Path(link).name for row in rows() for link in re.findall(r"\]\(([^)]+)\)", row[3])}
    present = {path.name for path in Path(__file__).parent.glob("test_*.py")} - {Path(__file__).name}
    assert present <= named, present - named


def test_the_long_scripts_that_the_page_names_exist() -> None:
    modules = re.findall(r"python -m (tests\.attacks\.long\.\w+)", PAGE.read_text(encoding="utf-8"))
    assert len(modules) == 3
    for module in modules:
        assert (PAGE.parents[1] / f"{module.replace('.', '/')}.py").is_file(), module
