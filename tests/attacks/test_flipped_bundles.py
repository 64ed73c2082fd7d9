"""Short run of tests/attacks/long/flip_bundle.py, which flips thousands of bytes of a bundle."""

from __future__ import annotations

from pathlib import Path

from tests.attacks.long.flip_bundle import flip_bundle


def test_flipped_bytes_are_refused_or_change_nothing(tiny_bundle_path: Path) -> None:
    """Before: a RecursionError, tracebacks of runtimes and of tokenizers, and graphs that were loaded all the same."""
    summary = flip_bundle(tiny_bundle_path, 120, seed=7)
    assert summary.failures == []
    assert sum(summary.outcomes.values()) == 120
    refused = sum(count for outcome, count in summary.outcomes.items() if outcome.endswith("refused"))
    assert 80 < refused < 120  # the flips are seen, and some do no harm
