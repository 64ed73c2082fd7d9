"""Optional packages and the extras that install them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from cclip_deploy.errors import EnvironmentIssue


def require_packages(what: str, packages: Sequence[str], extra: str, note: str = "") -> None:
    """Check that packages are installed, without importing them.

    Args:
        what: who needs them, the beginning of the message: "Training".
        packages: names as they are imported.
        extra: of cclip-deploy, which installs them.
        note: a further sentence of the message.

    Raises:
        EnvironmentIssue: some are missing; the message names them and the command that installs them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        message = f"{what} needs {', '.join(missing)}. Install: pip install 'cclip-deploy[{extra}]'. {note}"
        raise EnvironmentIssue(message.rstrip())


def require_export_packages() -> None:
    """EnvironmentIssue that names the extra, where torch, open_clip or onnx is missing."""
    note = "A bundle that is exported already runs without them."
    require_packages("This", ("torch", "open_clip", "onnx", "onnxscript"), "export", note)


def require_training_packages() -> None:
    """EnvironmentIssue that names the extra, where a package for training is missing."""
    require_packages("Training", ("torch", "open_clip", "safetensors", "lightning", "monai"), "train")
