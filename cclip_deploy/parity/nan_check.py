"""Find the first layer of a low-precision graph whose output is not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.errors import ParityError

if TYPE_CHECKING:
    from onnx import ModelProto

_FLOATS = (1, 10, 16)  # TensorProto.FLOAT, FLOAT16, BFLOAT16


def require_finite(
    name: str, model: ModelProto, full: ModelProto, precision: str, inputs: Mapping[str, NDArray[np.generic]]
) -> None:
    """Raise ParityError if an output of a graph is not finite; the message names the first such node.

    Args:
        name: of the graph, for the message.
        model: the low-precision graph.
        full: its FP32 graph; tensors that are infinite there, such as attention masks, may be infinite in `model`.
        precision: of `model`.
        inputs: arrays by input name.
    """
    outputs = _run(model, [value.name for value in model.graph.output], precision, inputs)
    if all(np.isfinite(value).all() for value in outputs.values()):
        return
    found = first_non_finite(model, full, precision, inputs)
    raise ParityError(
        f"The {precision} graph of {name} gives values that are not finite, first at {found}. Keep that node in a "
        "higher precision (--keep), or use bf16, which has the range of float32. Nothing was written."
    )


def first_non_finite(
    model: ModelProto, full: ModelProto, precision: str, inputs: Mapping[str, NDArray[np.generic]]
) -> str:
    """Return the first node, in graph order, whose output is not finite although the FP32 graph's is."""
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
    """Compute tensors of a graph with ONNX Runtime on the CPU."""
    import onnx

    from cclip_deploy.graph.precision.onnx_graph import tensor_types
    from cclip_deploy.graph.precision.rounding import emulate_rounding, is_narrow
    from cclip_deploy.runtime.graph_model import run_on_cpu

    shown = onnx.ModelProto()
    shown.CopyFrom(emulate_rounding(model) if is_narrow(model) else model)
    types = tensor_types(shown, {})
    known = {value.name for value in shown.graph.output}
    shown.graph.output.extend(onnx.helper.make_tensor_value_info(n, types[n], None) for n in tensors if n not in known)
    return dict(zip(tensors, run_on_cpu(shown, tensors, precision, inputs), strict=True)) if tensors else {}
