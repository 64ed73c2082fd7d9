"""Shared by the tests of the command line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cclip_deploy.cli import entry
from tests.ctrl_c import handled_by


@pytest.fixture
def own_handlers() -> Iterator[None]:
    """Signals are handled in this process as in the installed program."""
    with handled_by(entry.receive):
        yield
    entry.received.clear()
