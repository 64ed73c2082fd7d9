"""Graphs that read other files, never end or exhaust memory are refused before a runtime loads them.

The checksums of every bundle here are valid.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.engines.build import BuildOptions, build_engines
from cclip_deploy.errors import BundleError, EnvironmentIssue, UsageError
from cclip_deploy.parity.reference import expand, load_references
from cclip_deploy.runtime.graph_check import check_graph
from cclip_deploy.runtime.graph_model import load_model
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from cclip_deploy.runtime.openvino.backend import OpenVinoBackend
from cclip_deploy.verify.inspect import describe_bundle
from cclip_deploy.verify.verify import VerifyOptions, verify_bundle
from tests.attacks.hostile_graphs import (
    EXTERNAL,
    PLACE,
    SIZES,
    STRUCTURES,
    Change,
    add_weight,
    append,
    endless_loop,
    long_chain,
    rewrite,
)  # fmt: skip
from tests.bundles import linked_copy, reseal

GRAPH = "mask_decoder"


@pytest.fixture
def copy(tiny_bundle_path: Path, tmp_path: Path) -> Path:
    return linked_copy(tiny_bundle_path, tmp_path)


def build(bundle: Bundle) -> None:
    build_engines(bundle, BuildOptions(precision="fp32", graphs=(GRAPH,)))


FACES: dict[str, Callable[[Bundle], object]] = {
    "ONNX Runtime": lambda bundle: OnnxRuntimeBackend(bundle, threads=1).load(GRAPH),
    "OpenVINO": lambda bundle: OpenVinoBackend(bundle, threads=1).load(GRAPH),
    "derivations": lambda bundle: load_model(bundle, GRAPH),
    "inspect": lambda bundle: describe_bundle(bundle.path),
    "verify": lambda bundle: verify_bundle(bundle, VerifyOptions(threads=1)),
}
if importlib.util.find_spec("tensorrt_rtx"):
    FACES["TensorRT-RTX"] = build


def refused_everywhere(folder: Path, reason: str) -> None:
    """Every program that reads a graph refuses it, and says why."""
    for use in FACES.values():
        with pytest.raises(BundleError, match=reason):
            use(Bundle.open(folder))


@pytest.mark.parametrize("change", EXTERNAL.values(), ids=EXTERNAL)
def test_weights_in_another_file_are_refused_even_where_it_has_a_checksum(copy: Path, change: Change) -> None:
    """Before, ONNX Runtime, OpenVINO and TensorRT took them, whatever the file held, listed or not."""
    (copy / "graphs" / "weights.bin").write_bytes(np.ones(1, np.float32).tobytes())
    rewrite(copy, change)
    reseal(copy)
    refused_everywhere(copy, "which exports do not use")


def stray_file(path: Path) -> None:
    path.write_bytes(b"weights")


def stray_link(path: Path) -> None:
    path.symlink_to("mask_decoder.onnx")


def stray_hard_link(path: Path) -> None:
    os.link(path.parent.parent / "tokenizer.json", path)


def stray_pipe(path: Path) -> None:
    os.mkfifo(path)


def stray_folder(path: Path) -> None:
    path.mkdir()
    (path / "weights.bin").write_bytes(b"weights")


@pytest.mark.parametrize("folder", ["graphs", "engines"])
@pytest.mark.parametrize("name", ["weights.bin", ".hidden"])
@pytest.mark.parametrize("put", [stray_file, stray_link, stray_hard_link, stray_pipe, stray_folder])
def test_a_file_among_graphs_or_engines_that_is_not_listed_is_refused(
    copy: Path, folder: str, name: str, put: Callable[[Path], None]
) -> None:
    """Before, `verify` noted it, said that nothing of it is loaded and passed; backends did not look."""
    (copy / folder).mkdir(exist_ok=True)
    put(copy / folder / name)
    refused_everywhere(copy, f"contains {folder}/{name}.*, which SHA256SUMS does not list")


def test_a_folder_of_graphs_that_is_a_link_is_refused(copy: Path, tmp_path: Path) -> None:
    """Before, it was followed: what lies beside the graphs there has no checksum."""
    (copy / "graphs").rename(tmp_path / "elsewhere")
    (copy / "graphs").symlink_to(tmp_path / "elsewhere")
    refused_everywhere(copy, "graphs is a symbolic link")


def test_a_file_elsewhere_is_only_noted(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    assert "notes.txt have no checksum" in " ".join(verify_bundle(Bundle.open(copy), VerifyOptions(threads=1)).notes)


def check(content: bytes, bundle: Bundle) -> None:
    check_graph(content, Path("hostile.onnx"), bundle.graph(GRAPH))


def changed(bundle: Path, change: Change) -> bytes:
    model = onnx.load(bundle / PLACE)
    change(model)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("change", STRUCTURES.values(), ids=STRUCTURES)
def test_what_no_export_consists_of_is_refused(tiny_bundle: Bundle, change: Change) -> None:
    """Before, runtimes took most of them: the Loop never ended, the functions filled the memory."""
    with pytest.raises(BundleError, match="which exports do not use"):
        check(changed(tiny_bundle.path, change), tiny_bundle)


@pytest.mark.parametrize("change", SIZES.values(), ids=SIZES)
def test_small_files_of_huge_tensors_are_refused(tiny_bundle: Bundle, change: Change) -> None:
    """Before, each asked for terabytes in its first run: a traceback at best, the end of the process at worst."""
    content = changed(tiny_bundle.path, change)
    assert len(content) < 30_000
    with pytest.raises(BundleError, match=r"tensors have .* elements|has shape"):
        check(content, tiny_bundle)


def weight_without_values(model: onnx.ModelProto) -> None:
    model.graph.initializer.add(name="w", data_type=1, dims=[2**40])


def weight_of_negative_size(model: onnx.ModelProto) -> None:
    model.graph.initializer.add(name="w", data_type=1, dims=[-1, -4], raw_data=bytes(16))


def tensor_made_twice(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Relu", ["bias"], ["view"]))


def node_out_of_order(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Relu", ["logits"], ["early"]))


def a_million_nodes(model: onnx.ModelProto) -> None:
    model.graph.node.extend([helper.make_node("Relu", ["bias"], ["x"])] * 20_001)


def shape_from_data(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("ArgMax", ["bias"], ["sides"]))
    model.graph.node.append(helper.make_node("Expand", ["bias", "sides"], ["wide"]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (weight_without_values, r"shape \(1099511627776,\) has 0 bytes"),
        (weight_of_negative_size, "has 16 bytes"),
        (tensor_made_twice, "'view' is computed twice"),
        (node_out_of_order, "which no earlier node computes"),
        (a_million_nodes, "more than 20000"),
        (shape_from_data, "a shape depends on data"),
    ],
)
def test_contradictions_are_refused_in_words(tiny_bundle: Bundle, change: Change, reason: str) -> None:
    with pytest.raises(BundleError, match=rf"hostile\.onnx is not a graph that cclip-deploy exports: .*{reason}"):
        check(changed(tiny_bundle.path, change), tiny_bundle)


def varint(number: int) -> bytes:
    septets = []
    while True:
        septets.append(number & 0x7F | (0x80 if number > 0x7F else 0))
        number >>= 7
        if not number:
            return bytes(septets)


MALFORMED = {
    "nothing": b"",
    "no field ends": b"\x80" * 100,
    "longer than the file": b"\x3a" + varint(2**62),
    "a group": b"\x3b\x3c",
    "a field of another type": b"\x38\x01",
    "two graphs": b"\x3a\x00\x3a\x00",
    "a name that is no text": b"\x3a" + varint(6) + b"\x0a\x04\x1a\x02\xff\xff",
    "an unknown field": b"\xfa\x7f\x00",
    "a million empty nodes": b"\x3a" + varint(2_000_000) + b"\x0a\x00" * 1_000_000,
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_bytes_that_are_not_a_graph_are_refused_in_words(tiny_bundle: Bundle, content: bytes) -> None:
    with pytest.raises(BundleError, match=r"hostile\.onnx is not a graph that cclip-deploy exports"):
        check(content, tiny_bundle)


def test_a_second_graph_is_not_hidden_behind_the_first(tiny_bundle: Bundle) -> None:
    """Protocol buffers merge a message that is there twice: who reads only one would miss the other's nodes."""
    content = (tiny_bundle.path / PLACE).read_bytes()
    loop = onnx.ModelProto()
    loop.graph.node.append(helper.make_node("Loop", [], ["x"]))
    with pytest.raises(BundleError, match="twice"):
        check(content + loop.SerializeToString(), tiny_bundle)


