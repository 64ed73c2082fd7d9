"""Build malicious ONNX graphs that replace the mask decoder of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Change = Callable[[ModelProto], None]
PLACE = "graphs/mask_decoder.onnx"
FLOAT = TensorProto.FLOAT


def external(name: str, location: str = "weights.bin", count: int = 1) -> TensorProto:
    """A tensor whose values lie in another file."""
    tensor = TensorProto(name=name, data_type=FLOAT, dims=[count], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", str(4 * count))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def append(model: ModelProto, *nodes: NodeProto) -> None:
    """Nodes whose last output is added to the logits, so that no runtime leaves them out."""
    final = next(node for node in model.graph.node if node.output[0] == "logits")
    final.output[0] = "logits_before"
    model.graph.node.extend(nodes)
    model.graph.node.append(helper.make_node("Add", ["logits_before", nodes[-1].output[0]], ["logits"], "appended"))


def add_weight(model: ModelProto, name: str, values: Sequence[int] | np.ndarray, dtype: type = np.int64) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype), name))


def external_initializer(model: ModelProto) -> None:
    model.graph.initializer.append(external("outside"))
    append(model, helper.make_node("Relu", ["outside"], ["taken"]))


def external_constant(model: ModelProto) -> None:
    append(model, helper.make_node("Constant", [], ["taken"], value=external("outside")))


def external_in_subgraph(model: ModelProto) -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["outside"], ["inner"])], "branch", [],
        [helper.make_tensor_value_info("inner", FLOAT, [1])], [external("outside")],
    )  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    append(model, helper.make_node("If", ["yes"], ["taken"], then_branch=branch, else_branch=branch))


def external_in_function(model: ModelProto) -> None:
    function = helper.make_function(
        "stranger", "Taken", [], ["out"], [helper.make_node("Constant", [], ["out"], value=external("outside"))],
        [helper.make_opsetid("", 18)],
    )  # fmt: skip
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("stranger", 1))
    append(model, helper.make_node("Taken", [], ["taken"], domain="stranger"))


def external_sparse(model: ModelProto) -> None:
    indices = numpy_helper.from_array(np.array([0], np.int64), "outside_indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(external("outside"), indices, [1]))
    append(model, helper.make_node("Relu", ["outside"], ["taken"]))


EXTERNAL: dict[str, Change] = {
    "initializer": external_initializer,
    "constant": external_constant,
    "subgraph": external_in_subgraph,
    "function": external_in_function,
    "sparse": external_sparse,
}


def endless_loop(model: ModelProto) -> None:
    """A Loop of 2**62 steps."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["state", "state"], ["next_state"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next_state", FLOAT, [1]),
        ],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(2**62, np.int64), "steps"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "first"))
    # It starts from a value that is known only at run time, so that no runtime computes it while it loads the graph.
    model.graph.node.append(helper.make_node("ReduceMax", ["bias"], ["start_0"], keepdims=0))
    add_weight(model, "one_side", [1])
    model.graph.node.append(helper.make_node("Reshape", ["start_0", "one_side"], ["start"]))
    append(model, helper.make_node("Loop", ["steps", "first", "start"], ["taken"], body=body))


