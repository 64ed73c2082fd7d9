"""Traced graphs of a tiny network: validated by onnx, run by ONNX Runtime at sizes other than those traced."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from cclip_deploy import __version__
from cclip_deploy.graph.deploy import to_deploy_form
from cclip_deploy.graph.fuse import fuse
from cclip_deploy.graph.trace import OPSET, GraphPlan, plan_deploy_graphs, plan_plain_graph, trace
from cclip_deploy.model.config import TINY
from cclip_deploy.model.network import CausalCLIPSeg
from tests.numerics import randomized, relative_error

HW, LENGTH = (64, 96), 12
GRAPHS = ("prompt_encoder", "image_encoder", "mask_decoder", "row_decoder", "fused")
IMAGE_OUTPUTS = ("features", "mask3", "mask4", "mask5", "confounding_features")
LIMIT = 1e-5

Arrays = dict[str, NDArray[Any]]
Run = Callable[[str, Arrays], Arrays]

pytestmark = pytest.mark.slow  # tracing takes half a minute


@pytest.fixture(scope="module")
def network() -> CausalCLIPSeg:
    return randomized(CausalCLIPSeg(TINY), seed=6).float()


@pytest.fixture(scope="module")
def graphs(network: CausalCLIPSeg) -> dict[str, onnx.ModelProto]:
    form = to_deploy_form(network, HW, LENGTH, with_masks=True, with_confounding=True)
    traced = {plan.name: trace(plan) for plan in plan_deploy_graphs(form, TINY, HW, LENGTH)}
    return {**traced, "fused": fuse(*(traced[name] for name in ("image_encoder", "prompt_encoder", "row_decoder")))}


def session_of(graph: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def run(graphs: dict[str, onnx.ModelProto]) -> Run:
    sessions = {name: session_of(graph) for name, graph in graphs.items()}

    def compute(name: str, inputs: Arrays) -> Arrays:
        outputs = [value.name for value in sessions[name].get_outputs()]
        return dict(zip(outputs, sessions[name].run(outputs, inputs), strict=True))

    return compute


def images(batch: int) -> NDArray[np.float32]:
    return np.random.default_rng(batch).normal(size=(batch, 3, *HW)).astype(np.float32)


def prompts(rows: int) -> NDArray[np.int64]:
    tokens = np.zeros((rows, LENGTH), np.int64)
    for number, row in enumerate(tokens):
        end = 1 + (3 * number + 1) % (LENGTH - 1)
        row[0], row[1:end], row[end] = 49406, np.arange(300 + number, 299 + number + end), 49407
    return tokens


def error(actual: NDArray[Any], expected: torch.Tensor) -> float:
    return relative_error(torch.from_numpy(actual), expected)


def dimensions(values: Any) -> dict[str, list[str | int]]:
    return {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in values}


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_passes_onnx_s_checker_with_shapes(name: str, graphs: dict[str, onnx.ModelProto]) -> None:
    onnx.checker.check_model(graphs[name], full_check=True)
    assert graphs[name].graph.name == name
    assert (graphs[name].producer_name, graphs[name].producer_version) == ("cclip-deploy", __version__)
    assert [(opset.domain, opset.version) for opset in graphs[name].opset_import] == [("", OPSET)]
    assert not graphs[name].functions


def test_inputs_and_outputs_have_their_names_and_dimensions(graphs: dict[str, onnx.ModelProto]) -> None:
    height, width = HW
    kernel: dict[str, list[str | int]] = {"kernel": ["prompts", 9, 32], "tap_bias": ["prompts", 9], "bias": ["prompts"]}
    neck = ["batch", 64, height // 16, width // 16]
    features = {"features": ["batch", height, width, 32]}
    rows = {name: ["batch", *dims[1:]] for name, dims in kernel.items()}
    expected = {
        "prompt_encoder": ({"tokens": ["prompts", LENGTH]}, kernel),
        "image_encoder": ({"image": ["batch", 3, height, width]}, features | dict.fromkeys(IMAGE_OUTPUTS[1:], neck)),
        "mask_decoder": (features | kernel, {"logits": ["batch", "prompts", height, width]}),
        "row_decoder": (features | rows, {"logits": ["batch", 1, height, width]}),
        "fused": (
            {"image": ["batch", 3, height, width], "tokens": ["batch", LENGTH]},
            {"logits": ["batch", 1, height, width]},
        ),
    }
    actual = {name: (dimensions(g.graph.input), dimensions(g.graph.output)) for name, g in graphs.items()}
    assert actual == expected
    assert [value.name for value in graphs["fused"].graph.input] == ["image", "tokens"]
    assert [value.name for value in graphs["image_encoder"].graph.output] == list(IMAGE_OUTPUTS)


@pytest.mark.parametrize("name", GRAPHS)
def test_no_convolution_has_weights_made_at_run_time(name: str, graphs: dict[str, onnx.ModelProto]) -> None:
    stored = constants(graphs[name])
    convolutions = [node for node in graphs[name].graph.node if node.op_type.startswith("Conv")]
    assert [node.name for node in convolutions if not set(node.input[1:]) <= stored] == []
    assert bool(convolutions) == (name in ("image_encoder", "fused"))


@pytest.mark.parametrize("name", GRAPHS)
def test_constants_are_folded_and_no_result_is_unused(name: str, graphs: dict[str, onnx.ModelProto]) -> None:
    graph, stored = graphs[name].graph, constants(graphs[name])
    foldable = [n.name for n in graph.node if n.op_type != "Constant" and n.input and set(n.input) <= stored | {""}]
    assert foldable == []
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    assert [node.name for node in graph.node if not read & set(node.output)] == []
    assert not [node for node in graph.node if node.op_type in ("BatchNormalization", "Resize", "Dropout")]


def constants(model: onnx.ModelProto) -> set[str]:
    """Return the names of the graph's stored tensors."""
    held = {tensor.name for tensor in model.graph.initializer}
    return held | {node.output[0] for node in model.graph.node if node.op_type == "Constant"}


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_prompt_encoder_takes_any_number_of_prompts(rows: int, network: CausalCLIPSeg, run: Run) -> None:
    tokens = prompts(rows)
    out = run("prompt_encoder", {"tokens": tokens})
    state = network.text_tower(torch.from_numpy(tokens))
    kernel = network.head.kernel(state)
    mix, bias = network.head.mix.weight[:, :, 0, 0], network.head.mix.bias
    assert error(out["kernel"], torch.einsum("poyx,oi->pyxi", kernel.weight, mix).flatten(1, 2)) <= LIMIT
    assert error(out["tap_bias"], torch.einsum("poyx,o->pyx", kernel.weight, bias).flatten(1)) <= LIMIT
    assert error(out["bias"], kernel.bias) <= LIMIT


