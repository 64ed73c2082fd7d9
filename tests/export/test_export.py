"""Export compares graphs before it writes a bundle, and leaves nothing on failure."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.common.files import sha256_file
from cclip_deploy.environment.packages import require_export_packages
from cclip_deploy.errors import CheckpointError, EnvironmentIssue, ImageError, ParityError, PromptError, UsageError
from cclip_deploy.export.export import ExportOptions, export_bundle
from cclip_deploy.model import checkpoint as checkpoints
from cclip_deploy.model.checkpoint import save_checkpoint
from cclip_deploy.model.config import TINY, InputForm
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.parity.compare import LIMITS
from cclip_deploy.parity.reference import load_references
from cclip_deploy.verify.verify import VerifyOptions, verify_bundle
from tests.bundles import copy_of, digests
from tests.conftest import THREADS, TINY_HW

OPTIONS = ExportOptions(TINY_HW, 24, with_masks=True, threads=THREADS)
WITH_TRACING = pytest.mark.usefixtures("traced_before")


def test_a_bundle_holds_graphs_tokenizer_references_and_sums(tiny_bundle_path: Path) -> None:
    assert sorted(digests(tiny_bundle_path)) == [
        "SHA256SUMS", "graphs/fused.onnx", "graphs/image_encoder.onnx", "graphs/mask_decoder.onnx",
        "graphs/prompt_encoder.onnx", "manifest.json", "reference/pictures.npz", "reference/seeded.npz",
        "tokenizer.json",
    ]  # fmt: skip
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=tiny_bundle_path).returncode == 0


def test_the_manifest_says_where_everything_came_from(tiny_bundle: Bundle, tiny_checkpoint: Path) -> None:
    manifest = tiny_bundle.manifest
    assert manifest.model == TINY.to_dict()
    assert (manifest.form, manifest.image_hw, manifest.prompt_length) == ("deploy", (64, 96), 24)
    assert (manifest.command, manifest.schema_version) == ("test", 2)
    origin = manifest.checkpoint
    assert (origin.name, origin.layout, origin.tensors_dropped) == ("tiny.safetensors", "ours", 0)
    assert origin.sha256 == sha256_file(tiny_checkpoint)
    assert {"torch", "onnx", "onnxruntime", "cclip-deploy"} <= manifest.versions.keys()
    for name, entry in manifest.graphs.items():
        assert entry.file == f"graphs/{name}.onnx"
        assert entry.sha256 == sha256_file(tiny_bundle.path / entry.file)
        assert entry.made_from_sha256 == origin.sha256
        assert entry.multiply_adds > 0


def test_graphs_have_the_names_and_dimensions_of_the_design(tiny_bundle: Bundle) -> None:
    sides = {
        name: {t.name: t.shape for t in (*entry.inputs, *entry.outputs)}
        for name, entry in tiny_bundle.manifest.graphs.items()
    }
    height, width, channels = 64, 96, TINY.feature_width
    mask = ("batch", TINY.neck_width, 4, 6)
    kernels = {"kernel": ("prompts", 9, channels), "tap_bias": ("prompts", 9), "bias": ("prompts",)}
    features = {"features": ("batch", height, width, channels)}
    assert sides == {
        "prompt_encoder": {"tokens": ("prompts", 24), **kernels},
        "image_encoder": {
            "image": ("batch", 3, height, width), **features, "mask3": mask, "mask4": mask, "mask5": mask,
        },
        "mask_decoder": {**features, **kernels, "logits": ("batch", "prompts", height, width)},
        "fused": {
            "image": ("batch", 3, height, width), "tokens": ("batch", 24), "logits": ("batch", 1, height, width),
        },
    }  # fmt: skip


@WITH_TRACING
def test_what_was_compared_is_reported_and_the_references_are_of_the_checkpoint(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    made = export_bundle(tiny_checkpoint, tmp_path / "new.cclip", OPTIONS, "cclip-deploy export", said.append)
    assert made.bundle.path == tmp_path / "new.cclip"
    assert {check.graph for check in made.checks} == {
        "tokenizer", "preprocessing", "threshold", "prompt_encoder", "image_encoder", "mask_decoder", "fused", "chain",
    }  # fmt: skip
    assert all(check.passed for check in made.checks)
    errors = [check for check in made.checks if check.metric in ("relative_error", "max_error", "mask_dice")]
    assert all(check.limit == getattr(LIMITS["fp32"], check.metric) for check in errors)
    assert [reference.name for reference in load_references(made.bundle)] == ["seeded", "pictures"]
    assert said[0] == f"Reading {tiny_checkpoint}"
    assert said[-1] == "Comparing every graph with PyTorch"


@WITH_TRACING
def test_images_and_prompts_of_ones_own_become_references(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "a.png")
    options = ExportOptions(
        TINY_HW, 24, with_masks=True, threads=THREADS,
        reference_images=(tmp_path / "a.png",), reference_prompts=("heart", "left lung", "rib"),
    )  # fmt: skip
    made = export_bundle(tiny_checkpoint, tmp_path / "new.cclip", options, "test")
    assert load_references(made.bundle)[1].logits.shape == (1, 3, *TINY_HW)


@WITH_TRACING
@pytest.mark.parametrize(
    ("trained_on", "options"),
    [
        (InputForm(TINY_HW, 24), ExportOptions(threads=THREADS)),
        (InputForm((32, 32), 24), ExportOptions(TINY_HW, threads=THREADS)),
        (InputForm(TINY_HW, 9), ExportOptions(prompt_length=24, threads=THREADS)),
    ],
    ids=["nothing asked", "another size asked", "another length asked"],
)
def test_a_bundle_is_what_is_asked_for_else_what_its_checkpoint_was_trained_on(
    trained_on: InputForm, options: ExportOptions, tiny_network: CausalCLIPSeg, tmp_path: Path
) -> None:
    save_checkpoint(tiny_network, tmp_path / "trained.safetensors", trained_on)
    made = export_bundle(tmp_path / "trained.safetensors", tmp_path / "new.cclip", options, "test")
    assert (made.bundle.manifest.image_hw, made.bundle.manifest.prompt_length) == (TINY_HW, 24)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"reference_prompts": ("heart", "")}, PromptError),
        ({"reference_prompts": ("heart " * 40,)}, PromptError),
        ({"reference_images": (Path("/nowhere.png"),)}, ImageError),
    ],
)
@WITH_TRACING
def test_an_unusable_reference_stops_the_export(
    changes: dict[str, Any], error: type[Exception], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(error):
        export_bundle(tiny_checkpoint, tmp_path / "new", ExportOptions(TINY_HW, 24, threads=THREADS, **changes), "test")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a checkpoint is read."""

    def read(path: Path) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(checkpoints, "load_checkpoint", read)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (ExportOptions((100, 96)), "100 is not a positive multiple of 32"),
        (ExportOptions((224, 0)), "0 is not a positive multiple"),
        (ExportOptions(prompt_length=2), "prompt length of 2"),
        (ExportOptions(prompt_length=0), "prompt length of 0"),
        (ExportOptions(prompt_length=78), "Use 3 to 77"),
        (ExportOptions(plain=True, batch=0), "Batch size 0"),
        (ExportOptions(batch=2), "--batch requires --plain"),
        (ExportOptions(plain=True, with_masks=True), "exclude --plain"),
        (ExportOptions(plain=True, with_confounding=True), "exclude --plain"),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_invalid_options_are_refused_before_any_work(
    options: ExportOptions, said: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        export_bundle(tiny_checkpoint, tmp_path / "new", options, "test")
    assert caught.value.exit_code == 2
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("no_work")
def test_an_output_that_exists_is_refused_before_any_work(
    tiny_checkpoint: Path, tiny_bundle_path: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    with pytest.raises(UsageError, match=r"exists already.*--force"):
        export_bundle(tiny_checkpoint, tiny_bundle_path, OPTIONS, "test")
    with pytest.raises(UsageError, match="is not a bundle, so --force does not replace it"):
        export_bundle(tiny_checkpoint, mine, ExportOptions(TINY_HW, 24, replace=True), "test")


@pytest.mark.parametrize("package", ["torch", "open_clip", "onnx", "onnxscript"])
def test_a_missing_package_names_the_extra_that_has_it(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(EnvironmentIssue, match=rf"needs {package}\. Install: pip install 'cclip-deploy\[export\]'"):
        require_export_packages()


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(64), b"PK\x03\x04" + bytes(64), b"text\n"], ids=str
)
def test_a_file_that_is_not_a_checkpoint_leaves_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    wrong = tmp_path / "in" / "model.pth"
    wrong.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        export_bundle(wrong, tmp_path / "out" / "new", OPTIONS, "test")
    assert caught.value.exit_code == 6
    assert os.listdir(tmp_path) == ["in"]


def test_a_truncated_checkpoint_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    short = tmp_path / "in" / "tiny.safetensors"
    short.write_bytes(tiny_checkpoint.read_bytes()[:-100_000])
    with pytest.raises(CheckpointError, match="truncated"):
        export_bundle(short, tmp_path / "new", OPTIONS, "test")
    assert os.listdir(tmp_path) == ["in"]


STAGES = [
    "Checking and writing graphs",
    "Recording references from images",
    "Comparing every graph with PyTorch",
]


def failing_at(stage: str, failure: BaseException) -> Callable[[str], None]:
    """A progress function that raises when a stage begins."""

    def tell(message: str) -> None:
        if message == stage:
            raise failure

    return tell


@pytest.mark.parametrize("stage", STAGES)
@WITH_TRACING
def test_ctrl_c_in_any_stage_leaves_nothing(stage: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        export_bundle(tiny_checkpoint, tmp_path / "a" / "new", OPTIONS, "test", failing_at(stage, KeyboardInterrupt()))
    assert os.listdir(tmp_path) == []


@WITH_TRACING
def test_a_failure_leaves_the_bundle_that_was_to_be_replaced(
    tiny_checkpoint: Path, tiny_bundle_path: Path, tmp_path: Path
) -> None:
    copy = copy_of(tiny_bundle_path, tmp_path)
    before = digests(copy)
    options = ExportOptions(TINY_HW, 24, with_masks=True, threads=THREADS, replace=True)
    with pytest.raises(RuntimeError, match="bug"):
        export_bundle(tiny_checkpoint, copy, options, "new", failing_at(STAGES[-1], RuntimeError("bug")))
    assert digests(copy) == before
    assert os.listdir(tmp_path) == [copy.name]
    export_bundle(tiny_checkpoint, copy, options, "new")
    assert Bundle.open(copy).manifest.command == "new"
    assert os.listdir(tmp_path) == [copy.name]


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("writer", ["onnx.save", "numpy.savez_compressed", "pathlib.Path.write_text"])
@WITH_TRACING
def test_a_full_disk_is_one_message_and_leaves_nothing(
    writer: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, full)
    with pytest.raises(EnvironmentIssue, match="The disk is full") as caught:
        export_bundle(tiny_checkpoint, tmp_path / "new", OPTIONS, "test")
    assert caught.value.exit_code == 3
    assert os.listdir(tmp_path) == []


def test_a_graph_that_strays_from_pytorch_is_not_published(
    traced_before: dict[str, onnx.ModelProto], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    weights = traced_before["fused"].graph.initializer
    changed = next(t for t in weights if len(t.dims) == 4 and t.data_type == onnx.TensorProto.FLOAT)
    values = numpy_helper.to_array(changed) * np.float32(1.01)
    changed.CopyFrom(numpy_helper.from_array(values, changed.name))
    with pytest.raises(ParityError, match="fused/seeded/logits"):
        export_bundle(tiny_checkpoint, tmp_path / "new", OPTIONS, "test")
    assert os.listdir(tmp_path) == []


def test_a_plain_bundle_is_one_static_graph_equal_to_pytorch(plain_bundle_path: Path) -> None:
    bundle = Bundle.open(plain_bundle_path)
    assert bundle.manifest.form == "plain"
    assert {t.name: t.shape for t in bundle.graph("plain").inputs} == {"image": (1, 3, 64, 96), "tokens": (1, 24)}
    assert list(bundle.manifest.graphs) == ["plain"]
    assert not bundle.graph("plain").dynamic()
    assert verify_bundle(bundle, VerifyOptions(threads=THREADS)).passed


@pytest.mark.slow
def test_a_plain_bundle_of_a_larger_batch_is_equal_to_pytorch(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions((32, 32), 8, plain=True, batch=3, threads=THREADS)
    made = export_bundle(tiny_checkpoint, tmp_path / "three.cclip", options, "test")
    assert {t.name: t.shape[0] for t in made.bundle.graph("plain").inputs} == {"image": 3, "tokens": 3}
    assert verify_bundle(made.bundle, VerifyOptions(threads=THREADS)).passed


def test_the_manifest_is_plain_json(tiny_bundle_path: Path) -> None:
    loaded = json.loads((tiny_bundle_path / "manifest.json").read_text())
    assert loaded["preprocessing"]["resize_filter"] == "bicubic"
    assert loaded["preprocessing"]["antialias"] is True
