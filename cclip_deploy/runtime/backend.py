"""The protocol that everything which computes a bundle's graphs follows, and what all of them check of a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.manifest import GraphEntry, TensorSpec
from cclip_deploy.errors import BundleError, CclipError, EnvironmentIssue

_NO_MEMORY = ("allocate", "bad_alloc", "out of memory")

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


@runtime_checkable
class DeviceTensor(Protocol):
    """An output that stayed where it was computed, for the next graph; freed when the last reference to it goes."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def numpy(self) -> NDArray[np.float32]:
        """A copy in host memory."""
        ...

    def wait(self) -> None:
        """Until it is computed."""
        ...

    def close(self) -> None:
        """Free it now."""
        ...


TensorsOrArrays = Mapping[str, NDArray[np.generic] | DeviceTensor]


@runtime_checkable
class DeviceBackend(Protocol):
    """A backend with memory of its own: what one graph computes need not leave it before the next reads it."""

    def run_on_device(self, graph: str, inputs: TensorsOrArrays, names: Sequence[str]) -> dict[str, DeviceTensor]:
        """Compute one graph and keep these of its outputs; the others are dropped."""
        ...

    def run(self, graph: str, inputs: TensorsOrArrays) -> dict[str, NDArray[np.float32]]:
        """As `Backend.run`; inputs may be what `run_on_device` of the same backend gave."""
        ...


def check_tensors(path: Path, entry: GraphEntry, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> None:
    """Raise BundleError unless a graph takes and gives what the manifest says; dynamic sides may bear any name."""
    for what, have, told in (("inputs", inputs, entry.inputs), ("outputs", outputs, entry.outputs)):
        real, expected = ({t.name: (t.dtype, _sides(t.shape)) for t in tensors} for tensors in (have, told))
        if real != expected:
            raise BundleError(f"{path} has {what} {real}, the manifest says {expected}. Export the bundle again.")


def check_answer(path: Path, entry: GraphEntry, inputs: Arrays, outputs: Arrays) -> None:
    """Raise BundleError unless outputs have the shapes that the manifest says for these inputs."""
    sides: dict[str, int] = {}
    for tensor in entry.inputs:
        if tensor.name in inputs:
            pairs = zip(tensor.shape, inputs[tensor.name].shape, strict=False)
            sides |= {name: size for name, size in pairs if isinstance(name, str)}
    for tensor in entry.outputs:
        if tensor.name not in outputs:
            continue
        shape = outputs[tensor.name].shape
        expected = tuple(sides.get(side, side) if isinstance(side, str) else side for side in tensor.shape)
        if shape != expected:
            raise BundleError(f"{path} gave {tensor.name} of shape {shape}, not {expected}. Export the bundle again.")


def run_failure(runtime: str, path: Path, error: Exception) -> CclipError:
    """What a runtime raised while it ran a graph, as an error that names the graph."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Exception from" not in line]
    reason = " ".join(lines)[:300] or type(error).__name__
    if isinstance(error, MemoryError) or any(words in reason.lower() for words in _NO_MEMORY):
        return EnvironmentIssue(
            f"{runtime} has not enough memory to run {path}: {reason}. Use a smaller image, fewer prompts at once, or "
            "a machine with more memory."
        )
    return BundleError(f"{runtime} cannot run {path}: {reason}. Check it: cclip-deploy verify BUNDLE.")


def _sides(shape: Sequence[int | str]) -> list[int | str]:
    return [side if isinstance(side, int) else "?" for side in shape]
