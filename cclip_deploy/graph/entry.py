"""Write graphs to files and describe them as manifest entries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cclip_deploy.bundle.manifest import GraphEntry, TensorSpec
from cclip_deploy.common.files import sha256_file
from cclip_deploy.graph.cost import count_multiply_adds

if TYPE_CHECKING:
    import onnx


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Save a graph as one file and run onnx's checker on it, with shape inference."""
    import onnx

    onnx.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)


def graph_entry(graph: onnx.ModelProto, file: str, folder: Path, made_from_sha256: str, precision: str) -> GraphEntry:
    """Return the manifest entry of the graph in `folder / file`; its multiply-adds are for one image and prompt."""
    return GraphEntry(
        file=file,
        sha256=sha256_file(folder / file),
        made_from_sha256=made_from_sha256,
        precision=precision,  # type: ignore[arg-type]  # pydantic checks it
        inputs=_specs(graph.graph.input),
        outputs=_specs(graph.graph.output),
        multiply_adds=count_multiply_adds(graph, {"batch": 1, "prompts": 1}).total,
    )


def _specs(values: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    import onnx

    return tuple(
        TensorSpec(
            name=value.name,
            dtype=onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            shape=tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
        )
        for value in values
    )
