"""Check the graphs of untrusted bundles before they are parsed or loaded. Needs neither onnx nor a runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path, PurePosixPath

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import GraphEntry
from cclip_deploy.errors import BundleError
from cclip_deploy.runtime.graph_sizes import tensor_shapes
from cclip_deploy.runtime.onnx_wire import Graph, GraphError, read_model
from cclip_deploy.runtime.shape_rules import RULES, Shape
from cclip_deploy.runtime.shared_weights import resolved

OPSETS = range(18, 23)
"""ONNX operator set versions of exported graphs, for which `shape_rules` is written."""
MOST_NODES = 20_000
ROWS = 16
"""Batch and prompt count for which tensor sizes are checked."""
ELEMENTS_PER_PIXEL = 16_384
"""Limit for all tensors of a graph together, for one image and prompt: three times that of an rn101 network."""
ELEMENTS_PER_ROW = 2**26
"""The same for tensors that do not grow with the image; the text tower of rn101 has a third of it."""
COPIES_OF_WEIGHTS = 4
MOST_LETTERS = 400
"""Length limit of messages, which quote names from the file."""


def read_checked(bundle: Bundle, entry: GraphEntry) -> bytes:
    """Return a bundle's graph with all its weights, after checking its checksum and structure.

    Raises:
        BundleError: the checksum is wrong, or `check_graph` raises.
    """
    path = bundle.path / entry.file

    def read(name: str, sha256: str) -> bytes:
        file = f"{PurePosixPath(entry.file).parent}/{name}"
        if file not in (graph.file for graph in bundle.manifest.graphs.values()):
            raise GraphError(f"its weights are in {name!r}, which is not a graph of the bundle")
        if bundle.sums.get(file) != sha256:
            raise GraphError(f"its weights are in another version of {name!r} than the bundle's")
        return bundle.read(file)

    with _explained(path):
        content = resolved(bundle.read(entry.file), read)
    check_graph(content, path, entry)
    return content


def check_graph(content: bytes, path: Path, entry: GraphEntry) -> None:
    """Raise BundleError unless a graph has the form of exported graphs. Linear in the length of `content`.

    Checks that all operators are known, that there are no functions, subgraphs or external weights, that every weight
    has the size of its shape, and that all tensors together, for `ROWS` images and prompts, stay below a multiple of
    the number of pixels. Does not check the run time (set `seconds_limit`), scratch memory, or sizes above `ROWS` rows.

    Args:
        content: an ONNX file.
        path: its name, for the message.
        entry: its entry in the manifest, which gives the shapes of the inputs.
    """
    with _explained(path):
        graph = read_model(content)
        _check_operators(graph)
        _check_sizes(graph, entry)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Convert GraphError to BundleError, which names the file."""
    try:
        yield
    except GraphError as error:
        reason = str(error)[:MOST_LETTERS]
        raise BundleError(
            f"{path} is not a graph that cclip-deploy exports: {reason}. It was not loaded. Export the bundle again."
        ) from error


def _check_operators(graph: Graph) -> None:
    if graph.opsets.get("") not in OPSETS:
        raise GraphError(
            f"it needs the operator sets {dict(graph.opsets)}, exports use {OPSETS[0]} to {OPSETS[-1]} of ''"
        )
    if len(graph.nodes) > MOST_NODES:
        raise GraphError(f"it has {len(graph.nodes)} nodes, more than {MOST_NODES}")
    for node in graph.nodes:
        if node.domain or node.op not in RULES:
            raise GraphError(
                f"node {node.name!r} has operator {node.op!r} of {node.domain!r}, which exports do not use"
            )


def _check_sizes(graph: Graph, entry: GraphEntry) -> None:
    inputs = {tensor.name: _bound(tensor.shape) for tensor in entry.inputs}
    if sorted(graph.inputs) != sorted(inputs):
        raise GraphError(f"it has inputs {list(graph.inputs)}, but the manifest has {list(inputs)}")
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
    """Return the number of pixels of one image; 0 for a graph without image input."""
    sides = {"image": slice(2, 4), "features": slice(1, 3)}  # (B, 3, H, W), (B, H, W, C)
    found = [_bound(tensor.shape)[sides[tensor.name]] for tensor in entry.inputs if tensor.name in sides]
    return max((prod(pair) for pair in found), default=0)
