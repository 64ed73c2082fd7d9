"""Every fault that is planted into a bundle whose sums and hashes fit ends `verify` with exit code 4 and its name.

The faults are of the kinds that change masks without a changed checksum: another tokenizer or preprocessing, and layers
of a graph with other numbers, at the beginning, in the middle and at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.engines.build import SERVED
from cclip_deploy.imaging import preprocess
from cclip_deploy.inference import graph_chain
from cclip_deploy.prompts import tokenizer as tokens
from tests.bundles import copy_of, linked_copy, replace_text, reseal
from tests.cli.run import invoke
from tests.conftest import THREADS
from tests.made_bundles import add_precisions

pytestmark = pytest.mark.slow

Array = NDArray[Any]
Plant = Callable[[Path, pytest.MonkeyPatch], str]
EARLY, MIDDLE, LATE = 1, 18, 41
"""Places among the image encoder's 44 convolutions."""


@dataclass(frozen=True)
class Fault:
    """A fault by name; `plant` changes a bundle, or the code, and returns what the error has to name."""

    name: str
    plant: Plant


def tokenizer(name: str, change: Callable[[dict[str, Any]], object], named: str = "tokenizer/ids") -> Fault:
    """A fault of tokenizer.json."""

    def plant(copy: Path, _: pytest.MonkeyPatch) -> str:
        keep_graphs(copy)
        told = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
        change(told)
        replace_text(copy / "tokenizer.json", json.dumps(told))
        reseal(copy)
        return named

    return Fault(f"tokenizer: {name}", plant)


def manifest(name: str, change: Callable[[dict[str, Any]], object], named: str) -> Fault:
    """A fault of what the manifest says of preprocessing and threshold."""

    def plant(copy: Path, _: pytest.MonkeyPatch) -> str:
        keep_graphs(copy)
        reseal(copy, change)
        return named

    return Fault(f"manifest: {name}", plant)


def code(name: str, change: Callable[[pytest.MonkeyPatch], object], named: str) -> Fault:
    """A fault of the code that runs around the graphs, as another version or library would bring."""

    def plant(copy: Path, patch: pytest.MonkeyPatch) -> str:
        keep_graphs(copy)
        change(patch)
        return named

    return Fault(f"code: {name}", plant)


def weight(graph: str, place: int, name: str, change: Callable[[Array], Array], role: str = "weight") -> Fault:
    """A fault of a stored tensor of a convolution: its weight (or codes), their scale, or its bias."""

    def edit(model: onnx.ModelProto, node: onnx.NodeProto) -> str:
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        given = {output: each for each in model.graph.node for output in each.output}
        source = node.input[2] if role == "bias" else node.input[1]
        if role != "bias" and source not in stored:
            dequantize = given[source]
            source = dequantize.input[1 if role == "scale" else 0]
        put(stored[source], change(numpy_helper.to_array(stored[source]).copy()))
        return source

    return edited(graph, place, f"{role} {name}", edit)


def edited(
    graph: str, place: int, name: str, edit: Callable[[onnx.ModelProto, onnx.NodeProto], str], op_type: str = "Conv"
) -> Fault:
    """A fault of the node at a place among those of a type; `edit` returns what has to be named of it."""

    def plant(copy: Path, _: pytest.MonkeyPatch) -> str:
        keep_graphs(copy, graph)
        path = copy / "graphs" / f"{graph}.onnx"
        model = onnx.load(path)
        named = edit(model, [node for node in model.graph.node if node.op_type == op_type][place])
        path.unlink()
        onnx.save(model, path)
        reseal(copy)
        return named if "." in graph else f"{graph}/"

    return Fault(f"{graph} {op_type} {place}: {name}", plant)


def keep_graphs(copy: Path, *low: str) -> None:
    """Leave the FP32 graphs, and these, in a copy: what is not there costs no time."""

    def drop_others(told: dict[str, Any]) -> None:
        kept = {name: entry for name, entry in told["graphs"].items() if entry["precision"] == "fp32" or name in low}
        told["graphs"] = kept

    reseal(copy, drop_others)