@pytest.mark.parametrize("batch", [1, 3])
def test_image_encoder_takes_any_number_of_images(batch: int, network: CausalCLIPSeg, run: Run) -> None:
    image = images(batch)
    out = run("image_encoder", {"image": image})
    neck = network.neck(network.image_tower(torch.from_numpy(image)))
    expected = (network.head.upsample(neck.causal).permute(0, 2, 3, 1), *neck.masks, neck.confounding)
    for name, value in zip(IMAGE_OUTPUTS, expected, strict=True):
        assert error(out[name], value) <= LIMIT


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (1, 5), (4, 1), (2, 2)])
def test_mask_decoder_decodes_every_prompt_on_every_image(
    batch: int, rows: int, network: CausalCLIPSeg, run: Run
) -> None:
    image, tokens = images(batch), prompts(rows)
    kernels = run("prompt_encoder", {"tokens": tokens})
    features = run("image_encoder", {"image": image})["features"]
    logits = run("mask_decoder", {"features": features, **kernels})["logits"]
    assert logits.shape == (batch, rows, *HW)
    state = network.text_tower(torch.from_numpy(tokens))
    upsampled = network.head.upsample(network.neck.causal_features(network.image_tower(torch.from_numpy(image))))
    for number in range(batch):
        alone = network.head.apply_prompt(upsampled[number : number + 1].expand(rows, -1, -1, -1), state)
        assert error(logits[number], alone[:, 0]) <= LIMIT


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_fused_graph_equals_the_network_and_the_chain_of_graphs(batch: int, network: CausalCLIPSeg, run: Run) -> None:
    image, tokens = images(batch), prompts(batch)
    logits = run("fused", {"image": image, "tokens": tokens})["logits"]
    assert logits.shape == (batch, 1, *HW)
    assert error(logits, network.causal_logits(torch.from_numpy(image), torch.from_numpy(tokens))) <= LIMIT
    features = run("image_encoder", {"image": image})["features"]
    kernels = run("prompt_encoder", {"tokens": tokens})
    chain = run("mask_decoder", {"features": features, **kernels})["logits"]
    assert error(logits[:, 0], torch.from_numpy(chain).diagonal().permute(2, 0, 1)) <= 1e-6


