"""The troubleshooting page names every error class with its exit code, and quotes messages that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from cclip_deploy import errors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^\| `(.*?)` \|", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def constants() -> str:
    """Return all text constants of the package, one per line."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "cclip_deploy").rglob("*.py"))
    nodes = (node for tree in trees for node in ast.walk(tree))
    return "\n".join(n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_exists(message: str, constants: str) -> None:
    parts = [part.strip() for part in re.split("…", message) if part.strip(" .,;:()")]
    assert parts
    for part in parts:
        assert part in constants, part


def test_many_messages_are_quoted() -> None:
    assert len(QUOTED) > 25


def test_every_error_class_is_under_its_exit_code() -> None:
    sections = dict(re.findall(r"^## [^\n]*exit code (\d)([^#]*(?:#(?!# )[^#]*)*)", PAGE, re.MULTILINE))
    classes = [c for c in vars(errors).values() if isinstance(c, type) and c.__module__ == errors.__name__]
    for error in classes:
        if error is not errors.CclipError:
            assert f"`{error.__name__}`" in sections[str(error.exit_code)], error.__name__