def put(tensor: onnx.TensorProto, values: Array) -> None:
    before = numpy_helper.to_array(tensor)
    after = np.asarray(values, before.dtype).reshape(before.shape)
    tensor.CopyFrom(numpy_helper.from_array(after, tensor.name))


def shift_ids(told: dict[str, Any]) -> None:
    words = told["model"]["vocab"]
    for word, number in words.items():
        if number < 49406:
            words[word] = (number + 1) % 49406


def swap(first: str, second: str) -> Callable[[dict[str, Any]], None]:
    def change(told: dict[str, Any]) -> None:
        words = told["model"]["vocab"]
        words[first], words[second] = words[second], words[first]
        for token in told["added_tokens"]:
            token["id"] = words[token["content"]]

    return change


def truncate(told: dict[str, Any]) -> None:
    """The words after the first 40,000 are gone, and the merges that make them."""
    words = {word: number for word, number in told["model"]["vocab"].items() if number < 40000 or number > 49405}
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in told["model"]["merges"])
    told["model"]["vocab"] = words
    told["model"]["merges"] = [pair for pair in pairs if words.keys() >= {*pair, "".join(pair)}]


def truncate_vocabulary_alone(told: dict[str, Any]) -> None:
    merges = told["model"]["merges"]
    truncate(told)
    told["model"]["merges"] = merges


def drop_merges(count: int) -> Callable[[dict[str, Any]], None]:
    def change(told: dict[str, Any]) -> None:
        told["model"]["merges"] = told["model"]["merges"][: -count or None] if count > 0 else []

    return change


