"""Bundles are written atomically, and only files with a correct checksum are loaded."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from cclip_deploy.bundle import bundle as bundle_module
from cclip_deploy.bundle.bundle import Bundle, check_output, edited_bundle, new_bundle, write_manifest
from cclip_deploy.bundle.manifest import graph_key
from cclip_deploy.errors import BundleError, EnvironmentIssue, UsageError
from cclip_deploy.parity.reference import load_references
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from tests.bundles import Change, copy_of, digests, flip_byte, reseal, seal


@pytest.fixture
def copy(tiny_bundle_path: Path, tmp_path: Path) -> Path:
    return copy_of(tiny_bundle_path, tmp_path / "here")


def test_sha256sum_alone_checks_a_bundle_and_finds_a_changed_byte(copy: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=copy, capture_output=True).returncode == 0
    listed = {line.split("  ")[1] for line in (copy / "SHA256SUMS").read_text().splitlines()}
    assert listed == set(digests(copy)) - {"SHA256SUMS"}
    flip_byte(copy / "graphs" / "fused.onnx")
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "graphs/fused.onnx: FAILED\n")


def test_a_changed_byte_in_any_file_is_refused_by_name(tiny_bundle_path: Path, tmp_path: Path) -> None:
    for name in digests(tiny_bundle_path):
        copy = copy_of(tiny_bundle_path, tmp_path)
        flip_byte(copy / name)
        said = None if name == "SHA256SUMS" else name  # a flipped name in it is another file, which is missing
        with pytest.raises(BundleError, match=said) as caught:
            Bundle.open(copy).check_all()
        assert caught.value.exit_code == 6
        shutil.rmtree(copy)


def test_nothing_of_an_altered_file_reaches_what_would_load_it(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[object] = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: loaded.append(a))
    monkeypatch.setattr(PromptTokenizer, "parse", lambda *a: loaded.append(a))
    monkeypatch.setattr("zipfile.ZipFile", lambda *a, **k: loaded.append(a))
    for name in ("graphs/prompt_encoder.onnx", "tokenizer.json", "reference/seeded.npz"):
        flip_byte(copy / name)
    bundle = Bundle.open(copy)
    for load in (lambda: OnnxRuntimeBackend(bundle).load("prompt_encoder"), bundle.tokenizer):
        with pytest.raises(BundleError, match="was altered"):
            load()
    with pytest.raises(BundleError, match="was altered"):
        load_references(bundle)
    assert loaded == []


@pytest.mark.parametrize("name", ["SHA256SUMS", "manifest.json", "tokenizer.json", "graphs/image_encoder.onnx"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError, match=name):
        Bundle.open(copy).check_all()


def test_a_path_without_a_bundle_raises(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="There is no bundle at"):
        Bundle.open(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="There is no bundle at"):
        Bundle.open(tmp_path / "file")
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.open(tmp_path)


def test_an_unreadable_file_raises(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("cclip_deploy.bundle.checksums.open", refuse, raising=False)
    with pytest.raises(BundleError, match=r"SHA256SUMS cannot be read \(Permission denied\)"):
        Bundle.open(copy)


def test_a_file_without_a_checksum_is_listed_and_not_loaded(copy: Path) -> None:
    (copy / "reports").mkdir(exist_ok=True)
    (copy / "reports" / "stray.txt").write_bytes(b"anything")
    bundle = Bundle.open(copy)
    assert bundle.check_all() == ("reports/stray.txt",)
    with pytest.raises(BundleError, match="no checksum"):
        bundle.read("reports/stray.txt")


def test_an_unknown_graph_raises_with_the_known_ones(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"no graph 'image'; it has prompt_encoder, image_encoder"):
        tiny_bundle.graph("image")
    assert graph_key("fused", "fp32") == "fused"
    assert graph_key("fused", "fp16") == "fused.fp16"
    assert tiny_bundle.precisions() == ("fp32",)


def set_key(*path: str, to: Any) -> Change:
    """A change of the manifest that puts one value in it."""

    def change(manifest: dict[str, Any]) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_key("hospital", to="ours"), "hospital"),
        (set_key("graphs", "fused", "color", to=1), "graphs.fused.color"),
        (set_key("schema_version", to=1), "has schema 1, this version reads 2"),
        (lambda manifest: manifest.pop("preprocessing"), "preprocessing"),
        (set_key("preprocessing", "std", to=[1, 1, 0]), "preprocessing.std"),
        (set_key("graphs", "fused", "sha256", to="0" * 64), "SHA256SUMS with another"),
        (
            set_key("graphs", "fused", "made_from_sha256", to="0" * 64),
            "fused was made from another checkpoint or graph",
        ),
        (set_key("image_hw", to=[96, 64]), "has shape .*expected size"),
        (set_key("prompt_length", to=32), "has shape .*expected size"),
    ],
)
def test_an_invalid_or_contradictory_manifest_raises(copy: Path, change: Change, said: str) -> None:
    reseal(copy, change)
    with pytest.raises(BundleError, match=said):
        Bundle.open(copy)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe{}", b"[" * 100_000])
def test_a_manifest_that_is_not_a_json_object_raises(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    seal(copy)
    with pytest.raises(BundleError, match="is not a manifest"):
        Bundle.open(copy)


def fill(folder: Path, source: Path) -> None:
    """Put a bundle's files, without checksums, into a new folder."""
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("SHA256SUMS"))


