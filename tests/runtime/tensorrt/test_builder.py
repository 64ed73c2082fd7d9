"""Engines built by TensorRT-RTX on a CPU, their proofs, and builds that fail or are cancelled."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cclip_deploy.errors import DataError, EnvironmentIssue, ParityError, UsageError
from cclip_deploy.graph.precision.float16 import to_fp16
from cclip_deploy.runtime.tensorrt import builder as engine_builder
from cclip_deploy.runtime.tensorrt.binding import binding_label, load_binding, network_flags
from cclip_deploy.runtime.tensorrt.build_watch import BuildWatch
from cclip_deploy.runtime.tensorrt.builder import BuiltEngine, EngineOptions, build_engine
from cclip_deploy.runtime.tensorrt.layers import LayerTable, product_nodes, prove_precision
from tests.ctrl_c import handled_by, press_in_the_log

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

SHAPES = {"image": ((1, 3, 16, 16), (2, 3, 16, 16), (8, 3, 16, 16))}
PRODUCTS = {"stem", "depthwise", "inner", "outer", "head"}


@pytest.fixture(scope="module")
def rtx() -> ModuleType:
    return load_binding("tensorrt-rtx")


def conv_attention_model() -> onnx.ModelProto:
    """Convolutions, a product of two activations around a softmax, and a linear head; the batch is dynamic."""
    rng = np.random.default_rng(0)
    shapes = {"stem_w": (32, 3, 3, 3), "depth_w": (32, 1, 3, 3), "head_w": (32, 8)}
    weights: dict[str, np.ndarray] = {
        name: (rng.standard_normal(shape) / 8).astype(np.float32) for name, shape in shapes.items()
    }
    weights |= {"rows": np.array([0, 32, -1])}
    nodes = [
        helper.make_node("Conv", ["image", "stem_w"], ["a"], name="stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "depth_w"], ["c"], name="depthwise", pads=[1, 1, 1, 1], group=32),
        helper.make_node("Reshape", ["c", "rows"], ["flat"], name="flatten"),
        helper.make_node("Transpose", ["flat"], ["tokens"], name="transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["tokens", "flat"], ["scores"], name="inner"),
        helper.make_node("Softmax", ["scores"], ["weights"], name="softmax"),
        helper.make_node("MatMul", ["weights", "tokens"], ["mixed"], name="outer"),
        helper.make_node("MatMul", ["mixed", "head_w"], ["logits"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ("batch", 3, 16, 16))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("batch", 256, 8))],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture(scope="module")
def fp32_model() -> onnx.ModelProto:
    return conv_attention_model()


@pytest.fixture(scope="module")
def fp32_graph(fp32_model: onnx.ModelProto) -> bytes:
    return bytes(fp32_model.SerializeToString())


@pytest.fixture(scope="module")
def fp32_engine(fp32_graph: bytes, rtx: ModuleType) -> BuiltEngine:
    return build_engine(fp32_graph, EngineOptions(SHAPES, workspace_bytes=1 << 28), rtx)


@pytest.fixture(scope="module")
def fp16_engine(fp32_model: onnx.ModelProto, rtx: ModuleType) -> BuiltEngine:
    graph = to_fp16(fp32_model).SerializeToString()
    return build_engine(graph, EngineOptions(SHAPES, precision="fp16"), rtx)


def single_layer(operator: str, weight_shape: tuple[int, ...], **attributes: Any) -> bytes:
    node = helper.make_node(operator, ["image", "w"], ["y"], name="only", **attributes)
    weights = [numpy_helper.from_array(np.ones(weight_shape, np.float32), "w")]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 4, 8, 8)) for n in ("image", "y")]
    graph = helper.make_graph([node], "net", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("acme", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def test_an_fp32_engine_runs_in_fp32(fp32_engine: BuiltEngine) -> None:
    assert fp32_engine.layers.product_summary().keys() == {"fp32"}
    assert set(fp32_engine.layers.summary()) <= {"fp32", "none"}
    assert len(fp32_engine.engine) > 1000
    assert fp32_engine.build_seconds > 0
    assert (fp32_engine.binding, fp32_engine.binding_version) == (
        "tensorrt-rtx",
        sys.modules["tensorrt_rtx"].__version__,
    )


def test_an_fp16_engine_runs_in_fp16(fp16_engine: BuiltEngine) -> None:
    assert fp16_engine.layers.product_summary().keys() == {"fp16"}


def test_inputs_and_outputs_of_an_fp16_engine_stay_fp32(fp16_engine: BuiltEngine) -> None:
    types = {tensor.name: tensor.type for row in fp16_engine.layers.rows for tensor in (*row.inputs, *row.outputs)}
    assert (types["image"], types["logits"]) == ("fp32", "fp32")


def test_the_batch_is_dynamic_in_the_engine(fp32_engine: BuiltEngine) -> None:
    dims = {tensor.name: tensor.dims for row in fp32_engine.layers.rows for tensor in (*row.inputs, *row.outputs)}
    assert dims["image"] == (-1, 3, 16, 16)
    assert any("MinShape: [1,3,16,16]" in line and "MaxShape: [8,3,16,16]" in line for line in fp32_engine.log)


def test_every_product_of_the_graph_is_found_in_the_engine(
    fp32_engine: BuiltEngine, fp32_model: onnx.ModelProto
) -> None:
    assert product_nodes(fp32_model) == PRODUCTS
    for node in PRODUCTS:
        assert fp32_engine.layers.rows_of(node), node


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[frozenset[str]]:
    """Product names of each precision check."""
    checked: list[frozenset[str]] = []

    def note(table: LayerTable, precision: str, products: frozenset[str], high: frozenset[str]) -> None:
        checked.append(products)

    monkeypatch.setattr(engine_builder, "prove_precision", note)
    return checked


def test_products_of_the_network_are_those_of_the_graph(
    fp32_graph: bytes, rtx: ModuleType, checked: list[frozenset[str]]
) -> None:
    build_engine(fp32_graph, EngineOptions(SHAPES), rtx)
    assert checked == [PRODUCTS]


def test_products_of_constants_are_not_checked(rtx: ModuleType, checked: list[frozenset[str]]) -> None:
    nodes = [
        helper.make_node("MatMul", ["w", "w"], ["ww"], name="constant"),
        helper.make_node("MatMul", ["image", "ww"], ["y"], name="only"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (4, 16)) for name in ("image", "y")]
    weights = [numpy_helper.from_array(np.eye(16, dtype=np.float32), "w")]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    build_engine(model.SerializeToString(), EngineOptions(), rtx)
    assert checked == [product_nodes(model)] == [{"only"}]


def test_build_refuses_an_engine_that_is_not_fp16(fp32_graph: bytes, rtx: ModuleType) -> None:
    with pytest.raises(ParityError, match=r"FP16 was requested.*5 of 5 .*stem \(\w+, fp32\)"):
        build_engine(fp32_graph, EngineOptions(SHAPES, precision="fp16"), rtx)


def test_build_refuses_an_engine_that_is_not_fp32(fp32_model: onnx.ModelProto, rtx: ModuleType) -> None:
    with pytest.raises(ParityError, match=r"FP32 was requested.*\(\w+, fp16\)"):
        build_engine(to_fp16(fp32_model).SerializeToString(), EngineOptions(SHAPES, precision="fp32"), rtx)


def test_a_node_left_in_fp32_is_refused_unless_named(fp32_model: onnx.ModelProto, rtx: ModuleType) -> None:
    graph = to_fp16(fp32_model, fp32_nodes=["head"]).SerializeToString()
    with pytest.raises(ParityError, match=r"1 of 5 .*head"):
        build_engine(graph, EngineOptions(SHAPES, precision="fp16"), rtx)
    built = build_engine(graph, EngineOptions(SHAPES, precision="fp16", high_precision_nodes=frozenset({"head"})), rtx)
    assert built.layers.rows_of("head")[0].precision == "fp32"


def test_nodes_without_names_are_proved_too(fp32_model: onnx.ModelProto, rtx: ModuleType) -> None:
    nameless = onnx.ModelProto()
    nameless.CopyFrom(fp32_model)
    for node in nameless.graph.node:
        node.name = ""
    built = build_engine(nameless.SerializeToString(), EngineOptions(SHAPES), rtx)
    prove_precision(built.layers, "fp32", product_nodes(nameless))


def test_an_engine_is_built_from_a_file(fp32_graph: bytes, rtx: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(fp32_graph)
    assert build_engine(path, EngineOptions(SHAPES), rtx).layers.product_summary().keys() == {"fp32"}
    with pytest.raises(DataError, match=r"no ONNX file .*other\.onnx"):
        build_engine(tmp_path / "other.onnx", EngineOptions(SHAPES), rtx)


@pytest.mark.parametrize("junk", [b"", b"not an onnx file at all"])
def test_invalid_bytes_are_refused(junk: bytes, rtx: ModuleType) -> None:
    with pytest.raises(DataError, match="cannot be parsed by tensorrt-rtx"):
        build_engine(junk, EngineOptions(), rtx)


def test_an_operator_that_the_parser_lacks_is_named_with_its_node(rtx: ModuleType) -> None:
    with pytest.raises(DataError, match=r"node 'only' \(Frobnicate\)"):
        build_engine(single_layer("Frobnicate", (4, 4, 1, 1), domain="acme"), EngineOptions(), rtx)


def test_a_log_without_a_layer_table_is_an_error(
    fp32_graph: bytes, rtx: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    verbosity = SimpleNamespace(DETAILED=rtx.ProfilingVerbosity.NONE)
    monkeypatch.setattr(rtx, "ProfilingVerbosity", verbosity)
    with pytest.raises(ParityError, match="layer table"):
        build_engine(fp32_graph, EngineOptions(SHAPES), rtx)


def test_a_static_graph_needs_no_shapes(rtx: ModuleType) -> None:
    assert build_engine(single_layer("Conv", (4, 4, 1, 1)), EngineOptions(), rtx).layers.product_summary().keys() == {
        "fp32"
    }


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, r"'image' has shape \(-1, 3, 16, 16\) with dynamic sizes"),
        ({**SHAPES, "photo": SHAPES["image"]}, "given for photo, but the inputs are image"),
        ({"image": ((1, 3, 16), (1, 3, 16), (1, 3, 16))}, r"\(1, 3, 16\) does not fit input 'image'"),
        ({"image": ((1, 1, 16, 16), (1, 3, 16, 16), (1, 3, 16, 16))}, r"\(1, 1, 16, 16\) does not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shapes: dict[str, Any], message: str, fp32_graph: bytes, rtx: ModuleType
) -> None:
    with pytest.raises(UsageError, match=message):
        build_engine(fp32_graph, EngineOptions(shapes), rtx)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shapes": {"image": ((2, 3), (1, 3), (8, 3))}}, "ordered smallest, usual, largest"),
        ({"shapes": {"image": ((0, 3), (1, 3), (8, 3))}}, "must be positive"),
        ({"shapes": {"image": ((1, 3), (1, 3), (8,))}}, "differ in length"),
        ({"workspace_bytes": 0}, "workspace_bytes must be positive"),
        ({"precision": "half"}, "no precision 'half'"),
    ],
)
def test_invalid_options_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EngineOptions(**values)


def test_progress_has_phases_and_seconds(fp32_graph: bytes, rtx: ModuleType) -> None:
    lines: list[str] = []
    build_engine(fp32_graph, EngineOptions(SHAPES), rtx, lines.append)
    assert lines[0].startswith("Parsing the graph (")
    assert any(line.startswith("Building engine (") for line in lines)
    assert all(line.endswith(" s)") for line in lines)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All messages of the binding, in order."""
    messages: list[str] = []
    note = BuildWatch.note

    def record(watch: BuildWatch, severity: str, message: str) -> None:
        messages.append(message)
        note(watch, severity, message)

    monkeypatch.setattr(BuildWatch, "note", record)
    return messages


