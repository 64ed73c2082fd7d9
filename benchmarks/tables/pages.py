"""Pages with rendered tables."""

from __future__ import annotations

from benchmarks.tables import causal_evidence, evaluation, performance, precision, readme

PAGES = (readme.PAGE, causal_evidence.PAGE, evaluation.PAGE, performance.PAGE, precision.PAGE)
