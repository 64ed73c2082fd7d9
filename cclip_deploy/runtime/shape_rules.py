"""Shape rules of the operators of exported graphs: output shape from input shapes and attributes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import floor, prod

from cclip_deploy.runtime.onnx_wire import Attribute, GraphError, Node

Shape = tuple[int, ...]

MOST_VALUES = 64
"""Size limit of constants whose values determine shapes."""


@dataclass(frozen=True)
class Known:
    """The shape of a tensor and, for a small constant, its values."""

    shape: Shape
    values: tuple[int, ...] | tuple[float, ...] | None = None

    @property
    def integers(self) -> tuple[int, ...]:
        """The values of an integer constant; raises GraphError if they are not known."""
        if self.values is None:
            raise GraphError("a shape depends on data")
        return tuple(int(value) for value in self.values)


@dataclass(frozen=True)
class Call:
    """A node and the shapes of its inputs."""

    node: Node
    inputs: tuple[Known | None, ...]

    def shape(self, index: int = 0) -> Shape:
        return self._given(index).shape

    def integers(self, index: int) -> tuple[int, ...]:
        return self._given(index).integers

    def has(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] is not None

    def attribute(self, name: str, default: Attribute) -> Attribute:
        return self.node.attributes.get(name, default)

    def number(self, name: str, default: int = 0) -> int:
        value = self.attribute(name, default)
        return value if isinstance(value, int) else default

    def numbers(self, name: str, default: Sequence[int]) -> tuple[int, ...]:
        value = self.attribute(name, tuple(default))
        return value if isinstance(value, tuple) else tuple(default)

    def _given(self, index: int) -> Known:
        given = self.inputs[index] if index < len(self.inputs) else None
        if given is None:
            raise GraphError(f"input {index} is missing")
        return given


def _same(call: Call) -> Shape:
    return call.shape()


def _broadcast(*shapes: Shape) -> Shape:
    sides = []
    for meeting in zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1):
        others = set(meeting) - {1}
        if len(others) > 1:
            raise GraphError("sides do not fit")
        sides.append(others.pop() if others else 1)
    return tuple(reversed(sides))


def _pointwise(call: Call) -> Shape:
    return _broadcast(*(call.shape(index) for index in range(len(call.inputs))))


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise GraphError(f"axis {axis} of {rank}")
    return axis % rank


def _matmul(call: Call) -> Shape:
    left, right = call.shape(0), call.shape(1)
    if min(len(left), len(right)) < 2 or left[-1] != right[-2]:
        raise GraphError("sides do not fit")
    return (*_broadcast(left[:-2], right[:-2]), left[-2], right[-1])


def _gemm(call: Call) -> Shape:
    left, right = call.shape(0), call.shape(1)
    rows = left[1] if call.number("transA") else left[0]
    return rows, right[0] if call.number("transB") else right[1]


def _window(call: Call, kernel: Sequence[int], channels: int) -> Shape:
    """Return the output shape of a convolution or pooling, (N, channels, *sides)."""
    if call.attribute("auto_pad", b"NOTSET") != b"NOTSET":
        raise GraphError("its padding is automatic")
    batch, _, *sides = call.shape()
    ones = [1] * len(sides)
    pads = call.numbers("pads", [0] * 2 * len(sides))
    found = []
    steps = zip(
        sides, kernel, call.numbers("strides", ones), call.numbers("dilations", ones), pads[: len(sides)],
        pads[len(sides) :], strict=True,
    )  # fmt: skip
    for side, size, stride, dilation, before, after in steps:
        if stride < 1 or dilation < 1 or size < 1:
            raise GraphError("a stride, dilation or kernel is below 1")
        room = side + before + after - dilation * (size - 1) - 1
        found.append((-(-room // stride) if call.number("ceil_mode") else room // stride) + 1)
    return (batch, channels, *found)


def _convolution(call: Call) -> Shape:
    weight = call.shape(1)  # (M, C / groups, *kernel)
    return _window(call, weight[2:], weight[0])


def _pool(call: Call) -> Shape:
    return _window(call, call.numbers("kernel_shape", ()), call.shape()[1])


def _concat(call: Call) -> Known:
    shapes = [call.shape(index) for index in range(len(call.inputs))]
    axis = _axis(call.number("axis"), len(shapes[0]))
    shape = (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])
    parts = [part.values for part in call.inputs if part is not None]
    if len(shape) > 1 or shape[0] > MOST_VALUES or any(part is None for part in parts):
        return Known(shape)
    return Known(shape, tuple(int(value) for part in parts if part is not None for value in part))


def _reduce(call: Call, axes: Sequence[int]) -> Shape:
    shape, keep = call.shape(), call.number("keepdims", 1)
    reduced = {_axis(axis, len(shape)) for axis in axes}
    return tuple(1 if axis in reduced else side for axis, side in enumerate(shape) if keep or axis not in reduced)


def _reduce_sum(call: Call) -> Shape:
    return _reduce(call, call.integers(1))


def _arg_max(call: Call) -> Shape:
    return _reduce(call, [call.number("axis")])


def _depth_to_space(call: Call) -> Shape:
    batch, channels, height, width = call.shape()
    block = call.number("blocksize")
    return batch, channels // block**2, height * block, width * block


def _expand(call: Call) -> Shape:
    return _broadcast(call.shape(), call.integers(1))


def _gather(call: Call) -> Shape:
    data = call.shape()
    axis = _axis(call.number("axis"), len(data))
    return (*data[:axis], *call.shape(1), *data[axis + 1 :])


def _gather_elements(call: Call) -> Shape:
    return call.shape(1)


def _gather_nd(call: Call) -> Shape:
    data, indices, batch = call.shape(), call.shape(1), call.number("batch_dims")
    if batch < 0:
        raise GraphError(f"batch_dims is {batch}")
    return (*indices[:-1], *data[batch + indices[-1] :])


def _pad(call: Call) -> Shape:
    shape, pads = list(call.shape()), call.integers(1)
    axes = call.integers(3) if call.has(3) else tuple(range(len(shape)))
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        shape[_axis(axis, len(shape))] += before + after
    return tuple(shape)


def _reshape(call: Call) -> Shape:
    shape, target = call.shape(), list(call.integers(1))
    if not call.number("allowzero"):
        target = [shape[axis] if side == 0 else side for axis, side in enumerate(target)]
    if target.count(-1) == 1:
        target[target.index(-1)] = prod(shape) // prod(side for side in target if side != -1)
    if prod(target) != prod(shape):
        raise GraphError("the shapes differ in size")
    return tuple(target)


def _resize(call: Call) -> Shape:
    if call.attribute("keep_aspect_ratio_policy", b"stretch") != b"stretch" or "axes" in call.node.attributes:
        raise GraphError("the output sides are not given one by one")
    if call.has(3):
        return call.integers(3)
    scales = call.inputs[2] if call.has(2) else None
    if scales is None or scales.values is None:
        raise GraphError("a shape depends on data")
    return tuple(floor(side * scale) for side, scale in zip(call.shape(), scales.values, strict=True))


def _shape(call: Call) -> Known:
    shape = call.shape()
    end = call.number("end", len(shape))
    found = shape[call.number("start") : end]
    return Known((len(found),), found)


def _slice(call: Call) -> Shape:
    shape = list(call.shape())
    starts, ends = call.integers(1), call.integers(2)
    axes = call.integers(3) if call.has(3) else range(len(starts))
    steps = call.integers(4) if call.has(4) else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = _axis(axis, len(shape))
        shape[place] = len(range(*slice(start, end, step).indices(shape[place])))
    return tuple(shape)


def _split(call: Call) -> list[Known]:
    shape = call.shape()
    axis = _axis(call.number("axis"), len(shape))
    return [Known((*shape[:axis], side, *shape[axis + 1 :])) for side in call.integers(1)]


def _squeeze(call: Call) -> Shape:
    shape = call.shape()
    axes = {_axis(axis, len(shape)) for axis in call.integers(1)}
    if any(shape[axis] != 1 for axis in axes):
        raise GraphError("a removed side is not 1")
    return tuple(side for axis, side in enumerate(shape) if axis not in axes)


def _unsqueeze(call: Call) -> Shape:
    shape, axes = call.shape(), call.integers(1)
    rank = len(shape) + len(axes)
    added, sides = {_axis(axis, rank) for axis in axes}, iter(shape)
    return tuple(1 if axis in added else next(sides) for axis in range(rank))


def _transpose(call: Call) -> Shape:
    shape = call.shape()
    order = call.numbers("perm", range(len(shape))[::-1])
    if sorted(order) != list(range(len(shape))):
        raise GraphError(f"{order} is not a permutation of the axes")
    return tuple(shape[axis] for axis in order)


Rule = Callable[[Call], Shape | Known | list[Known]]
RULES: dict[str, Rule] = {
    "Add": _pointwise,
    "ArgMax": _arg_max,
    "AveragePool": _pool,
    "Cast": _same,
    "Concat": _concat,
    "Conv": _convolution,
    "DepthToSpace": _depth_to_space,
    "DequantizeLinear": _same,
    "Expand": _expand,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "Identity": _same,
    "LayerNormalization": _same,
    "MatMul": _matmul,
    "Mul": _pointwise,
    "Pad": _pad,
    "QuantizeLinear": _same,
    "ReduceSum": _reduce_sum,
    "Relu": _same,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Sigmoid": _same,
    "Slice": _slice,
    "Softmax": _same,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _pointwise,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""Rules by operator; a test compares the operators with those of all graphs that this version exports."""
