"""The layer table of a build log, read from lines of both bindings' forms, and what it proves."""

from __future__ import annotations

import json

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from cclip_deploy.bundle.precision import parse_precision
from cclip_deploy.errors import DataError, ParityError, UsageError
from cclip_deploy.runtime.tensorrt.layers import (
    LayerTable,
    product_nodes,
    prove_precision,
    read_layer_table,
)


def rtx_tensor(name: str, dims: str, kind: str) -> str:
    layout = "Format: (NHWC) Channel major format"
    return f" {{ Name: {name}, Dimensions: [{dims}], Strides: [8,1], StrideOrder: [1,0], Datatype: {kind}, {layout} }}"


def rtx_row(name: str, kind: str, inputs: str, constants: str, outputs: str, origins: str = "") -> str:
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [{inputs}], Constants: [{constants}], Outputs: [{outputs}], "
        f"TacticName: tactic, StreamId: 0, Metadata: {origins}"
    )


def product_row(kind: str, data: str, weights: str, node: str = "conv", name: str = "conv_myl0_2") -> str:
    constants = f"{rtx_tensor('w', '8,3,3,3', weights)},{rtx_tensor('alpha', '1', 'Float')}"
    inputs, outputs = rtx_tensor("x", "-1,3,8,8", data), rtx_tensor("y", "-1,8,8,8", data)
    return rtx_row(
        name, kind, inputs, constants, outputs, f"[ONNX Layer: {node}]\x1f[ONNX Layer: relu]" if node else ""
    )


def table(*rows: str) -> LayerTable:
    text = "Layers:\n" + "\n".join(rows) + "\n\nI/O Tensors:\n Name: image, IOMode: Input, DataType: Float"
    return read_layer_table(["Original: 3 layers", text, "Adding 1 engine(s) to plan file."])


def test_a_row_is_read_with_its_tensors_and_origins() -> None:
    (row,) = table(product_row("correlation", "Half", "Half")).rows
    assert (row.name, row.kind, row.origins) == ("conv_myl0_2", "correlation", ("conv", "relu"))
    assert [(t.name, t.dims, t.type) for t in row.inputs] == [("x", (-1, 3, 8, 8), "fp16")]
    assert [(t.name, t.dims, t.type) for t in row.constants] == [("w", (8, 3, 3, 3), "fp16"), ("alpha", (1,), "fp32")]
    assert row.precision == "fp16"


def test_a_row_of_plain_tensorrt_is_read() -> None:
    line = (
        "Name: /c/Conv + /r/Relu, LayerType: CaskConvolution, Inputs: [ { Name: in, Location: Device, "
        "Dimensions: [1,3,4,4], Format/Datatype: Channel major FP16 format where channel % 8 == 0 }], "
        "Outputs: [ { Name: out, Location: Device, Dimensions: [1,8,2,2], Format/Datatype: Half }], "
        "ParameterType: Convolution, Kernel: [3,3], Weights: "
        '{"Type": "Half", "Count": 216}, Bias: {"Type": "Float", "Count": 8}, HasBias: 1, TacticName: sm80_xmma, '
        "TacticValue: 0x1, StreamId: 0, Metadata: [ONNX Layer: /c/Conv]\x1e[ONNX Layer: /r/Relu]"
    )
    (row,) = table(line).rows
    assert row.origins == ("/c/Conv", "/r/Relu")
    assert row.constants[0].dims == (216,)
    assert row.is_product
    assert row.precision == "fp16"


def test_layers_without_tensors_or_origins_are_read() -> None:
    (row,) = table(rtx_row("shapes", "shape_call", "", "", "")).rows
    assert (row.inputs, row.constants, row.outputs, row.origins) == ((), (), (), ())
    assert row.precision == "none"