def doubling_functions(model: ModelProto) -> None:
    """Thirty functions, each of which calls the one before it twice: 2**30 nodes when they are written out."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("stranger", 1)]
    model.opset_import.append(opsets[1])
    model.functions.append(
        helper.make_function("stranger", "F0", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], opsets)
    )
    for number in range(1, 30):
        inner = {"domain": "stranger"}
        nodes = [
            helper.make_node(f"F{number - 1}", ["x"], ["m"], **inner),
            helper.make_node(f"F{number - 1}", ["m"], ["y"], **inner),
        ]
        model.functions.append(helper.make_function("stranger", f"F{number}", ["x"], ["y"], nodes, opsets))
    append(model, helper.make_node("F29", ["logits_before"], ["taken"], domain="stranger"))


def nested_subgraphs(model: ModelProto) -> None:
    """Subgraphs in subgraphs, sixty deep."""
    graph = helper.make_graph(
        [helper.make_node("Relu", ["bias"], ["inner0"])], "g", [],
        [helper.make_tensor_value_info("inner0", FLOAT, ["prompts"])],
    )  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    for depth in range(1, 60):
        node = helper.make_node("If", ["yes"], [f"inner{depth}"], then_branch=graph, else_branch=graph)
        if len(node.SerializeToString()) > 2**16:
            break
        value = helper.make_tensor_value_info(f"inner{depth}", FLOAT, ["prompts"])
        graph = helper.make_graph([node], "g", [], [value])
    add_weight(model, "all_sides", [-1, 1, 1])
    append(
        model,
        helper.make_node("If", ["yes"], ["inner"], then_branch=graph, else_branch=graph),
        helper.make_node("Reshape", ["inner", "all_sides"], ["taken"]),
    )


def random_numbers(model: ModelProto) -> None:
    append(model, helper.make_node("RandomNormal", [], ["taken"], shape=[1]))


def operator_of_microsoft(model: ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    append(model, helper.make_node("Gelu", ["logits_before"], ["taken"], domain="com.microsoft"))


def training_information(model: ModelProto) -> None:
    model.training_info.add().algorithm.CopyFrom(model.graph)


STRUCTURES: dict[str, Change] = {
    "endless loop": endless_loop,
    "doubling functions": doubling_functions,
    "nested subgraphs": nested_subgraphs,
    "random numbers": random_numbers,
    "an operator of com.microsoft": operator_of_microsoft,
    "training information": training_information,
}


def largest(values: str, model: ModelProto, *nodes: NodeProto) -> None:
    """Append nodes whose result `values` is huge, and one value of it to the logits."""
    add_weight(model, "first_place", [0])
    flat, one = helper.make_node("Reshape", [values, "one_axis"], ["flat"]), helper.make_node(
        "Gather", ["flat", "first_place"], ["taken"]
    )  # fmt: skip
    add_weight(model, "one_axis", [-1])
    append(model, *nodes, flat, one)


def expand(model: ModelProto) -> None:
    add_weight(model, "wide", [2**20, 2**20])
    add_weight(model, "column", [-1, 1])
    nodes = [
        helper.make_node("ReduceSum", ["bias", "first_place"], ["b"], keepdims=1),
        helper.make_node("Reshape", ["b", "column"], ["c"]),
        helper.make_node("Expand", ["c", "wide"], ["v"]),
    ]
    largest("v", model, *nodes)


def pad(model: ModelProto) -> None:
    add_weight(model, "pads", [0, 2**40])
    largest("v", model, helper.make_node("Pad", ["bias", "pads"], ["v"]))


def resize(model: ModelProto) -> None:
    add_weight(model, "sizes", [1, 1, 2**20, 2**20])
    add_weight(model, "whole", [1, 1, -1, 1])
    add_weight(model, "no", np.zeros(0), np.float32)
    nodes = [
        helper.make_node("Reshape", ["bias", "whole"], ["b"]),
        helper.make_node("Resize", ["b", "", "", "sizes"], ["v"], mode="nearest"),
    ]
    largest("v", model, *nodes)


def doubling_concatenations(model: ModelProto) -> None:
    nodes = [helper.make_node("Concat", ["bias", "bias"], ["c0"], axis=0)]
    nodes += [helper.make_node("Concat", [f"c{n}", f"c{n}"], [f"c{n + 1}"], axis=0) for n in range(39)]
    largest("c39", model, *nodes)


def outer_sums(model: ModelProto) -> None:
    """A column plus a row, reshaped to a column and a row again: the size is squared each time."""
    add_weight(model, "column", [-1, 1])
    add_weight(model, "row", [1, -1])
    nodes, last = [], "tap_bias"
    for n in range(4):
        nodes += [
            helper.make_node("Reshape", [last, "column"], [f"column{n}"]),
            helper.make_node("Reshape", [last, "row"], [f"row{n}"]),
            helper.make_node("Add", [f"column{n}", f"row{n}"], [f"sum{n}"]),
        ]
        last = f"sum{n}"
    largest(last, model, *nodes)


def outer_products(model: ModelProto) -> None:
    add_weight(model, "column", [-1, 1])
    add_weight(model, "row", [1, -1])
    largest(
        "v", model,
        helper.make_node("Reshape", ["features", "column"], ["columns"]),
        helper.make_node("Reshape", ["features", "row"], ["rows"]),
        helper.make_node("MatMul", ["columns", "rows"], ["v"]),
    )  # fmt: skip


def repeated_gathers(model: ModelProto) -> None:
    add_weight(model, "again", np.zeros(1000))
    add_weight(model, "column", [-1, 1])
    nodes, last = [helper.make_node("Reshape", ["bias", "column"], ["g0"])], "g0"
    for n in range(4):
        nodes.append(helper.make_node("Gather", [last, "again"], [f"g{n + 1}"], axis=n + 1))
        nodes.append(helper.make_node("Unsqueeze", [f"g{n + 1}", "new_axis"], [f"u{n + 1}"]))
        last = f"u{n + 1}"
    add_weight(model, "new_axis", [-1])
    largest(last, model, *nodes)


def padded_convolution(model: ModelProto) -> None:
    add_weight(model, "whole", [-1, 1, 1, 1])
    add_weight(model, "kernel_1", np.ones((1, 1, 1, 1)), np.float32)
    nodes = [
        helper.make_node("Reshape", ["bias", "whole"], ["b"]),
        helper.make_node("Conv", ["b", "kernel_1"], ["v"], pads=[2**18] * 4, kernel_shape=[1, 1]),
    ]
    largest("v", model, *nodes)


SIZES: dict[str, Change] = {
    "expand": expand,
    "pad": pad,
    "resize": resize,
    "doubling concatenations": doubling_concatenations,
    "outer sums": outer_sums,
    "outer products": outer_products,
    "repeated gathers": repeated_gathers,
    "padded convolution": padded_convolution,
}


def rewrite(bundle: Path, change: Change, place: str = PLACE) -> None:
    """Change a graph of a bundle; its checksums are then wrong."""
    model = onnx.load(bundle / place)
    change(model)
    (bundle / place).unlink()
    (bundle / place).write_bytes(model.SerializeToString())


def long_chain(model: ModelProto) -> None:
    """Three hundred products of 1024 x 1024 matrices, one after the other."""
    add_weight(model, "square", np.full((1024, 1024), 2.0**-10), np.float32)
    nodes = [helper.make_node("Add", ["square", "bias_1"], ["p0"])]
    model.graph.node.append(helper.make_node("ReduceSum", ["bias", "first_axis"], ["bias_1"]))
    add_weight(model, "first_axis", [0])
    nodes += [helper.make_node("MatMul", [f"p{n}", "square"], [f"p{n + 1}"]) for n in range(300)]
    largest("p300", model, *nodes)