@pytest.mark.parametrize("phase", ["Parsing the graph", "Building engine", "Cloning network graph"])
def test_an_exception_in_on_progress_stops_the_build(
    phase: str, fp32_graph: bytes, rtx: ModuleType, heard: list[str]
) -> None:
    def stop(line: str) -> None:
        if line.startswith(f"{phase} ("):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(fp32_graph, EngineOptions(SHAPES), rtx, stop)
    assert not any(message.startswith("Layers:") for message in heard)


def raise_keyboard_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt("raised by a custom handler")


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals need the main thread")
@pytest.mark.parametrize("handler", [signal.default_int_handler, raise_keyboard_interrupt])
@pytest.mark.parametrize("moment", ["Parsing node: stem", "Original: ", "Layers:"])
def test_ctrl_c_inside_the_binding_is_not_lost(
    moment: str, handler: Callable[..., None], fp32_graph: bytes, rtx: ModuleType, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    press_in_the_log(monkeypatch, moment)
    with handled_by(handler):
        with pytest.raises(KeyboardInterrupt):
            build_engine(fp32_graph, EngineOptions(SHAPES), rtx)
        assert signal.getsignal(signal.SIGINT) is handler
    assert "Exception caught" not in capfd.readouterr().err


def test_a_signal_handler_that_returns_does_not_stop_the_build(
    fp32_graph: bytes, rtx: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []
    press_in_the_log(monkeypatch, "Original: ")
    with handled_by(lambda number, frame: heard.append(number)):
        assert build_engine(fp32_graph, EngineOptions(SHAPES), rtx).engine
    assert heard
    assert set(heard) == {signal.SIGINT}


def test_engines_are_built_outside_the_main_thread(fp32_graph: bytes, rtx: ModuleType) -> None:
    built: list[BuiltEngine] = []
    thread = threading.Thread(target=lambda: built.append(build_engine(fp32_graph, EngineOptions(SHAPES), rtx)))
    thread.start()
    thread.join(60)
    assert built[0].layers.product_summary().keys() == {"fp32"}


@pytest.mark.parametrize(("name", "extra"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "rtx")])
def test_a_missing_binding_is_reported_with_its_install_command(
    name: Any, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name.replace("-", "_"), None)
    with pytest.raises(EnvironmentIssue, match=rf"pip install 'cclip-deploy\[{extra}\]'"):
        load_binding(name)


def test_a_binding_that_does_not_load_is_reported_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(EnvironmentIssue, match=r"does not load: libnvinfer.so.11"):
        load_binding("tensorrt")


def test_an_unknown_binding_is_refused() -> None:
    with pytest.raises(UsageError, match="no TensorRT binding 'openvino'"):
        load_binding("openvino")  # type: ignore[arg-type]


def test_the_network_is_strongly_typed_on_every_version() -> None:
    def binding(version: str, **flags: int) -> Any:
        return SimpleNamespace(
            __name__="tensorrt", __version__=version, NetworkDefinitionCreationFlag=SimpleNamespace(**flags)
        )

    assert network_flags(binding("10.13.0", EXPLICIT_BATCH=0, STRONGLY_TYPED=1)) == 2
    assert network_flags(binding("12.0.0")) == 0
    assert binding_label(binding("12.0.0")) == ("tensorrt", "12.0.0")
    with pytest.raises(EnvironmentIssue, match=r"TensorRT 8\.6\.1 has no strongly typed networks"):
        network_flags(binding("8.6.1", EXPLICIT_BATCH=0))