def test_a_convolution_made_a_product_keeps_its_origin() -> None:
    (row,) = table(rtx_row("g", "gemm", "", "", "", "[ONNX Layer: blocks[0].conv]__gemm_from_conv1x1")).rows
    assert row.origins == ("blocks[0].conv",)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Float", "fp32"),
        ("Row major linear FP32 format", "fp32"),
        ("Half", "fp16"),
        ("BFloat16", "bf16"),
        ("FP8", "fp8"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("UInt8", "uint8"),
        ("Int64", "int64"),
        ("Bool", "bool"),
    ],
)
def test_type_names_of_all_versions_are_known(text: str, kind: str) -> None:
    (row,) = table(rtx_row("x", "kgen", rtx_tensor("a", "4", text), "", "")).rows
    assert row.inputs[0].type == kind


@pytest.mark.parametrize(
    "line",
    [
        "conv1",
        rtx_row("x", "kgen", " { Name: a, Dimensions: four }", "", ""),
        rtx_row("x", "kgen", rtx_tensor("a", "4", "Posit16"), "", ""),
    ],
)
def test_a_table_that_cannot_be_read_is_no_proof(line: str) -> None:
    with pytest.raises(ParityError, match="layer table"):
        table(line)


@pytest.mark.parametrize("log", [[], ["Engine generation completed"], ["Layers:\n\nI/O Tensors:\n"]])
def test_a_log_without_a_table_is_no_proof(log: list[str]) -> None:
    with pytest.raises(ParityError, match="nothing shows which precision"):
        read_layer_table(log)


def test_the_table_survives_json() -> None:
    before = table(product_row("correlation", "Half", "Half"), rtx_row("s", "shape_call", "", "", ""))
    assert LayerTable.from_dict(json.loads(json.dumps(before.to_dict()))) == before


@pytest.mark.parametrize("values", [{}, {"layers": [{"name": "x"}]}, {"layers": None}])
def test_what_is_no_table_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(DataError, match="Not a layer table"):
        LayerTable.from_dict(values)


def test_layers_are_counted_by_type() -> None:
    cast = rtx_row("c", "kgen", rtx_tensor("a", "8", "Float"), "", rtx_tensor("b", "8", "Half"))
    mixed = table(
        product_row("correlation", "Half", "Half"),
        product_row("gemm", "Half", "Half"),
        product_row("gemm", "Float", "Float"),
        cast,
        rtx_row("s", "shape_call", "", "", ""),
    )
    assert mixed.summary() == {"fp16": 2, "fp32": 1, "mixed": 1, "none": 1}
    assert mixed.product_summary() == {"fp16": 2, "fp32": 1}
    assert mixed.share("fp16") == pytest.approx(2 / 3)
    assert mixed.share("int8") == 0


@pytest.mark.parametrize(("data", "asked"), [("Float", "fp32"), ("Half", "fp16")])
def test_an_honoured_request_is_proved(data: str, asked: str) -> None:
    prove_precision(table(product_row("correlation", data, data)), asked, {"conv"})  # type: ignore[arg-type]


def test_fp16_that_runs_in_fp32_is_refused_with_the_layers() -> None:
    rows = [product_row("correlation", "Float", "Float", f"conv{i}") for i in range(8)]
    products = {f"conv{i}" for i in range(8)}
    with pytest.raises(ParityError, match=r"FP16 was asked for.* 8 of 8 .*conv0 \(correlation, fp32\).*conv4.*\.\.\."):
        prove_precision(table(*rows), "fp16", products)


def test_one_product_in_fp32_is_enough_to_refuse_fp16() -> None:
    both = table(product_row("correlation", "Half", "Half"), product_row("gemm", "Float", "Float", "head"))
    with pytest.raises(ParityError, match=r"1 of 2 .*head \(gemm, fp32\)"):
        prove_precision(both, "fp16", {"conv", "head"})
    prove_precision(both, "fp16", {"conv", "head"}, kept_nodes={"head"})


def test_fp32_weights_behind_a_half_input_are_not_fp16() -> None:
    with pytest.raises(ParityError, match=r"conv \(runtime_fusion, mixed\)"):
        prove_precision(table(product_row("runtime_fusion", "Half", "Float")), "fp16", {"conv"})


