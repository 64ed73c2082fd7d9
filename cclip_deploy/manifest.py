"""What a bundle says of itself: its manifest, entry by entry."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib import metadata
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from cclip_deploy.data.preprocess import Preprocessing
from cclip_deploy.precisions import Precision

SCHEMA_VERSION = 2
VERSIONED = ("cclip-deploy", "torch", "open_clip_torch", "onnx", "onnxscript", "onnxruntime", "numpy", "tokenizers")


def inside(path: str) -> str:
    """A path that stays inside the bundle; ValueError for any other."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path:
        raise ValueError(f"{path!r} leaves the bundle")
    return path


def _named(model: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(model.get("name"), str):
        raise ValueError("a model has a name")
    return model


RelativePath = Annotated[str, AfterValidator(inside)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(_Entry):
    """An input or output; a string in `shape` is a dynamic dimension's name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class CalibrationEntry(_Entry):
    """The calibration record that a quantised graph took its scales from."""

    file: RelativePath
    sha256: str


class GraphEntry(_Entry):
    """One ONNX graph, and the hash of what it was made from: the checkpoint, or the FP32 graph.

    `high_precision_nodes` are the products that a derived graph was asked to keep in a higher precision; None where
    that was not recorded.
    """

    file: RelativePath
    sha256: str
    made_from_sha256: str
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    multiply_adds: int
    calibration: CalibrationEntry | None = None
    high_precision_nodes: tuple[str, ...] | None = None

    def dynamic(self) -> bool:
        """Whether any input has a dynamic dimension."""
        return any(isinstance(side, str) for tensor in self.inputs for side in tensor.shape)


class EngineTarget(_Entry):
    """The GPUs of an engine: of these compute capabilities or, `and_later`, from the least on; of one name, if any."""

    compute_capabilities: tuple[str, ...]
    and_later: bool = False
    gpu: str | None = None


class EngineEntry(_Entry):
    """One built engine, the graph it was built from, and where its layer table lies.

    `timing_cache_sha256` is the cache that the build began with: the same one again may choose other kernels.
    """

    graph: str
    backend: str
    backend_version: str
    precision: Precision
    file: RelativePath
    sha256: str
    graph_sha256: str
    layers: RelativePath
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    target: str
    build_seconds: float
    runs_on: EngineTarget | None = None
    stripped: bool = False
    timing_cache_sha256: str | None = None


class CheckpointOrigin(_Entry):
    """The checkpoint that a bundle was exported from."""

    name: str
    sha256: str
    layout: Literal["ours", "published"]
    tensors_dropped: int


class Manifest(_Entry):
    """All that a bundle says of itself."""

    schema_version: int = SCHEMA_VERSION
    created: str
    command: str
    versions: dict[str, str]
    model: Annotated[dict[str, Any], AfterValidator(_named)]
    form: Literal["deploy", "plain"]
    image_hw: tuple[int, int]
    prompt_length: int
    threshold: float = 0.5
    preprocessing: Preprocessing
    checkpoint: CheckpointOrigin
    graphs: dict[str, GraphEntry]
    engines: tuple[EngineEntry, ...] = ()
    references: tuple[RelativePath, ...] = ()


def graph_key(graph: str, precision: str) -> str:
    """The manifest's name of a graph in a precision: `fused`, `fused.fp16`."""
    return graph if precision == "fp32" else f"{graph}.{precision}"


def installed_versions() -> dict[str, str]:
    """Versions of the packages that shape a bundle, of those installed."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def utc_now() -> str:
    """The time, to the second, as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
