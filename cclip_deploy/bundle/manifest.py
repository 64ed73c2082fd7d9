"""The manifest of a bundle, `manifest.json`."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib import metadata
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints

from cclip_deploy.bundle.precision import Precision
from cclip_deploy.common.toml_file import StrictModel
from cclip_deploy.imaging.preprocess import Preprocessing

SCHEMA_VERSION = 2
MOST_REFERENCES = 64
LARGEST_SIDE, LONGEST_PROMPT = 16_384, 77
MOST_SIDES, MOST_TENSORS = 8, 16
VERSIONED = ("cclip-deploy", "torch", "open_clip_torch", "onnx", "onnxscript", "onnxruntime", "numpy", "tokenizers")


def inside(path: str) -> str:
    """Return a relative path inside the bundle; raise ValueError for any other."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path:
        raise ValueError(f"{path!r} is outside the bundle")
    if PurePosixPath(path).as_posix() != path or not path.isprintable():
        raise ValueError(f"{path!r} is not of the form folder/file")
    return path


def _named(model: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(model.get("name"), str):
        raise ValueError("the model has no name")
    return model


def _small(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    for tensor in tensors:
        sizes = [side for side in tensor.shape if isinstance(side, int)]
        if len(tensor.shape) > MOST_SIDES or any(not 0 < size < 2**31 for size in sizes):
            raise ValueError(f"{tensor.name} has an invalid shape: {str(tensor.shape)[:80]}")
    return tensors


RelativePath = Annotated[str, AfterValidator(inside), StringConstraints(max_length=1024)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(max_length=256)]
Text = Annotated[str, StringConstraints(max_length=2**18)]
Side = Annotated[int, Field(gt=0, le=LARGEST_SIDE)]


class TensorSpec(StrictModel):
    """An input or output of a graph. A string in `shape` names a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


Tensors = Annotated[tuple[TensorSpec, ...], Field(max_length=MOST_TENSORS), AfterValidator(_small)]


class CalibrationEntry(StrictModel):
    """The calibration record of a quantized graph."""

    file: RelativePath
    sha256: Sha256


class GraphEntry(StrictModel):
    """An ONNX graph.

    Attributes:
        made_from_sha256: hash of its source: the checkpoint, or the FP32 graph for a lower precision.
        multiply_adds: for one image and one prompt.
        high_precision_nodes: products that were kept in a higher precision on request; None if that was not recorded.
    """

    file: RelativePath
    sha256: Sha256
    made_from_sha256: Sha256
    precision: Precision
    inputs: Tensors
    outputs: Tensors
    multiply_adds: Annotated[int, Field(ge=0)]
    calibration: CalibrationEntry | None = None
    high_precision_nodes: Annotated[tuple[Name, ...], Field(max_length=10_000)] | None = None

    def dynamic(self) -> bool:
        """Whether any input has a dynamic dimension."""
        return any(isinstance(side, str) for tensor in self.inputs for side in tensor.shape)


Shape = Annotated[tuple[int, ...], Field(max_length=MOST_SIDES)]


class EngineTarget(StrictModel):
    """The GPUs that an engine runs on: their compute capabilities (with `and_later`, also newer ones) and name."""

    compute_capabilities: Annotated[tuple[Name, ...], Field(max_length=32)]
    and_later: bool = False
    gpu: Name | None = None


class EngineEntry(StrictModel):
    """A built engine.

    Attributes:
        graph_sha256: hash of the graph that it was built from.
        layers: file of its layer table.
        shapes: smallest, best and largest shape of each input.
        stripped: whether the weights were left out, so that it has to be refitted from the graph.
        timing_cache_sha256: hash of the timing cache that the build started with.
    """

    graph: Name
    backend: Name
    backend_version: Name
    precision: Precision
    file: RelativePath
    sha256: Sha256
    graph_sha256: Sha256
    layers: RelativePath
    shapes: Annotated[dict[Name, tuple[Shape, Shape, Shape]], Field(max_length=MOST_TENSORS)]
    target: Name
    build_seconds: float
    runs_on: EngineTarget | None = None
    stripped: bool = False
    timing_cache_sha256: Sha256 | None = None


class CheckpointOrigin(StrictModel):
    """The checkpoint that a bundle was exported from."""

    name: Name
    sha256: Sha256
    layout: Literal["ours", "published"]
    tensors_dropped: int


class Manifest(StrictModel):
    """The content of `manifest.json`."""

    schema_version: int = SCHEMA_VERSION
    created: Name
    command: Text
    versions: Annotated[dict[Name, Name], Field(max_length=64)]
    model: Annotated[dict[Name, Any], Field(max_length=64), AfterValidator(_named)]
    form: Literal["deploy", "plain"]
    image_hw: tuple[Side, Side]
    prompt_length: Annotated[int, Field(gt=0, le=LONGEST_PROMPT)]
    threshold: float = 0.5
    preprocessing: Preprocessing
    checkpoint: CheckpointOrigin
    graphs: Annotated[dict[Name, GraphEntry], Field(max_length=64)]
    engines: Annotated[tuple[EngineEntry, ...], Field(max_length=256)] = ()
    references: Annotated[tuple[RelativePath, ...], Field(max_length=MOST_REFERENCES)] = ()


def graph_key(graph: str, precision: str) -> str:
    """Return the manifest's key of a graph in a precision: `fused`, `fused.fp16`."""
    return graph if precision == "fp32" else f"{graph}.{precision}"


def installed_versions() -> dict[str, str]:
    """Return the versions of the installed packages that affect a bundle."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def utc_now() -> str:
    """Return the current time in UTC as ISO 8601, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")