def test_fp32_with_a_half_layer_is_refused() -> None:
    both = table(
        product_row("correlation", "Float", "Float"), rtx_row("p", "kgen", rtx_tensor("a", "8", "Half"), "", "")
    )
    with pytest.raises(ParityError, match=r"0 of 1 .*1 other layers \[p \(kgen, fp16\)\]"):
        prove_precision(both, "fp32", {"conv"})


def test_a_product_without_an_origin_counts_too() -> None:
    both = table(product_row("correlation", "Half", "Half"), product_row("gemm", "Float", "Float", "", "stray"))
    with pytest.raises(ParityError, match=r"1 other layers \[stray"):
        prove_precision(both, "fp16", {"conv"})


def test_a_product_in_no_layer_is_refused() -> None:
    with pytest.raises(ParityError, match=r"head \(in no layer\)"):
        prove_precision(table(product_row("correlation", "Half", "Half")), "fp16", {"conv", "head"})


CAST, PAD = "__myl_Cast_myl0_1", "__myl_ReplConc_myl0_1"
"""Names of generated kernels, as TensorRT-RTX 1.7 gives them: the operators, shortened, and the kernel's number."""


def test_the_cast_before_a_convolution_does_not_speak_for_it() -> None:
    cast = rtx_row(CAST, "kgen", rtx_tensor("x", "8", "Float"), "", rtx_tensor("h", "8", "Half"), "[ONNX Layer: conv]")
    prove_precision(table(cast, product_row("correlation", "Half", "Half")), "fp16", {"conv"})
    with pytest.raises(ParityError):
        prove_precision(table(cast, product_row("correlation", "Float", "Float")), "fp16", {"conv"})


def test_the_padding_before_a_convolution_does_not_speak_for_it() -> None:
    pad = rtx_row(PAD, "kgen", rtx_tensor("x", "8", "Float"), "", rtx_tensor("q", "9", "Float"), "[ONNX Layer: conv]")
    both = table(pad, product_row("correlation", "Half", "Half"))
    assert [row.kind for row in both.rows_of("conv")] == ["correlation"]
    prove_precision(both, "fp16", {"conv"})


def test_single_elements_do_not_make_a_layer_mixed() -> None:
    row = rtx_row(
        "k", "kgen", rtx_tensor("a", "8", "Half"), rtx_tensor("s", "1", "Float"), rtx_tensor("b", "8", "Half")
    )
    assert table(row).summary() == {"fp16": 1}


@pytest.mark.parametrize("kind", ["Half", "Float"])
def test_a_small_product_that_became_a_multiplication_and_a_sum_counts_with_all_its_operands(kind: str) -> None:
    """TensorRT-RTX makes such a kernel of MatMul (1, 64) x (64, 1)."""
    inputs = f"{rtx_tensor('a', '1,64', 'Half')},{rtx_tensor('b', '64,8', kind)}"
    made = rtx_row("__myl_MulSum_myl0_0", "kgen", inputs, "", rtx_tensor("c", "1,8", "Half"), "[ONNX Layer: mm]")
    if kind == "Half":
        prove_precision(table(made), "fp16", {"mm"})
    else:
        with pytest.raises(ParityError, match=r"mm \(kgen, mixed\)"):
            prove_precision(table(made), "fp16", {"mm"})