def test_every_truncation_is_refused(tiny_bundle: Bundle) -> None:
    content = (tiny_bundle.path / PLACE).read_bytes()
    for length in range(0, len(content) - 60, 37):  # the last fields, such as the operator sets, may be missing unseen
        with pytest.raises(BundleError):
            check(content[:length], tiny_bundle)


def test_names_of_a_file_do_not_fill_the_message(tiny_bundle: Bundle) -> None:
    def long_name(model: onnx.ModelProto) -> None:
        model.graph.node[0].op_type = "\x1b[2J" * 5000

    with pytest.raises(BundleError) as caught:
        check(changed(tiny_bundle.path, long_name), tiny_bundle)
    assert len(str(caught.value)) < 1000
    assert "\x1b" not in str(caught.value)


BACKENDS = {"ONNX Runtime": OnnxRuntimeBackend, "OpenVINO": OpenVinoBackend}


@pytest.fixture
def unchecked(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], Bundle]:
    """The bundle with a changed graph whose structure is not checked, to see what is behind that check."""
    monkeypatch.setattr("cclip_deploy.runtime.graph_check.check_graph", lambda *_: None)

    def change_graph(change: Change) -> Bundle:
        rewrite(copy, change)
        reseal(copy)
        return Bundle.open(copy)

    return change_graph


