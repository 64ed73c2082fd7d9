"""Which layer of a low-precision graph first gives a value that is not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.errors import ParityError

if TYPE_CHECKING:
    from onnx import ModelProto

_FLOATS = (1, 10, 16)  # TensorProto.FLOAT, FLOAT16, BFLOAT16


def refuse_non_finite(
    name: str, model: ModelProto, full: ModelProto, precision: str, inputs: Mapping[str, NDArray[np.generic]]
) -> None:
    """ParityError that names the first node with a NaN or an overflow, if an output of the graph has one.

    Args:
        name: the graph's, for the message.
        model: the graph of the precision.
        full: the FP32 graph that it was made from; what is infinite there (a mask) may be so here.
        precision: what `model` is in.
        inputs: arrays by input name.
    """
    outputs = _run(model, [value.name for value in model.graph.output], precision, inputs)
    if all(np.isfinite(value).all() for value in outputs.values()):
        return
    found = first_non_finite(model, full, precision, inputs)
    raise ParityError(
        f"The {precision} graph of {name} gives values that are not finite. They begin at {found}. Keep that node in a "
        "higher precision (keep), or choose bf16, which has float32's range. Nothing was published."
    )


def first_non_finite(
    model: ModelProto, full: ModelProto, precision: str, inputs: Mapping[str, NDArray[np.generic]]
) -> str:
    """The first node, in the graph's order, that gives a NaN or an infinity where the FP32 graph gives none."""
    from cclip_deploy.graph.precision.onnx_graph import tensor_types

    allowed = _non_finite(full, "fp32", inputs)
    bad = _non_finite(model, precision, inputs) - allowed
    by_output = {name: node for node in model.graph.node for name in node.output}
    types = tensor_types(model, {})
    for name in (name for node in model.graph.node for name in node.output if name in bad):
        node = by_output[name]
        kind = "float16" if types.get(name) == 10 else "float32"
        return f"node {node.name!r} ({node.op_type}), output {name!r} ({kind})"
    return "an output of the graph itself; its inputs or weights are not finite"


def _non_finite(model: ModelProto, precision: str, inputs: Mapping[str, NDArray[np.generic]]) -> set[str]:
    from cclip_deploy.graph.precision.onnx_graph import tensor_types

    types = tensor_types(model, {})
    floats = [name for node in model.graph.node for name in node.output if types.get(name) in _FLOATS]
    values = _run(model, floats, precision, inputs)
    return {name for name, value in values.items() if not np.isfinite(value).all()}


def _run(
    model: ModelProto, tensors: list[str], precision: str, inputs: Mapping[str, NDArray[np.generic]]
) -> dict[str, NDArray[np.generic]]:
    """These tensors of a graph, computed by ONNX Runtime on the CPU."""
    import onnx

    from cclip_deploy.graph.precision.onnx_graph import tensor_types
    from cclip_deploy.graph.precision.rounding import emulate_rounding, has_16_bit_types
    from cclip_deploy.runtime.onnxruntime.cpu import load_onnxruntime, make_session

    shown = onnx.ModelProto()
    shown.CopyFrom(emulate_rounding(model) if has_16_bit_types(model) else model)
    types = tensor_types(shown, {})
    known = {value.name for value in shown.graph.output}
    shown.graph.output.extend(onnx.helper.make_tensor_value_info(n, types[n], None) for n in tensors if n not in known)
    session = make_session(load_onnxruntime("cpu"), shown.SerializeToString(), "cpu", None, precision)
    halves = {tensor.name for tensor in session.get_inputs() if tensor.type == "tensor(float16)"}
    wanted = {tensor.name for tensor in session.get_inputs()}
    feeds = {n: v.astype(np.float16) if n in halves else v for n, v in inputs.items() if n in wanted}
    return dict(zip(tensors, session.run(tensors, feeds), strict=True)) if tensors else {}
