"""A graph's manifest entry, from its file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cclip_deploy.bundle.manifest import TensorSpec
from cclip_deploy.graph.entry import graph_entry, save_graph


def product(inner: int = 3) -> onnx.ModelProto:
    """Rows (batch, 3) times a stored (inner, 5)."""
    return helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["rows", "weight"], ["out"])],
            "product",
            [helper.make_tensor_value_info("rows", TensorProto.FLOAT16, ["batch", 3])],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT16, ["batch", 5])],
            [numpy_helper.from_array(np.ones((inner, 5), np.float16), "weight")],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )


def test_entry_has_names_types_dimensions_hash_and_cost(tmp_path: Path) -> None:
    save_graph(product(), tmp_path / "product.onnx")
    entry = graph_entry(product(), "product.onnx", tmp_path, "0" * 64, "fp16")
    assert entry.inputs == (TensorSpec(name="rows", dtype="float16", shape=("batch", 3)),)
    assert entry.outputs == (TensorSpec(name="out", dtype="float16", shape=("batch", 5)),)
    assert entry.sha256 == hashlib.sha256((tmp_path / "product.onnx").read_bytes()).hexdigest()
    assert (entry.file, entry.made_from_sha256, entry.precision) == ("product.onnx", "0" * 64, "fp16")
    assert entry.multiply_adds == 15
    assert entry.dynamic()


def test_saved_graph_is_one_file_that_onnx_reads_back(tmp_path: Path) -> None:
    save_graph(product(), tmp_path / "product.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["product.onnx"]
    assert onnx.load(tmp_path / "product.onnx") == product()


def test_graph_with_contradicting_shapes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(onnx.shape_inference.InferenceError):
        save_graph(product(inner=4), tmp_path / "product.onnx")