def test_the_logits_depend_on_the_image(run: Run) -> None:
    """Otherwise the comparisons above would pass whatever the image encoder computes."""
    image, tokens = images(2), prompts(1).repeat(2, axis=0)
    first, second = run("fused", {"image": image, "tokens": tokens})["logits"]
    assert error(first, torch.from_numpy(second)) > 1000 * LIMIT


def test_fusing_leaves_only_the_logits_and_the_inputs_of_both_halves(graphs: dict[str, onnx.ModelProto]) -> None:
    parts = ("image_encoder/", "prompt_encoder/", "row_decoder/")
    assert all(node.name.startswith(parts) for node in graphs["fused"].graph.node)
    names = [node.name for node in graphs["fused"].graph.node]
    assert len(set(names)) == len(names)


@pytest.fixture(scope="module")
def plain(network: CausalCLIPSeg) -> onnx.ModelProto:
    return trace(plan_plain_graph(network, HW, LENGTH, batch=2))


def test_plain_graph_has_a_static_batch_and_the_network_s_logits(
    network: CausalCLIPSeg, plain: onnx.ModelProto
) -> None:
    onnx.checker.check_model(plain, full_check=True)
    assert dimensions(plain.graph.input) == {"image": [2, 3, *HW], "tokens": [2, LENGTH]}
    assert dimensions(plain.graph.output) == {"logits": [2, 1, *HW]}
    image, tokens = images(2), prompts(2)
    [logits] = session_of(plain).run(["logits"], {"image": image, "tokens": tokens})
    assert error(logits, network.causal_logits(torch.from_numpy(image), torch.from_numpy(tokens))) <= LIMIT


def test_plain_graph_keeps_the_published_order(plain: onnx.ModelProto) -> None:
    """Two bilinear interpolations, CARAFE's nearest one, the embedding's bicubic one; the prompt's convolution last."""
    modes = [a.s for node in plain.graph.node if node.op_type == "Resize" for a in node.attribute if a.name == "mode"]
    assert sorted(modes) == [b"cubic", b"linear", b"linear", b"nearest"]
    stored = constants(plain)
    at_run_time = [node for node in plain.graph.node if node.op_type == "Conv" and node.input[1] not in stored]
    assert len(at_run_time) == 1


def test_tracing_leaves_loggers_and_the_module_as_they_were() -> None:
    logger = logging.getLogger("torch.onnx")
    level, module = logger.level, nn.Linear(3, 2).eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    plan = GraphPlan("line", module, {"x": torch.rand(2, 3)}, {"x": {0: "rows"}}, ("y",), {"y": {0: "rows"}})
    graph = trace(plan)
    assert logger.level == level
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in before.items())
    assert (dimensions(graph.graph.input), dimensions(graph.graph.output)) == ({"x": ["rows", 3]}, {"y": ["rows", 2]})


def test_graphs_contain_no_paths_of_the_tracing_machine(graphs: dict[str, onnx.ModelProto]) -> None:
    for graph in graphs.values():
        without_weights = onnx.ModelProto()
        without_weights.CopyFrom(graph)
        del without_weights.graph.initializer[:]
        assert b"/work/" not in without_weights.SerializeToString()
        assert b"site-packages" not in without_weights.SerializeToString()
