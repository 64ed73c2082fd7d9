"""Backend protocol, and checks that all backends share."""

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
    """Runs graphs. Names, shapes and types of inputs and outputs are those of the bundle's manifest."""

    name: str
    precision: str

    def run(self, graph: str, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        """Run a graph; it is loaded on the first call."""
        ...

    def load(self, graph: str) -> None:
        """Load a graph, so that its first run is not slower than the others."""
        ...

    def unload(self, graph: str) -> None:
        """Free the memory of a graph, if it is loaded; the next run loads it again."""
        ...


@runtime_checkable
class DeviceTensor(Protocol):
    """An output in device memory that can be the input of another graph; freed with its last reference."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def numpy(self) -> NDArray[np.float32]:
        """Return a copy in host memory."""
        ...

    def wait(self) -> None:
        """Wait until it is computed."""
        ...

    def close(self) -> None:
        """Free it now."""
        ...


TensorsOrArrays = Mapping[str, NDArray[np.generic] | DeviceTensor]


@runtime_checkable
class DeviceBackend(Protocol):
    """A backend with device memory, where outputs can stay between two graphs."""

    def run_on_device(self, graph: str, inputs: TensorsOrArrays, names: Sequence[str]) -> dict[str, DeviceTensor]:
        """Run a graph and return the named outputs in device memory."""
        ...

    def run(self, graph: str, inputs: TensorsOrArrays) -> dict[str, NDArray[np.float32]]:
        """Like `Backend.run`; inputs may also be outputs of `run_on_device` of the same backend."""
        ...


def check_tensors(path: Path, entry: GraphEntry, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> None:
    """Raise BundleError unless inputs and outputs match the manifest; dynamic dimensions may have any name."""
    for what, found, listed in (("inputs", inputs, entry.inputs), ("outputs", outputs, entry.outputs)):
        real, expected = ({t.name: (t.dtype, _sides(t.shape)) for t in tensors} for tensors in (found, listed))
        if real != expected:
            raise BundleError(f"{path} has {what} {real}, but the manifest has {expected}. Export the bundle again.")


def check_answer(path: Path, entry: GraphEntry, inputs: Arrays, outputs: Arrays) -> None:
    """Raise BundleError unless outputs have the shapes that the manifest gives for these inputs."""
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
    """Convert an exception of a runtime into an error that names the graph."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Exception from" not in line]
    reason = " ".join(lines)[:300] or type(error).__name__
    if isinstance(error, MemoryError) or any(words in reason.lower() for words in _NO_MEMORY):
        return EnvironmentIssue(
            f"{runtime} ran out of memory while running {path}: {reason}. Use a smaller image, fewer prompts at once, "
            "or a machine with more memory."
        )
    return BundleError(f"{runtime} cannot run {path}: {reason}. Check it: cclip-deploy verify BUNDLE.")


def _sides(shape: Sequence[int | str]) -> list[int | str]:
    return [side if isinstance(side, int) else "?" for side in shape]
