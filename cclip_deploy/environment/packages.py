"""Checks for optional packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from cclip_deploy.errors import EnvironmentIssue


def require_packages(what: str, packages: Sequence[str], extra: str, note: str = "") -> None:
    """Check that packages are installed, without importing them.

    Args:
        what: feature that needs them, the start of the message, such as "Training".
        packages: import names.
        extra: extra of cclip-deploy that installs them.
        note: additional sentence of the message.

    Raises:
        EnvironmentIssue: some are missing; the message names them and the command that installs them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        message = f"{what} needs {', '.join(missing)}. Install: pip install 'cclip-deploy[{extra}]'. {note}"
        raise EnvironmentIssue(message.rstrip())


def require_export_packages() -> None:
    """Raise EnvironmentIssue if a package that export needs is missing."""
    note = "An exported bundle runs without them."
    require_packages("This", ("torch", "open_clip", "onnx", "onnxscript"), "export", note)


def require_training_packages() -> None:
    """Raise EnvironmentIssue if a package that training needs is missing."""
    require_packages("Training", ("torch", "open_clip", "safetensors", "lightning", "monai"), "train")