@pytest.mark.parametrize(
    ("operators", "data", "weights", "output", "precision"),
    [
        ("AddSqrtDivMulMulAddCastReshMulSum", "Float", "Half", "Half", "fp16"),  # in an FP16 prompt encoder's engine
        ("AddSqrtDivMulMulAddReshMulSum", "Float", "Half", "Half", "mixed"),
        ("CastReshMulSum", "Float", "Float", "Half", "mixed"),
        ("CastReshMulSum", "Float", "Half", "Float", "mixed"),
        ("CastReshMulSumEtc", "Float", "Half", "Half", "mixed"),
        ("CastMulSumCast", "Half", "Half", "Half", "mixed"),  # up, multiplied, and down again
        ("MulSumCastMulSumCast", "Half", "Half", "Half", "mixed"),
        ("MulSumAddCast", "Half", "Half", "Float", "fp16"),
    ],
)
def test_what_a_kernel_casts_before_a_product_is_read_from_its_name(
    operators: str, data: str, weights: str, output: str, precision: str
) -> None:
    constants = f"{rtx_tensor('w', '64,64', weights)},{rtx_tensor('scale', '1,64', 'Float')}"
    made = rtx_row(
        f"__myl_{operators}_myl1_19", "kgen", rtx_tensor("x", "1,64", data), constants,
        rtx_tensor("y", "1,64", output), "[ONNX Layer: mm]",
    )  # fmt: skip
    assert table(made).rows[0].precision == precision
    if precision == "fp16":
        prove_precision(table(made), "fp16", {"mm"})


def test_a_fusion_that_casts_up_before_its_product_is_not_in_the_low_type() -> None:
    pair = f"{rtx_tensor('a', '8,8', 'Half')},{rtx_tensor('b', '8,8', 'Half')}"
    for name, precision in (("__myl_CastFcCast_myl0_1", "mixed"), ("__myl_FcAddCast_myl0_1", "fp16")):
        row = rtx_row(name, "runtime_fusion", pair, "", rtx_tensor("c", "8,8", "Half"), "[ONNX Layer: mm]")
        assert table(row).rows[0].precision == precision


def test_a_kernel_that_is_not_known_to_multiply_proves_no_product() -> None:
    """Its types do not say in which of them it multiplies: the low one may be its output's alone."""
    low_output = rtx_row(
        "__myl_AddRelu_myl0_0", "kgen", rtx_tensor("a", "8,8", "Float"), "", rtx_tensor("c", "8,8", "Half"),
        "[ONNX Layer: mm]",
    )  # fmt: skip
    with pytest.raises(ParityError, match=r"mm \(kgen, mixed\) is named only by __myl_AddRelu_myl0_0, not known to"):
        prove_precision(table(low_output), "fp16", {"mm"})


@pytest.mark.parametrize(
    ("operators", "kind", "fault"),
    [
        ("SlicSlicMulMulMulMulAddAddAddMoveResh", "Half", None),  # the demo's FP16 image encoder
        ("MulMulAdd", "Half", None),
        ("SlicMulMulMulMulAddAddAddResh", "Float", "mixed"),
        ("MulMulMulMulAddResh", "Half", "not known to multiply"),  # too few sums
        ("MulAdd", "Half", "not known to multiply"),
    ],
)
def test_a_small_product_that_is_written_out_counts_with_all_its_types(
    operators: str, kind: str, fault: str | None
) -> None:
    inputs = f"{rtx_tensor('a', '4,4', 'Half')},{rtx_tensor('b', '4,4', kind)}"
    made = rtx_row(f"__myl_{operators}_myl0_78", "kgen", inputs, "", rtx_tensor("c", "4,4", "Half"), "[ONNX Layer: mm]")
    if fault is None:
        prove_precision(table(made), "fp16", {"mm"})
    else:
        with pytest.raises(ParityError, match=fault):
            prove_precision(table(made), "fp16", {"mm"})


@pytest.mark.parametrize("kind", ["Reformat", "shape_call", "NoOp"])
def test_a_product_that_only_a_reformat_names_is_not_proved(kind: str) -> None:
    moved = rtx_row(
        "Reformatting CopyNode for Input Tensor 0 to conv", kind, rtx_tensor("x", "8,8", "Half"), "",
        rtx_tensor("y", "8,8", "Half"), "[ONNX Layer: conv]",
    )  # fmt: skip
    with pytest.raises(ParityError, match=rf"conv \({kind}, fp16\) is named only by Reformatting"):
        prove_precision(table(moved), "fp16", {"conv"})


