"""What a training tells while it runs: TensorBoard logs, and run.json, which is written anew after every epoch."""

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
    """TensorBoard's event files; one that is not `kept` writes nothing."""

    def __init__(self, folder: Path, step: int, kept: bool) -> None:
        self._writer = None
        if not kept:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise EnvironmentIssue("Logs need TensorBoard. Install it: pip install 'cclip-deploy[train]'") from error
        # Steps after the one that training goes on from were lost; TensorBoard is not to show them twice.
        self._writer = SummaryWriter(str(folder / LOG_FOLDER), purge_step=step or None)

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def tell(self, values: dict[str, float], step: int) -> None:
        """Numbers by name, as "loss/causal"."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def show(self, name: str, picture: NDArray[np.float32], step: int) -> None:
        """A picture (3, H, W) in [0, 1]."""
        if self._writer is not None:
            self._writer.add_image(name, picture, step)

    @property
    def kept(self) -> bool:
        """Whether anything is written."""
        return self._writer is not None


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """run.json, whole or not at all."""
    with whole_file(folder / RECORD) as unfinished:
        unfinished.write_text(json_text(record), encoding="utf-8")
