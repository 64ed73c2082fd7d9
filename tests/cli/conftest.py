"""Fixtures of the command-line tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cclip_deploy.cli import entry
from tests.ctrl_c import handled_by


@pytest.fixture
def own_handlers() -> Iterator[None]:
    """Install the signal handlers of the program in this process."""
    with handled_by(entry.receive):
        yield
    entry.received.clear()