@pytest.mark.parametrize("kind", ["Convert", "Myelin", "PluginV2", "conv_like", "runtime_fusion", "kgen"])
@pytest.mark.parametrize("asked", ["fp32", "fp16", "int8"])
def test_a_layer_of_an_unknown_kind_is_not_proved_with_or_without_the_products_name(kind: str, asked: str) -> None:
    types = {"fp32": "Float", "fp16": "Half", "int8": "Int8"}
    known = product_row("correlation", types[asked], types[asked])
    for origin in ("[ONNX Layer: head]", ""):
        pair = f"{rtx_tensor('a', '8,8', types[asked])},{rtx_tensor('b', '8,8', types[asked])}"
        unknown = rtx_row("mystery_7", kind, pair, "", rtx_tensor("c", "8,8", types[asked]), origin)
        products = {"conv", "head"} if origin else {"conv"}
        with pytest.raises(ParityError, match=rf"mystery_7 \({kind}, \w+\) is of an unknown kind"):
            prove_precision(table(known, unknown), asked, products)  # type: ignore[arg-type]


def test_a_kernel_with_an_operator_that_is_not_known_is_of_an_unknown_kind() -> None:
    known = product_row("correlation", "Half", "Half")
    for name in ("__myl_CastFrobAdd_myl0_1", "__myl__myl0_1", "_warp_myl0_1"):
        kernel = rtx_row(name, "kgen", rtx_tensor("a", "8", "Half"), "", rtx_tensor("b", "8", "Half"))
        with pytest.raises(ParityError, match=rf"{name} \(kgen, fp16\) is of an unknown kind"):
            prove_precision(table(known, kernel), "fp16", {"conv"})


def test_a_layer_of_an_unknown_kind_without_numbers_hides_nothing() -> None:
    sizes = rtx_row("sizes", "size_call", rtx_tensor("n", "4", "Int64"), "", rtx_tensor("m", "4", "Int64"))
    prove_precision(table(sizes, product_row("correlation", "Half", "Half")), "fp16", {"conv"})


@pytest.mark.parametrize(
    "weights",
    [
        'Weights: {"Count": 216, "Type": "Float"}',
        "Weights: {Type: Float, Count: 216}",
        'Weights: "Float"',
        "Weights: 3",
    ],
)
def test_weights_in_another_syntax_are_no_proof(weights: str) -> None:
    line = (
        "Name: conv, LayerType: CaskConvolution, Inputs: [ { Name: in, Location: Device, Dimensions: [1,3,4,4], "
        "Format/Datatype: Half }], Outputs: [ { Name: out, Location: Device, Dimensions: [1,8,2,2], Format/Datatype: "
        f"Half }}], ParameterType: Convolution, {weights}, HasBias: 0, Metadata: [ONNX Layer: conv]"
    )
    with pytest.raises(ParityError, match="Weights in the build log's layer table cannot be read"):
        prove_precision(table(line), "fp16", {"conv"})


def test_a_convolution_without_weights_in_the_table_is_no_proof() -> None:
    row = rtx_row(
        "conv_myl0_2", "correlation", rtx_tensor("x", "-1,3,8,8", "Half"), rtx_tensor("alpha", "1", "Float"),
        rtx_tensor("y", "-1,8,8,8", "Half"), "[ONNX Layer: conv]",
    )  # fmt: skip
    with pytest.raises(ParityError, match=r"conv \(correlation, unknown\)"):
        prove_precision(table(row), "fp16", {"conv"})


@pytest.mark.parametrize("first", [True, False])
def test_one_fp32_activation_beside_int8_weights_is_not_int8(first: bool) -> None:
    main, other = rtx_tensor("x", "-1,3,8,8", "Float"), rtx_tensor("r", "-1,8,8,8", "Int8")
    inputs = f"{main},{other}" if first else f"{other},{main}"
    row = rtx_row(
        "conv_myl0_2", "correlation", inputs, rtx_tensor("w", "8,3,3,3", "Int8"), rtx_tensor("y", "-1,8,8,8", "Int8"),
        "[ONNX Layer: conv]",
    )  # fmt: skip
    with pytest.raises(ParityError, match=r"conv \(correlation, mixed\)"):
        prove_precision(table(row), "int8", {"conv"})