def group_digits(told: dict[str, Any]) -> None:
    split = told["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    split["Regex"] = split["Regex"].replace("\\p{N}|", "\\p{N}+|")


def keep_case(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tokens, "clean_prompt", lambda text: " ".join(text.split()))
    build = tokens._build

    def without_lowering(*vocabulary_and_merges: Any) -> tokens.Tokenizer:
        tokenizer = build(*vocabulary_and_merges)
        tokenizer.normalizer = tokens.normalizers.Sequence([])
        return tokenizer

    patch.setattr(tokens, "_build", without_lowering)


def reverse_channels(patch: pytest.MonkeyPatch) -> None:
    normalize = preprocess.normalize
    patch.setattr(preprocess, "normalize", lambda resized, chosen: normalize(resized[::-1], chosen))


def take_nearest(patch: pytest.MonkeyPatch) -> None:
    nearest = dict.fromkeys(("bilinear", "bicubic"), Image.Resampling.NEAREST)
    patch.setattr(preprocess, "_FILTERS", nearest)


def enlarge_by_nearest(patch: pytest.MonkeyPatch) -> None:
    def to_source(probability: Array, source_hw: tuple[int, int]) -> Array:
        image = Image.fromarray(np.ascontiguousarray(probability, np.float32))
        return np.asarray(image.resize(source_hw[::-1], Image.Resampling.NEAREST))

    patch.setattr(graph_chain, "to_source", to_source)


def set_field(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda told: told["preprocessing"].update(changes)


MEAN, STD = preprocess.Preprocessing().mean, preprocess.Preprocessing().std


def scaled(factor: float) -> Callable[[Array], Array]:
    return lambda values: (values.astype(np.float64) * factor).astype(values.dtype)


def zeros(values: Array) -> Array:
    return np.zeros_like(values)


def negated(values: Array) -> Array:
    return -values


def swap_channels(values: Array) -> Array:
    values[[0, 1]] = values[[1, 0]]
    return values


def permute_row(values: Array) -> Array:
    values[0] = values[0, ::-1]
    return values


def scale_of_data(factor: float) -> Callable[[onnx.ModelProto, onnx.NodeProto], str]:
    def edit(model: onnx.ModelProto, node: onnx.NodeProto) -> str:
        tensor = next(t for t in model.graph.initializer if t.name == node.input[1])
        put(tensor, numpy_helper.to_array(tensor) * factor)
        return tensor.name

    return edit


def swap_ranges(model: onnx.ModelProto, node: onnx.NodeProto) -> str:
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    others = [n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[1] != node.input[1]]
    values = [numpy_helper.to_array(stored[name]) for name in (node.input[1], others[0])]
    assert values[0] != values[1]
    put(stored[node.input[1]], values[1])
    put(stored[others[0]], values[0])
    return others[0]


def shift_zero_point(model: onnx.ModelProto, node: onnx.NodeProto) -> str:
    """A zero point of its own for one tensor, in both nodes of its pair."""
    zero = f"{node.name}/zero"
    model.graph.initializer.append(numpy_helper.from_array(np.array(9, np.int8), zero))
    for reader in model.graph.node:
        if reader.input[0] in node.output and reader.op_type == "DequantizeLinear":
            reader.input[2] = zero
    node.input[2] = zero
    return node.name


def other_attribute(name: str, values: list[int]) -> Callable[[onnx.ModelProto, onnx.NodeProto], str]:
    def edit(model: onnx.ModelProto, node: onnx.NodeProto) -> str:
        attribute = next(a for a in node.attribute if a.name == name)
        attribute.ints[:] = values
        return node.name

    return edit


def other_operator(model: onnx.ModelProto, node: onnx.NodeProto) -> str:
    node.op_type = "Identity"
    return node.name


def other_input(model: onnx.ModelProto, node: onnx.NodeProto) -> str:
    node.input[1] = node.input[0]
    return node.name


FAULTS = [
    tokenizer("ids off by one", shift_ids),
    tokenizer("left and right swapped", swap("left</w>", "right</w>")),
    tokenizer("two other words swapped", swap("piano</w>", "zebra</w>"), "tokenizer/vocabulary"),
    tokenizer("no merges", drop_merges(0)),
    tokenizer("the last 20,000 merges missing", drop_merges(20000)),
    tokenizer("the last merge missing", drop_merges(1), "tokenizer/vocabulary"),
    tokenizer("start and end swapped", swap("<start_of_text>", "<end_of_text>")),
    tokenizer("truncated vocabulary with its merges", truncate),
    tokenizer("truncated vocabulary alone", truncate_vocabulary_alone),
    tokenizer("digits in groups", group_digits),
    code("lower-casing lost", keep_case, "tokenizer/ids"),
    manifest("mean", set_field(mean=[0.485, 0.456, 0.406]), "preprocessing/mean"),
    manifest("std", set_field(std=[0.229, 0.224, 0.225]), "preprocessing/std"),
    manifest("std of 1 %", set_field(std=[value * 1.01 for value in STD]), "preprocessing/std"),
    manifest("mean and std for BGR", set_field(mean=MEAN[::-1], std=STD[::-1]), "preprocessing/mean"),
    manifest("resize filter", set_field(resize_filter="bilinear"), "preprocessing/resize_filter"),
    manifest("threshold lower", lambda told: told.update(threshold=0.4), "threshold/value"),
    manifest("threshold higher", lambda told: told.update(threshold=0.501), "threshold/value"),
    code("channel order", reverse_channels, "preprocessing/pictures/input"),
    code("no antialiasing", take_nearest, "preprocessing/pictures/input"),
    code("masks enlarged by nearest neighbors", enlarge_by_nearest, "chain/pictures/masks"),
    weight("image_encoder", EARLY, "x 1.01", scaled(1.01)),
    weight("image_encoder", MIDDLE, "x 1.01", scaled(1.01)),
    weight("image_encoder", LATE, "x 1.01", scaled(1.01)),
    weight("image_encoder", MIDDLE, "dropped", zeros, "bias"),
    edited("prompt_encoder", 0, "input", other_input, "Add"),
    weight("image_encoder.int8", EARLY, "negated", negated),
    weight("image_encoder.int8", MIDDLE, "negated", negated),
    weight("image_encoder.int8", LATE, "negated", negated),
    weight("image_encoder.int8", EARLY, "zeroed", zeros),
    weight("image_encoder.int8", LATE, "zeroed", zeros),
    weight("image_encoder.int8", EARLY, "x 1.5", scaled(1.5), "scale"),
    weight("image_encoder.int8", MIDDLE, "x 1.5", scaled(1.5), "scale"),
    weight("image_encoder.int8", LATE, "x 2", scaled(2), "scale"),
    weight("image_encoder.int8", MIDDLE, "channels swapped", swap_channels),
    weight("image_encoder.int8", LATE, "channels swapped", swap_channels),
    weight("image_encoder.int8", EARLY, "dropped", zeros, "bias"),
    weight("image_encoder.int8", LATE, "dropped", zeros, "bias"),
    edited("image_encoder.int8", 3, "scale x 2", scale_of_data(2), "QuantizeLinear"),
    edited("image_encoder.int8", 20, "wrong zero point", shift_zero_point, "QuantizeLinear"),
    edited("image_encoder.int8", 5, "range of another tensor", swap_ranges, "QuantizeLinear"),
    weight("image_encoder.int8-fp16", MIDDLE, "negated", negated),
    weight("image_encoder.int8-fp16", LATE, "x 1.5", scaled(1.5), "scale"),
    edited("image_encoder.int8-fp16", 9, "scale x 2", scale_of_data(2), "QuantizeLinear"),
    weight("image_encoder.fp16", EARLY, "x 1.03", scaled(1.03)),
    weight("image_encoder.fp16", MIDDLE, "x 1.03", scaled(1.03)),
    weight("image_encoder.fp16", LATE, "x 1.10", scaled(1.10)),
    weight("image_encoder.fp16", EARLY, "dropped", zeros, "bias"),
    weight("image_encoder.fp16", LATE, "a row permuted", permute_row),
    edited("image_encoder.fp16", 30, "removed", other_operator, "Relu"),
    edited("image_encoder.fp16", 0, "pads", other_attribute("pads", [0, 0, 2, 2])),
    edited("prompt_encoder.fp16", 2, "input", other_input, "Add"),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_ends_verify_with_exit_code_4_and_a_name(
    fault: Fault, low_bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = linked_copy(low_bundle_path, tmp_path)
    named = fault.plant(copy, monkeypatch)
    assert Bundle.open(copy).check_all() == ()
    done = invoke("verify", copy, "--threads", str(THREADS), "--json")
    assert done.exit_code == 4, done.output
    failed = [check for check in json.loads(done.stdout)["checks"] if not check["passed"]]
    said = [f"{check['name']} {check['detail']}" for check in failed]
    assert any(named in text for text in said), said
    assert failed[0]["name"] in done.stderr


def test_a_sound_bundle_passes_in_every_precision(low_bundle_path: Path, tmp_path: Path) -> None:
    copy = copy_of(low_bundle_path, tmp_path)
    add_precisions(copy, ("bf16", "fp8", "fp8-fp16"))
    done = invoke("verify", copy, "--threads", str(THREADS), "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    checked = {
        (check["graph"], check["precision"]) for check in told["checks"] if check["name"].endswith("/derivation")
    }
    assert checked == {
        *((graph, precision) for graph in SERVED for precision in ("fp16", "bf16")),
        *(("image_encoder", precision) for precision in ("int8", "int8-fp16", "fp8", "fp8-fp16")),
    }  # fmt: skip
    layers = [check for check in told["checks"] if check["metric"] == "layer_error"]
    assert len(layers) == 8
    assert all(0 < check["value"] < check["limit"] / 2 for check in layers)
    assert {check["graph"] for check in told["checks"] if check["precision"] == "all"} == {
        "tokenizer", "preprocessing", "threshold",
    }  # fmt: skip


def test_a_sound_bundle_passes_in_openvino(low_bundle_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    copy = copy_of(low_bundle_path, tmp_path)
    others = [name for name in Bundle.open(copy).manifest.graphs if "int8-fp16" not in name]
    keep_graphs(copy, *others)
    done = invoke("verify", copy, "--backend", "openvino", "--threads", str(THREADS), "--json")
    assert done.exit_code == 0, done.output