def test_a_new_bundle_is_renamed_when_it_is_complete(tiny_bundle_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "new.cclip"
    with new_bundle(path) as folder:
        fill(folder, tiny_bundle_path)
        assert not path.exists()
    assert Bundle.open(path).check_all() == ()
    assert os.listdir(path.parent) == ["new.cclip"]


def write_and_fail(making: AbstractContextManager[Path], failure: BaseException) -> None:
    """Begin a bundle, write a file of it and one that it shares with an old bundle, and fail."""
    with making as folder:
        (folder / "half").write_text("written")
        (folder / "manifest.json").unlink(missing_ok=True)
        (folder / "manifest.json").write_text("changed")
        raise failure


FAILURES = [RuntimeError("bug"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]


@pytest.mark.parametrize("failure", FAILURES, ids=["bug", "ctrl-c", "disk full"])
def test_a_new_bundle_that_fails_leaves_nothing_not_even_its_parents(tmp_path: Path, failure: BaseException) -> None:
    expected = EnvironmentIssue if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected):
        write_and_fail(new_bundle(tmp_path / "a" / "b" / "new.cclip"), failure)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failure", FAILURES, ids=["bug", "ctrl-c", "disk full"])
def test_a_replacement_that_fails_leaves_the_old_bundle(copy: Path, failure: BaseException) -> None:
    before = digests(copy)
    expected = EnvironmentIssue if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected):
        write_and_fail(new_bundle(copy, replace=True), failure)
    assert digests(copy) == before
    assert os.listdir(copy.parent) == [copy.name]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.EIO, "I/O error")], ids=["ctrl-c", "disk"])
