"""Residual sums of a graph and which of their two branches is the skip, found by structure."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from cclip_deploy.graph.precision.onnx_graph import varying_tensors

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


def find_residual_skips(model: ModelProto, products: Collection[str]) -> tuple[tuple[str, int, str], ...]:
    """Sum, input index of its skip and main branch's product, for each sum of two activations, one given by a product.

    The skip is the branch with fewer products behind it (an identity, or the block's downsampling); of two alike the
    second. A product's own bias, added as a node of its own, belongs to the product.
    """
    varying = varying_tensors(model)
    depth: dict[str, int] = {}
    direct: dict[str, str] = {}
    skips = []
    for node in model.graph.node:
        behind = max((depth.get(name, 0) for name in node.input), default=0)
        depth.update(dict.fromkeys(node.output, behind + (node.name in products)))
        varies = [name in varying for name in node.input]
        given_by = [direct[name] for name in node.input if name in direct]
        if node.name in products:
            direct[node.output[0]] = node.name
        elif node.op_type == "Add" and given_by and all(varies):
            skip = _skip_of(node, direct, depth)
            skips.append((node.name, skip, direct[node.input[1 - skip]]))
        elif node.op_type == "Add" and given_by:
            direct[node.output[0]] = given_by[0]
    return tuple(skips)


def _skip_of(node: NodeProto, direct: Collection[str], depth: dict[str, int]) -> int:
    """The branch that no product gives directly; where both are given so, the shallower."""
    first, second = node.input
    if (first in direct) != (second in direct):
        return 1 if first in direct else 0
    return 0 if depth[first] < depth[second] else 1
