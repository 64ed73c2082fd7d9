"""Find the residual sums of a graph, and which of their two inputs is the skip, by structure."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from cclip_deploy.graph.precision.onnx_graph import varying_tensors

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


def find_residual_skips(model: ModelProto, products: Collection[str]) -> tuple[tuple[str, int, str], ...]:
    """Return sum, input index of its skip, and product of its main branch, for each residual sum.

    A residual sum adds two activations of which a product computes at least one. The skip is the input with fewer
    products behind it (an identity, or the block's downsampling); if both have as many, the second. An Add of a product
    and a constant bias counts as part of the product.
    """
    varying = varying_tensors(model)
    depth: dict[str, int] = {}
    direct: dict[str, str] = {}
    skips = []
    for node in model.graph.node:
        behind = max((depth.get(name, 0) for name in node.input), default=0)
        depth.update(dict.fromkeys(node.output, behind + (node.name in products)))
        varies = [name in varying for name in node.input]
        producers = [direct[name] for name in node.input if name in direct]
        if node.name in products:
            direct[node.output[0]] = node.name
        elif node.op_type == "Add" and producers and all(varies):
            skip = _skip_of(node, direct, depth)
            skips.append((node.name, skip, direct[node.input[1 - skip]]))
        elif node.op_type == "Add" and producers:
            direct[node.output[0]] = producers[0]
    return tuple(skips)


def _skip_of(node: NodeProto, direct: Collection[str], depth: dict[str, int]) -> int:
    """Return the input that no product computes directly; of two computed by products, the one with fewer behind it."""
    first, second = node.input
    if (first in direct) != (second in direct):
        return 1 if first in direct else 0
    return 0 if depth[first] < depth[second] else 1
