"""Shared colors and file output of plots; matplotlib is imported on first use."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from cclip_deploy.common.files import whole_file
from cclip_deploy.environment.packages import require_packages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Two colors of the Okabe-Ito palette, which is safe for color-blind readers, and grays.
BLUE, VERMILION = "#0072B2", "#D55E00"
INK, QUIET, GRAY, LINE, GRID = "#16202A", "#5B6875", "#8A949E", "#C3C8CE", "#EEF1F3"


def require_matplotlib(what: str) -> None:
    """Raise EnvironmentIssue if matplotlib is missing; the message starts with `what`, such as "A plot"."""
    require_packages(what, ("matplotlib",), "evaluate")


def save_figure(figure: Figure, path: Path, dpi: float | None = None) -> None:
    """Write a figure as PNG or SVG, by the suffix of `path`, atomically and with reproducible bytes.

    Raises:
        EnvironmentIssue: the disk is full or `path` cannot be written.
    """
    content = encode_figure(figure, path.suffix.removeprefix("."), dpi)
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content)


def encode_figure(figure: Figure, file_format: str, dpi: float | None = None) -> bytes:
    """Encode a figure as "png" or "svg" without a date or the version of matplotlib."""
    from matplotlib import rc_context

    metadata = {"Date": None} if file_format == "svg" else {"Software": None}
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "cclip-deploy", "svg.fonttype": "path"}):
        figure.savefig(file, format=file_format, dpi=dpi or "figure", metadata=metadata)
    return file.getvalue()
