"""Check a bundle's graph before a runtime or parser gets it. Needs neither onnx nor any runtime."""

from __future__ import annotations

from math import prod
from pathlib import Path

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import GraphEntry
from cclip_deploy.errors import BundleError
from cclip_deploy.runtime.graph_sizes import tensor_shapes
from cclip_deploy.runtime.onnx_wire import Graph, GraphError, read_model
from cclip_deploy.runtime.shape_rules import RULES, Shape

OPSETS = range(18, 23)
"""Versions of the standard operators that exports are written in; the rules for shapes are those of these."""
MOST_NODES = 20_000
ROWS = 16
"""Images and prompts at once, for which sizes are checked."""
ELEMENTS_PER_PIXEL = 16_384
"""Of all tensors of a graph together, for one image and prompt: three times what an rn101 network has."""
ELEMENTS_PER_ROW = 2**26
"""The same of what does not grow with the image; rn101's text tower has a third of it."""
COPIES_OF_WEIGHTS = 4
MOST_LETTERS = 400
"""Of a message, as it quotes names from the file."""


def read_checked(bundle: Bundle, entry: GraphEntry) -> bytes:
    """The content of a bundle's graph, its checksum verified and its structure checked.

    Raises:
        BundleError: as `check_graph` does, or the file is not the one that SHA256SUMS names.
    """
    content = bundle.read(entry.file)
    check_graph(content, bundle.path / entry.file, entry)
    return content


def check_graph(content: bytes, path: Path, entry: GraphEntry) -> None:
    """Refuse a graph that is not made as exports make theirs.

    Checked are the operators, that there are no functions, subgraphs or weights in another file, that every weight has
    as many bytes as its shape needs, and the size of all tensors together for `ROWS` images and prompts at once, which
    may be no more than a multiple of the image's pixels. Linear in the length of `content`.

    Not checked: how long a graph takes (a product of matrices within the size may still be slow: set `seconds_limit`),
    how much scratch memory a runtime needs beside the tensors, and sizes for more than `ROWS` rows.

    Args:
        content: an ONNX file.
        path: its name, for the message.
        entry: its entry in the manifest, whose inputs name the shapes.

    Raises:
        BundleError: something of this does not hold; the message says what.
    """
    try:
        graph = read_model(content)
        _check_operators(graph)
        _check_sizes(graph, entry)
    except GraphError as error:
        reason = str(error)[:MOST_LETTERS]
        raise BundleError(
            f"{path} is no graph that cclip-deploy exports: {reason}. It was not loaded. Export the bundle again."
        ) from error


def _check_operators(graph: Graph) -> None:
    if graph.opsets.get("") not in OPSETS:
        raise GraphError(f"it needs the operators {dict(graph.opsets)}, exports use {OPSETS[0]} to {OPSETS[-1]} of ''")
    if len(graph.nodes) > MOST_NODES:
        raise GraphError(f"it has {len(graph.nodes)} nodes, more than {MOST_NODES}")
    for node in graph.nodes:
        if node.domain or node.op not in RULES:
            raise GraphError(f"node {node.name!r} is the operator {node.op!r} of {node.domain!r}, which no export has")


def _check_sizes(graph: Graph, entry: GraphEntry) -> None:
    inputs = {tensor.name: _bound(tensor.shape) for tensor in entry.inputs}
    if sorted(graph.inputs) != sorted(inputs):
        raise GraphError(f"it has inputs {list(graph.inputs)}, the manifest says {list(inputs)}")
    shapes = tensor_shapes(graph, inputs)
    weights = {tensor.name for tensor in graph.initializers}
    sizes = {name: prod(shape) for name, shape in shapes.items() if name not in weights}
    most = ROWS * (ELEMENTS_PER_PIXEL * _pixels(entry) + ELEMENTS_PER_ROW)
    most += COPIES_OF_WEIGHTS * sum(prod(shapes[name]) for name in weights)
    if sum(sizes.values()) > most:
        largest = max(sizes, key=lambda name: sizes[name])
        raise GraphError(
            f"its tensors have {sum(sizes.values())} elements for {ROWS} images and prompts, more than {most}; the "
            f"largest is {largest!r} of shape {shapes[largest]}"
        )


def _bound(shape: tuple[int | str, ...]) -> Shape:
    return tuple(ROWS if isinstance(side, str) else side for side in shape)


def _pixels(entry: GraphEntry) -> int:
    """Of one image; 0 for a graph that takes none."""
    sides = {"image": slice(2, 4), "features": slice(1, 3)}  # (B, 3, H, W), (B, H, W, C)
    found = [_bound(tensor.shape)[sides[tensor.name]] for tensor in entry.inputs if tensor.name in sides]
    return max((prod(pair) for pair in found), default=0)