def wrong_place(model: onnx.ModelProto) -> None:
    """Reads the millionth value of a vector, by a place that is known at run time alone."""
    add_weight(model, "million", [1_000_000.0], np.float32)
    append(
        model,
        helper.make_node("Add", ["bias", "million"], ["place"]),
        helper.make_node("Cast", ["place"], ["place_int"], to=onnx.TensorProto.INT64),
        helper.make_node("Gather", ["bias", "place_int"], ["taken"]),
    )


def wrong_shape(model: onnx.ModelProto) -> None:
    add_weight(model, "many_sides", [7, -1, 1013])
    append(model, helper.make_node("Reshape", ["features", "many_sides"], ["taken"]))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (wrong_shape, BundleError),
        (SIZES["pad"], (EnvironmentIssue, BundleError)),
    ],
)
def test_what_fails_in_a_run_is_an_error_that_names_the_graph(
    unchecked: Callable[[Change], Bundle], change: Change, kind: type[Exception], name: str
) -> None:
    """Before: tracebacks, and from OpenVINO, for tensors that it had no memory for, answers of no size."""
    bundle = unchecked(change)
    backend = BACKENDS[name](bundle, threads=1)
    with pytest.raises(kind, match=r"mask_decoder\.onnx"):
        backend.run(GRAPH, decoder_inputs(bundle))


def test_a_place_outside_a_tensor_is_an_error_that_names_the_graph(unchecked: Callable[[Change], Bundle]) -> None:
    """Before, a traceback. OpenVINO answers with a zero instead, which no caller can notice."""
    bundle = unchecked(wrong_place)
    with pytest.raises(BundleError, match=r"cannot run .*mask_decoder\.onnx.*Gather.*cclip-deploy verify"):
        OnnxRuntimeBackend(bundle, threads=1).run(GRAPH, decoder_inputs(bundle))


