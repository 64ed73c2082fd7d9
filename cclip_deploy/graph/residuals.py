"""Residual sums of a graph and which of their two branches is the skip, found by structure."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from cclip_deploy.graph.flat import varying_tensors

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


def find_residual_skips(model: ModelProto, products: Collection[str]) -> tuple[tuple[str, int], ...]:
    """Node name and input index of the skip of each sum of two activations, one of which a named product gives.

    The skip is the branch with fewer products behind it (an identity, or the block's downsampling); of two alike the
    second. A product's own bias, added as a node of its own, belongs to the product.
    """
    varying = varying_tensors(model)
    depth: dict[str, int] = {}
    direct: set[str] = set()
    skips = []
    for node in model.graph.node:
        behind = max((depth.get(name, 0) for name in node.input), default=0)
        depth.update(dict.fromkeys(node.output, behind + (node.name in products)))
        varies = [name in varying for name in node.input]
        is_bias = node.op_type == "Add" and sum(varies) == 1 and not direct.isdisjoint(node.input)
        if node.name in products or is_bias:
            direct.update(node.output)
        elif node.op_type == "Add" and all(varies) and not direct.isdisjoint(node.input):
            skips.append((node.name, _skip_of(node, direct, depth)))
    return tuple(skips)


def _skip_of(node: NodeProto, direct: Collection[str], depth: dict[str, int]) -> int:
    """The branch that no product gives directly; where both are given so, the shallower."""
    first, second = node.input
    if (first in direct) != (second in direct):
        return 1 if first in direct else 0
    return 0 if depth[first] < depth[second] else 1
