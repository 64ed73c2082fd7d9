"""Bundles that try to read, write or run something outside are refused with one error.

Their checksums are valid: a checksum detects damage, but does not make an untrusted bundle harmless.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from cclip_deploy.bundle.bundle import Bundle, edited_bundle
from cclip_deploy.errors import BundleError, CclipError
from cclip_deploy.inference.predict import predict
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from cclip_deploy.verify.inspect import describe_bundle
from cclip_deploy.verify.verify import VerifyOptions, verify_bundle
from tests.bundles import Change, copy_of, digests, reseal, seal

OUTSIDE = ["../outside", "graphs/../../outside", "/etc/passwd", "//etc/passwd", "..", ".", "", "a\\..\\..\\outside"]


@pytest.fixture
def copy(tiny_bundle_path: Path, tmp_path: Path) -> Path:
    return copy_of(tiny_bundle_path, tmp_path / "here")


def use_everything(bundle: Path, output: Path) -> None:
    """Inspect, verify and predict, as somebody would who was given a bundle."""
    describe_bundle(bundle)
    opened = Bundle.open(bundle)
    verify_bundle(opened, VerifyOptions(threads=1))
    film = output.parent / "film.png"
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(film)
    predict(Segmenter.of_bundle(opened, OnnxRuntimeBackend(opened, threads=1)), [film], ["lung"], output)


@pytest.mark.parametrize("name", OUTSIDE)
def test_checksums_of_files_outside_are_refused(copy: Path, name: str) -> None:
    with (copy / "SHA256SUMS").open("a") as sums:
        sums.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(BundleError, match="SHA256SUMS is damaged"):
        Bundle.open(copy)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"no checksum\n", b"0" * 64 + b" *manifest.json\n", b"\n"])
def test_an_invalid_list_of_checksums_is_refused(copy: Path, content: bytes) -> None:
    (copy / "SHA256SUMS").write_bytes(content)
    with pytest.raises(BundleError, match="SHA256SUMS"):
        Bundle.open(copy)


def test_an_empty_list_of_checksums_covers_nothing(copy: Path) -> None:
    (copy / "SHA256SUMS").write_bytes(b"")
    with pytest.raises(BundleError, match=r"manifest\.json has no checksum"):
        Bundle.open(copy)


def graph_file(name: str) -> Change:
    return lambda manifest: manifest["graphs"]["fused"].update(file=name)


def reference_file(name: str) -> Change:
    return lambda manifest: manifest.update(references=[name])


def engine_file(name: str) -> Change:
    engine = {
        "graph": "fused", "backend": "tensorrt-rtx", "backend_version": "1", "precision": "fp32", "file": name,
        "sha256": "0" * 64, "graph_sha256": "0" * 64, "layers": name, "shapes": {}, "target": "x", "build_seconds": 1,
    }  # fmt: skip
    return lambda manifest: manifest.update(engines=[engine])


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("change", [graph_file, reference_file, engine_file])
def test_a_manifest_that_names_files_outside_is_refused(copy: Path, name: str, change: Callable[[str], Change]) -> None:
    reseal(copy, change(name))
    with pytest.raises(BundleError, match="is outside the bundle"):
        Bundle.open(copy)


@pytest.mark.parametrize("change", [graph_file, reference_file, engine_file])
def test_a_manifest_that_names_files_that_are_not_there_is_refused(
    copy: Path, tmp_path: Path, change: Callable[[str], Change]
) -> None:
    reseal(copy, change("graphs/nowhere.onnx"))
    with pytest.raises(BundleError, match=r"nowhere\.onnx"):
        use_everything(copy, tmp_path / "out")


@pytest.mark.parametrize("name", ["x" * 300, "x\0y", "graphs", "graphs/fused.onnx/x"])
def test_a_checksum_of_what_cannot_be_a_file_is_an_error(copy: Path, name: str) -> None:
    with (copy / "SHA256SUMS").open("a") as sums:
        sums.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(BundleError):
        Bundle.open(copy).check_all()


def test_a_pipe_in_a_files_place_does_not_hang(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    os.mkfifo(copy / "tokenizer.json")
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing"):
        Bundle.open(copy).tokenizer()


@pytest.mark.parametrize("target", ["/dev/zero", "/", "nowhere", "tokenizer.json"])
def test_a_link_in_a_files_place_does_not_lead_astray(copy: Path, target: str) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").symlink_to(target)
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Bundle.open(copy).tokenizer()


def test_an_edit_does_not_write_through_a_link(copy: Path, tmp_path: Path) -> None:
    """A manifest that is a link to somebody's file: the edit makes a file of its own."""
    victim = tmp_path / "victim.json"
    victim.write_bytes((copy / "manifest.json").read_bytes())
    (copy / "manifest.json").unlink()
    (copy / "manifest.json").symlink_to(victim)
    before = victim.read_bytes()
    from cclip_deploy.bundle.bundle import write_manifest

    bundle = Bundle.open(copy)
    with edited_bundle(bundle) as folder:
        write_manifest(folder, bundle.manifest.model_copy(update={"command": "edited"}))
    assert victim.read_bytes() == before
    assert not (copy / "manifest.json").is_symlink()
    assert Bundle.open(copy).manifest.command == "edited"