def test_inputs_that_a_graph_does_not_take_are_not_the_bundle_s_fault(tiny_bundle: Bundle) -> None:
    inputs = {**decoder_inputs(tiny_bundle), "bias": np.zeros((1, 1), np.float32)}
    with pytest.raises(UsageError, match=r"inputs do not match .*mask_decoder\.onnx"):
        OnnxRuntimeBackend(tiny_bundle, threads=1).run(GRAPH, inputs)


def decoder_inputs(bundle: Bundle) -> dict[str, np.ndarray]:
    return dict(expand(load_references(bundle)[0].decoder_inputs))


def test_an_endless_run_in_onnx_runtime_is_stopped(unchecked: Callable[[Change], Bundle]) -> None:
    """Before, it could not be stopped; a loop of 2**62 steps is refused by the structure check, which is off here."""
    bundle = unchecked(endless_loop)
    with pytest.raises(EnvironmentIssue, match=r"mask_decoder\.onnx ran longer than 0\.2 s and was stopped"):
        OnnxRuntimeBackend(bundle, threads=1, seconds_limit=0.2).run(GRAPH, decoder_inputs(bundle))


def test_a_long_run_in_openvino_is_stopped_between_operators(unchecked: Callable[[Change], Bundle]) -> None:
    """Three hundred products of 1024 x 1024 matrices: seconds, where nothing stops them."""
    bundle = unchecked(long_chain)
    with pytest.raises(EnvironmentIssue, match=r"mask_decoder\.onnx ran longer than 0\.01 s and was stopped"):
        OpenVinoBackend(bundle, threads=1, seconds_limit=0.01).run(GRAPH, decoder_inputs(bundle))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_limit_that_is_kept_changes_nothing(tiny_bundle: Bundle, name: str) -> None:
    inputs = decoder_inputs(tiny_bundle)
    free, limited = (BACKENDS[name](tiny_bundle, threads=1, seconds_limit=limit) for limit in (None, 600.0))
    for _ in range(3):  # what was answered before is not overwritten
        answer = limited.run(GRAPH, inputs)["logits"]
        np.testing.assert_array_equal(answer, free.run(GRAPH, inputs)["logits"])
        limited.run(GRAPH, {**inputs, "bias": inputs["bias"] + 1})
        np.testing.assert_array_equal(answer, free.run(GRAPH, inputs)["logits"])


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", BACKENDS)
def test_an_invalid_limit_is_refused(tiny_bundle: Bundle, name: str, limit: float) -> None:
    with pytest.raises(UsageError, match="seconds_limit"):
        BACKENDS[name](tiny_bundle, seconds_limit=limit)


def test_bytes_that_only_protobuf_refuses_are_an_error_in_words(copy: Path) -> None:
    """Half a text among the metadata, which the structure check leaves out. Before: a traceback of conversions."""
    content = (copy / PLACE).read_bytes() + b"\x72\x02\x0a\x7f"  # metadata_props
    check(content, Bundle.open(copy))
    (copy / PLACE).unlink()
    (copy / PLACE).write_bytes(content)
    reseal(copy)
    with pytest.raises(BundleError, match=r"mask_decoder\.onnx is not a graph"):
        load_model(Bundle.open(copy), GRAPH)
    with pytest.raises(BundleError, match=r"mask_decoder\.onnx"):
        OnnxRuntimeBackend(Bundle.open(copy), threads=1).load(GRAPH)


def test_a_name_of_a_size_that_is_not_a_text_is_an_error_in_words(copy: Path) -> None:
    """Found by flipping bytes: ONNX Runtime took it, and reading the graph's inputs back was a UnicodeDecodeError."""
    content = (copy / PLACE).read_bytes().replace(b"prompts", b"promp\xff\xfe")
    (copy / PLACE).unlink()
    (copy / PLACE).write_bytes(content)
    reseal(copy)
    with pytest.raises(BundleError, match=r"mask_decoder\.onnx contains names that are not UTF-8"):
        OnnxRuntimeBackend(Bundle.open(copy), threads=1).load(GRAPH)
