"""The structure checks accept every graph that this version exports."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import get_args

import onnx
import pytest
from onnx import shape_inference

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import GraphEntry
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.graph.precision.convert import InputsAndOutputs, convert_graph, product_names, tensors_to_calibrate
from cclip_deploy.runtime.graph_check import check_graph
from cclip_deploy.runtime.graph_model import load_model
from cclip_deploy.runtime.graph_sizes import tensor_shapes
from cclip_deploy.runtime.onnx_wire import read_model
from cclip_deploy.runtime.shape_rules import RULES

Made = tuple[str, onnx.ModelProto, GraphEntry]


@pytest.fixture(scope="module")
def made(tiny_bundle_path: Path, plain_bundle_path: Path) -> list[Made]:
    """Every graph of a deploy and of a plain export, and all that the precisions make of the former."""
    bundle = Bundle.open(tiny_bundle_path)
    return [*_graphs(Bundle.open(plain_bundle_path)), *_graphs(bundle), *_lowered(bundle)]


def _graphs(bundle: Bundle) -> Iterator[Made]:
    for name, entry in bundle.manifest.graphs.items():
        yield name, load_model(bundle, name), entry


def _lowered(bundle: Bundle) -> Iterator[Made]:
    for name, full, entry in _graphs(bundle):
        for precision in list(Precision)[1:]:
            ranges = dict.fromkeys(tensors_to_calibrate(full), 2.0) if precision.is_quantized else None
            if ranges != {}:
                for io in get_args(InputsAndOutputs):
                    keep = (named[-1],) if (named := sorted(product_names(full))) else ()
                    yield f"{name}.{precision}, {io}", convert_graph(full, precision, ranges, keep, io).model, entry


def test_every_graph_that_is_made_passes(made: list[Made]) -> None:
    for name, model, entry in made:
        check_graph(model.SerializeToString(), Path(name), entry)


def test_the_allowed_operators_are_those_of_the_graphs_that_are_made(made: list[Made]) -> None:
    """Red where an export gains an operator, which needs a rule in shape_rules.py, or loses its last use of one.

    `Sub` is in the graphs of --with-confounding alone, whose export would take another four seconds.
    """
    assert {node.op_type for _, model, _ in made for node in model.graph.node} | {"Sub"} == set(RULES)
    assert list(RULES) == sorted(RULES)


@pytest.mark.parametrize("rows", [1, 5])
def test_shapes_match_onnx_shape_inference(made: list[Made], rows: int) -> None:
    compared = 0
    for name, model, _ in made:
        bound = onnx.ModelProto()
        bound.CopyFrom(model)
        del bound.graph.value_info[:]
        for value in bound.graph.output:
            value.type.tensor_type.ClearField("shape")
        for dim in (dim for value in bound.graph.input for dim in value.type.tensor_type.shape.dim if dim.dim_param):
            dim.dim_value = rows
        inferred = shape_inference.infer_shapes(bound, strict_mode=True, data_prop=True).graph
        inputs = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in bound.graph.input}
        found = tensor_shapes(read_model(model.SerializeToString()), inputs)
        expected = {
            value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
            for value in (*inferred.value_info, *inferred.output)
        }
        assert {tensor: found[tensor] for tensor in expected} == expected, name
        assert found.keys() == expected.keys() | inputs.keys() | {tensor.name for tensor in model.graph.initializer}
        compared += sum(prod(shape) > 1 for shape in expected.values())
    assert compared > 2000