def graph_with_weights_in(location: str) -> bytes:
    """A prompt encoder of the right names whose bias lies in another file."""
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    weights.data_location = TensorProto.EXTERNAL
    entry = weights.external_data.add()
    entry.key, entry.value = "location", location
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])], [weights],
    )  # fmt: skip
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    )


@pytest.mark.parametrize("absolute", [True, False])
def test_a_graph_cannot_take_weights_from_a_file_outside(copy: Path, tmp_path: Path, absolute: bool) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.ones(4, np.float32).tobytes())
    location = str(secret) if absolute else "../../../secret.bin"
    assert absolute or (copy / "graphs" / location).resolve() == secret
    (copy / "graphs" / "fused.onnx").write_bytes(graph_with_weights_in(location))
    reseal(copy)
    with pytest.raises(BundleError, match="external weights"):
        OnnxRuntimeBackend(Bundle.open(copy)).load("fused")


def test_a_graph_with_an_operator_of_its_own_is_refused(copy: Path) -> None:
    model = onnx.load(copy / "graphs" / "mask_decoder.onnx")
    model.graph.node[0].op_type, model.graph.node[0].domain = "RunShell", "stranger"
    onnx.save(model, copy / "graphs" / "mask_decoder.onnx")
    reseal(copy)
    with pytest.raises(BundleError, match="has operator 'RunShell' of 'stranger'"):
        OnnxRuntimeBackend(Bundle.open(copy)).load("mask_decoder")


def test_a_reference_with_a_pickle_inside_runs_nothing(copy: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    path = copy / "reference" / "seeded.npz"
    with np.load(path) as file:
        arrays = dict(file)
    arrays["out/prompt_encoder/bias"] = np.array([Payload()], dtype=object)
    np.savez(path, **arrays)
    reseal(copy)
    with pytest.raises(BundleError, match="is not a reference"):
        verify_bundle(Bundle.open(copy), VerifyOptions(threads=1))
    assert not (tmp_path / "pwned").exists()


HUGE = 2**40


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(prompt_length=HUGE),
        lambda manifest: manifest.update(image_hw=[HUGE, HUGE]),
        lambda manifest: manifest.update(image_hw=[-64, 96]),
        lambda manifest: manifest.update(model={}),
        lambda manifest: manifest.update(threshold="half"),
        lambda manifest: manifest.update(graphs={}),
        lambda manifest: manifest["graphs"].pop("mask_decoder"),
        lambda manifest: manifest["graphs"].update({"[/b]": manifest["graphs"].pop("fused")}),
        lambda manifest: manifest["graphs"]["image_encoder"].update(precision="fp64"),
        lambda manifest: manifest["preprocessing"].update(mean=[1e999, 0, 0]),
    ],
)
def test_a_manifest_of_wrong_values_is_one_error_and_no_traceback(copy: Path, tmp_path: Path, change: Change) -> None:
    reseal(copy, change)
    with pytest.raises(CclipError):
        use_everything(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []


def test_sizes_that_agree_with_each_other_but_not_with_the_graph_cost_no_memory(copy: Path, tmp_path: Path) -> None:
    """A forger who changes every mention of the size; half a terabyte is never asked for."""

    def enlarge(manifest: dict[str, Any]) -> None:
        side = 2**18
        manifest["image_hw"] = [side, side]
        for graph in manifest["graphs"].values():
            for tensor in (*graph["inputs"], *graph["outputs"]):
                tensor["shape"] = [side if size in (64, 96) else size for size in tensor["shape"]]

    reseal(copy, enlarge)
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
from pathlib import Path
from tests.attacks.test_hostile_bundles import use_everything
from cclip_deploy.errors import CclipError
try:
    use_everything(Path({str(copy)!r}), Path({str(tmp_path / "out")!r}))
except CclipError as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "BundleError\n", done.stderr


def test_markup_in_a_manifest_is_shown_and_not_obeyed(copy: Path) -> None:
    reseal(copy, lambda manifest: manifest.update(command="cclip-deploy [/b] [blink]export"))
    from tests.cli.run import invoke

    shown = invoke("inspect", copy)
    assert shown.exit_code == 0, shown.exception
    assert "[/b] [blink]export" in shown.stdout


def test_terminal_codes_in_a_manifest_do_not_reach_the_terminal(copy: Path) -> None:
    reseal(copy, lambda manifest: manifest.update(command="cclip-deploy \x1b]0;owned\x07 \x1b[2Jexport"))
    from tests.cli.run import invoke

    assert "\x1b" not in invoke("inspect", copy).stdout


def test_an_invalid_tokenizer_is_an_error(copy: Path) -> None:
    for content in (b"", b"{}", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', b"\xff"):
        (copy / "tokenizer.json").write_bytes(content)
        seal(copy)
        with pytest.raises(CclipError) as caught:
            Bundle.open(copy).tokenizer()
        assert caught.value.exit_code == 6


def test_a_hostile_bundle_changes_nothing_around_it(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    reseal(copy, graph_file("../../outside"))
    before = digests(tmp_path)
    with pytest.raises(BundleError):
        use_everything(copy, tmp_path / "out")
    assert digests(tmp_path) == before


def test_a_deeply_nested_manifest_is_an_error(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    text = json.dumps({**manifest, "model": 1}).replace('"model": 1', f'"model": {{"name": {"[" * 5000}{"]" * 5000}}}')
    (copy / "manifest.json").write_text(text)
    seal(copy)
    with pytest.raises(BundleError, match="is not a manifest"):
        Bundle.open(copy)