def test_a_failed_rename_restores_the_old_bundle(
    copy: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    before, rename = digests(copy), Path.rename

    def fail_at_the_last(self: Path, target: Path) -> Path:
        if self.name.endswith(".unfinished"):
            raise failure
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_last)
    with pytest.raises((KeyboardInterrupt, EnvironmentIssue)), new_bundle(copy, replace=True) as folder:
        (folder / "half").write_text("written")
    assert digests(copy) == before
    assert os.listdir(copy.parent) == [copy.name]


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentIssue, match="The disk is full"), new_bundle(tmp_path / "new"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_parent_that_is_a_file_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EnvironmentIssue, match="could not be written"), new_bundle(tmp_path / "file" / "new"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_force_replaces_bundles_and_nothing_else(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        check_output(copy, replace=False)
    check_output(copy, replace=True)
    website = tmp_path / "website"
    website.mkdir()
    (website / "manifest.json").write_text("{}")
    for other in (website, website / "manifest.json", tmp_path):
        with pytest.raises(UsageError, match="is not a bundle"):
            check_output(other, replace=True)
    with new_bundle(copy, replace=True) as folder:
        (folder / "manifest.json").write_text("{}")
    assert sorted(digests(copy)) == ["SHA256SUMS", "manifest.json"]
    assert sorted(os.listdir(copy.parent)) == [copy.name]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new.cclip"

    def make_second() -> None:
        with new_bundle(path):
            path.mkdir()
            (path / "theirs").write_text("finished first")

    with pytest.raises(UsageError, match="exists already"):
        make_second()
    assert digests(tmp_path).keys() == {"new.cclip/theirs"}


def test_an_edited_bundle_shares_the_bytes_of_the_old_one(copy: Path) -> None:
    graph = copy / "graphs" / "fused.onnx"
    inode, before = graph.stat().st_ino, digests(copy)
    bundle = Bundle.open(copy)
    with edited_bundle(bundle) as folder:
        (folder / "engines").mkdir()
        (folder / "engines" / "new.engine").write_bytes(b"engine")
        write_manifest(folder, bundle.manifest.model_copy(update={"command": "edited"}))
    after = digests(copy)
    assert graph.stat().st_ino == inode
    assert {name for name in after if after[name] != before.get(name)} == {
        "SHA256SUMS", "manifest.json", "engines/new.engine",
    }  # fmt: skip
    assert Bundle.open(copy).check_all() == ()
    assert Bundle.open(copy).manifest.command == "edited"


@pytest.mark.parametrize("failure", FAILURES, ids=["bug", "ctrl-c", "disk full"])
def test_an_edit_that_fails_midway_changes_no_byte_of_the_old_bundle(copy: Path, failure: BaseException) -> None:
    before = digests(copy)
    expected = EnvironmentIssue if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected):
        write_and_fail(edited_bundle(Bundle.open(copy)), failure)
    assert digests(copy) == before
    assert os.listdir(copy.parent) == [copy.name]


def test_an_edit_gives_no_new_checksum_to_an_altered_file(copy: Path) -> None:
    flip_byte(copy / "graphs" / "fused.onnx")
    with pytest.raises(BundleError, match=r"fused\.onnx was altered"), edited_bundle(Bundle.open(copy)):
        pass
    with pytest.raises(BundleError, match="was altered"):
        Bundle.open(copy).check_all()


def test_an_edit_gives_no_checksum_to_a_stray_file_and_does_not_delete_it(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"notes\.txt without a checksum"), edited_bundle(Bundle.open(copy)):
        pass
    assert (copy / "notes.txt").read_text() == "mine"


def test_a_full_disk_during_an_edit_is_reported(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[object] = []

    def no_links(*args: object) -> None:
        refused.append(args)
        raise OSError(errno.EPERM, "no hard links here")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = digests(copy)
    monkeypatch.setattr(os, "link", no_links)
    with edited_bundle(Bundle.open(copy)) as folder:
        assert digests(folder).items() <= before.items()
    assert refused
    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(EnvironmentIssue, match="The disk is full"), edited_bundle(Bundle.open(copy)):
        pass
    assert digests(copy) == before


def test_a_link_to_a_bundle_stays_one_when_the_bundle_is_edited(copy: Path, tmp_path: Path) -> None:
    link = tmp_path / "current.cclip"
    link.symlink_to(copy)
    bundle = Bundle.open(link)
    with edited_bundle(bundle) as folder:
        write_manifest(folder, bundle.manifest.model_copy(update={"command": "edited"}))
    assert link.is_symlink()
    assert Bundle.open(copy).manifest.command == "edited"
    assert sorted(os.listdir(tmp_path)) == ["current.cclip", "here"]


def test_a_bundle_that_is_the_working_folder_can_be_edited(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    bundle = Bundle.open(Path("."))
    with edited_bundle(bundle) as folder:
        write_manifest(folder, bundle.manifest.model_copy(update={"command": "edited"}))
    monkeypatch.chdir(copy.parent)
    assert Bundle.open(copy).manifest.command == "edited"


def test_read_ahead_reads_each_file_once_and_raises_on_read(
    tiny_bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copy_of(tiny_bundle_path, tmp_path)
    flip_byte(copy / "graphs" / "image_encoder.onnx")
    opened = Bundle.open(copy)
    read: list[str] = []
    real = bundle_module.read_file
    monkeypatch.setattr(bundle_module, "read_file", lambda path, *a: (read.append(path.name), real(path, *a))[1])
    for _ in range(2):
        opened.read_ahead("fp32", "prompt_encoder", "image_encoder", "nowhere")
    assert opened.read("graphs/prompt_encoder.onnx") == (copy / "graphs/prompt_encoder.onnx").read_bytes()
    assert read.count("prompt_encoder.onnx") == 1
    with pytest.raises(BundleError, match=r"image_encoder\.onnx was altered"):
        opened.read("graphs/image_encoder.onnx")
    assert [name for name in read if name.endswith(".onnx")] == ["prompt_encoder.onnx", "image_encoder.onnx"]
    content = opened.read("graphs/prompt_encoder.onnx")
    assert read.count("prompt_encoder.onnx") == 2  # nothing was kept for a second reader
    assert sys.getrefcount(content) == 2  # nor is it now


def test_a_check_that_failed_fails_again(copy: Path) -> None:
    flip_byte(copy / "graphs" / "fused.onnx")
    opened = Bundle.open(copy)
    for _ in range(2):
        with pytest.raises(BundleError, match=r"fused\.onnx was altered"):
            opened.check("graphs/fused.onnx")
    assert opened.check("graphs/mask_decoder.onnx") == (copy / "graphs/mask_decoder.onnx").stat().st_size


def with_graphs(bundle: Bundle, *keys: str) -> Bundle:
    """A bundle whose manifest names these graphs too, which nothing here opens."""
    entries = {key: bundle.graph(key.split(".")[0]).model_copy(update={"precision": key.split(".")[1]}) for key in keys}
    manifest = bundle.manifest.model_copy(update={"graphs": {**bundle.manifest.graphs, **entries}})
    return Bundle.unsealed(bundle.path, manifest)


def test_prompt_encoder_and_mask_decoder_have_the_precision_of_the_rest(tiny_bundle: Bundle) -> None:
    lowered = with_graphs(
        tiny_bundle, "image_encoder.int8", "image_encoder.int8-fp16", "prompt_encoder.fp16", "mask_decoder.fp16"
    )
    chains = {
        name: {graph: entry.precision for graph, entry in lowered.chain(name).items()}
        for name in ("fp32", "int8", "int8-fp16")
    }
    assert chains == {
        "fp32": {"image_encoder": "fp32", "prompt_encoder": "fp32", "mask_decoder": "fp32"},
        "int8": {"image_encoder": "int8", "prompt_encoder": "fp32", "mask_decoder": "fp32"},
        "int8-fp16": {"image_encoder": "int8-fp16", "prompt_encoder": "fp16", "mask_decoder": "fp16"},
    }


@pytest.mark.parametrize(
    ("graph", "precision", "have", "command"),
    [
        ("image_encoder", "int8", (), "--int8 --calibration DATA"),
        ("image_encoder", "fp8", ("image_encoder.int8",), "--fp8 --calibration DATA"),
        ("image_encoder", "int8-fp16", ("image_encoder.fp16",), "--int8 --fp16 --calibration DATA"),
        ("fused", "int8", (), "--int8 --calibration DATA --graph fused"),
        ("prompt_encoder", "int8-fp16", ("image_encoder.int8-fp16",), "--int8 --fp16 --calibration DATA"),
        ("mask_decoder", "fp16", (), "--fp16"),
    ],
)
def test_a_missing_graph_raises_with_the_command_that_builds_it(
    tiny_bundle: Bundle, graph: str, precision: str, have: tuple[str, ...], command: str
) -> None:
    with pytest.raises(UsageError, match="has no graph") as caught:
        with_graphs(tiny_bundle, *have).graph_in(graph, precision)
    assert str(caught.value).endswith(f"Build it: cclip-deploy build-engine BUNDLE {command}")
