"""The first node with NaN or overflow is named, except where FP32 is not finite either."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from cclip_deploy.errors import ParityError
from cclip_deploy.graph.precision.float16 import to_bf16, to_fp16
from cclip_deploy.parity.nan_check import first_non_finite, require_finite
from tests.graph.precision.test_float16 import make_model

NODES = [
    helper.make_node("MatMul", ["x", "w"], ["a"], name="fits"),
    helper.make_node("MatMul", ["a", "w"], ["b"], name="overflows"),
    helper.make_node("Sub", ["b", "b"], ["c"], name="nan_follows"),
    helper.make_node("Relu", ["c"], ["y"], name="last"),
]
WEIGHTS = {"w": np.full((4, 4), 100, np.float32)}
FEEDS = {"x": np.ones((4, 4), np.float32)}


def test_the_node_that_overflows_in_fp16_is_named_not_the_ones_behind_it() -> None:
    full = make_model(NODES, WEIGHTS, {"x": (4, 4)}, {"y": (4, 4)})
    half = to_fp16(full)
    with pytest.raises(ParityError, match=r"fp16 graph of net .* first at node 'overflows' \(MatMul\), output 'b'"):
        require_finite("net", half, full, "fp16", FEEDS)


def test_a_finite_graph_passes() -> None:
    full = make_model(NODES, WEIGHTS, {"x": (4, 4)}, {"y": (4, 4)})
    require_finite("net", to_fp16(full, fp32_nodes=["overflows", "nan_follows"]), full, "fp16", FEEDS)
    require_finite("net", to_bf16(full), full, "bf16", FEEDS)


def test_an_infinity_that_fp32_has_too_passes() -> None:
    nodes = [helper.make_node("Log", ["x"], ["a"], name="log"), helper.make_node("Exp", ["a"], ["b"], name="exp")]
    nodes += [
        helper.make_node("MatMul", ["b", "w"], ["c"], name="m"),
        helper.make_node("Sub", ["c", "c"], ["y"], name="n"),
    ]
    full = make_model(nodes, {"w": np.full((4, 4), 60000, np.float32)}, {"x": (4, 4)}, {"y": (4, 4)})
    feeds = {"x": np.eye(4, dtype=np.float32) * 10}
    assert "'m' (MatMul)" in first_non_finite(to_fp16(full), full, "fp16", feeds)
