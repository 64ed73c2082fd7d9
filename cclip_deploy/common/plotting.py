"""Colors and file output that all plots share; matplotlib is imported only when something is drawn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from cclip_deploy.common.files import whole_file
from cclip_deploy.environment.packages import require_packages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Hues of Okabe and Ito, which stay apart for readers who do not see all colors, and grays.
BLUE, VERMILION = "#0072B2", "#D55E00"
INK, QUIET, GRAY, LINE, GRID = "#16202A", "#5B6875", "#8A949E", "#C3C8CE", "#EEF1F3"


def require_matplotlib(what: str) -> None:
    """Raise EnvironmentIssue if matplotlib is missing; `what` needs it, and begins the message: "A plot"."""
    require_packages(what, ("matplotlib",), "train")


def save_figure(figure: Figure, path: Path, dpi: float | None = None) -> None:
    """Write a figure as PNG or SVG, by the suffix of `path`: completely or not at all, and the same bytes each time.

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
