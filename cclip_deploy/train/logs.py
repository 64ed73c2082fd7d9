"""TensorBoard logs and the run record `run.json`, which is rewritten after every epoch."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.common.files import whole_file
from cclip_deploy.common.json_file import json_text
from cclip_deploy.errors import EnvironmentIssue

LOG_FOLDER, RECORD = "logs", "run.json"
PYRAMID_LEVELS = (3, 4, 5)


class TrainLog:
    """TensorBoard writer; does nothing if not `enabled`."""

    def __init__(self, folder: Path, step: int, enabled: bool) -> None:
        self._writer = None
        if not enabled:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise EnvironmentIssue("Logs need TensorBoard. Install it: pip install 'cclip-deploy[train]'") from error
        # Steps after the resumed one are repeated; purge_step hides their first run.
        self._writer = SummaryWriter(str(folder / LOG_FOLDER), purge_step=step or None)

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        """Log values by name, such as "loss/causal"."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def add_image(self, name: str, image: NDArray[np.float32], step: int) -> None:
        """Log an image, (3, H, W) in [0, 1]."""
        if self._writer is not None:
            self._writer.add_image(name, image, step)

    @property
    def enabled(self) -> bool:
        """Whether anything is written."""
        return self._writer is not None


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write run.json atomically."""
    with whole_file(folder / RECORD) as unfinished:
        unfinished.write_text(json_text(record), encoding="utf-8")
