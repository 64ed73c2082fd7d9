"""The protocol that everything which computes a bundle's graphs follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.generic]]


class Backend(Protocol):
    """Runs graphs by name, on arrays by name; inputs and outputs are those of the bundle's manifest."""

    name: str
    precision: str

    def run(self, graph: str, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        """Compute one graph; loads it at the first call."""
        ...

    def load(self, graph: str) -> None:
        """Load a graph now, so that the first run pays nothing for it."""
        ...

    def unload(self, graph: str) -> None:
        """Free what a graph takes; the next run loads it again. Nothing happens where it is not loaded."""
        ...
