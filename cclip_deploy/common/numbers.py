"""Format numbers for tables and messages."""

from __future__ import annotations


def si(count: float, unit: str = "") -> str:
    """Format a number with three digits and an SI prefix: 21.4 G, 85.3 M."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.3g} {prefix}{unit}"
    return f"{count:.3g} {unit}".strip()