def test_scales_and_bias_beside_int8_operands_may_be_fp32() -> None:
    """As TensorRT-RTX 1.7 logs every INT8 convolution: codes in, codes as weights, FP32 scale, bias and output."""
    constants = ",".join([rtx_tensor("w", "4,4,3,3", "Int8"), *(rtx_tensor(n, "1,4,1,1", "Float") for n in "sb")])
    row = rtx_row(
        "conv_myl0_2", "correlation", rtx_tensor("x", "-1,4,8,8", "Int8"), constants,
        rtx_tensor("y", "-1,4,8,8", "Float"), "[ONNX Layer: conv]",
    )  # fmt: skip
    prove_precision(table(row), "int8", {"conv"})


def test_plain_tensorrts_weights_count_beside_a_residual() -> None:
    def line(weights: str) -> str:
        ends = "Location: Device, Dimensions: [1,8,4,4], Format/Datatype: Half"
        return (
            f"Name: conv, LayerType: CaskConvolution, Inputs: [ {{ Name: in, {ends} }}, {{ Name: skip, {ends} }}], "
            f"Outputs: [ {{ Name: out, {ends} }}], ParameterType: Convolution, "
            f'Weights: {{"Type": "{weights}", "Count": 576}}, HasBias: 0, Metadata: [ONNX Layer: conv]'
        )

    prove_precision(table(line("Half")), "fp16", {"conv"})
    with pytest.raises(ParityError, match=r"conv \(CaskConvolution, mixed\)"):
        prove_precision(table(line("Float")), "fp16", {"conv"})


@pytest.mark.parametrize(("asked", "low", "high"), [("int8", "Int8", "Float"), ("fp16", "Half", "Float")])
def test_a_precision_with_all_products_kept_out_of_it_but_one_is_not_proved(asked: str, low: str, high: str) -> None:
    nodes = [f"conv{i}" for i in range(9)]
    rows = [product_row("correlation", high if i else low, high if i else low, node) for i, node in enumerate(nodes)]
    with pytest.raises(ParityError, match=r"8 of 9 convolutions and matrix products are kept in FP32.*build in fp32"):
        prove_precision(table(*rows), asked, set(nodes), set(nodes[1:]))  # type: ignore[arg-type]


def test_a_generated_attention_kernel_is_a_product() -> None:
    def attention(kind: str) -> str:
        inputs = ",".join(rtx_tensor(name, "-1,32,16", kind) for name in "qkv")
        return rtx_row("_gemm_mha_v2_myl0_7", "kgen", inputs, "", rtx_tensor("o", "8", "Half"), "[ONNX Layer: mm]")

    assert table(attention("Half")).product_summary() == {"fp16": 1}
    with pytest.raises(ParityError, match=r"mm \(kgen, fp32\)"):
        prove_precision(table(attention("Float")), "fp16", {"mm"})


def test_a_graph_without_products_proves_nothing() -> None:
    with pytest.raises(ParityError, match="no convolution or matrix product"):
        prove_precision(table(rtx_row("s", "shape_call", "", "", "")), "fp32", set())


def test_unknown_precisions_are_refused() -> None:
    for precision in ("fp32", "fp16", "bf16", "int8", "fp8", "int8-fp16", "fp8-fp16"):
        assert parse_precision(precision) == precision
    with pytest.raises(UsageError, match="no precision 'half'"):
        parse_precision("half")


def test_products_are_named_and_those_of_constants_left_out() -> None:
    nodes = [
        helper.make_node("MatMul", ["w", "w"], ["ww"], name="constant"),
        helper.make_node("MatMul", ["x", "ww"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Gemm", ["b", "w"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (2, 2)) for name in ("x", "y")]
    weights = [numpy_helper.from_array(np.eye(2, dtype=np.float32), "w")]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], weights))
    assert product_nodes(model) == {"first", "node_of_y"}
