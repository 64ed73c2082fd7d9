"""Checkpoints that are damaged, inconsistent or contain code are refused with one line, and no code runs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from cclip_deploy.errors import CheckpointError
from cclip_deploy.model import checkpoint
from cclip_deploy.model.checkpoint import FORMAT, load_checkpoint
from cclip_deploy.model.config import TINY, ModelConfig
from tests.model.published_stub import published_stub

SMALL = {f"layer{n}.weight": torch.arange(12.0).reshape(3, 4) + n for n in range(3)}


def saved(content: object, zipped: bool = True, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


SMALL_ZIP, SMALL_OLD = saved(SMALL), saved(SMALL, zipped=False)
SMALL_SAFE = save(SMALL, {FORMAT: json.dumps(TINY.to_dict())})


def refusal(content: bytes, folder: Path) -> str:
    """The one line that a file of these bytes is refused with."""
    path = folder / "hostile.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 1000
    return message.removeprefix(str(path))


class RunsCommand:
    """Unpickling this touches a file."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"state_dict": SMALL, "epoch": bomb}])
def test_a_checkpoint_that_would_run_a_command_is_refused_and_does_not_run_it(
    wrap: Callable[[object], object], zipped: bool, protocol: int, tmp_path: Path
) -> None:
    proof = tmp_path / "it-ran"
    message = refusal(saved(wrap(RunsCommand(f"touch {proof}")), zipped, protocol), tmp_path)
    assert not proof.exists()
    assert "contains objects other than tensors, so loading it could run code: refused." in message or protocol == 4


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_that_would_run_a_command_is_refused_and_does_not_run_it(protocol: int, tmp_path: Path) -> None:
    proof = tmp_path / "it-ran"
    refusal(pickle.dumps(RunsCommand(f"touch {proof}"), protocol), tmp_path)
    assert not proof.exists()


def test_the_bombs_of_these_tests_are_live(tmp_path: Path) -> None:
    proof = tmp_path / "it-ran"
    pickle.loads(pickle.dumps(RunsCommand(f"touch {proof}"), 2))
    assert proof.exists()


def test_an_environment_that_asks_for_unsafe_loading_is_not_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    proof = tmp_path / "it-ran"
    refusal(saved(RunsCommand(f"touch {proof}")), tmp_path)
    assert not proof.exists()


def test_a_whole_pickled_module_is_more_than_tensors(tmp_path: Path) -> None:
    message = refusal(saved(torch.nn.Linear(2, 2)), tmp_path)
    assert "Save only the state dict: torch.save(model.state_dict(), FILE)." in message


def test_a_torchscript_archive_is_a_program_and_torch_s_warnings_about_it_stay_inside(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.trace(torch.nn.Linear(2, 2).eval(), torch.zeros(1, 2))  # type: ignore[no-untyped-call]
        torch.jit.save(module, buffer)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert "TorchScript archive, which contains code: refused" in refusal(buffer.getvalue(), tmp_path)
    assert seen == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"PK",
        b"PK\x03\x04" + bytes(100),
        b"\x80\x02",
        b"A text file, not a checkpoint.\n" * 9,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 734003200\n",
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        bytes(4096),
        b"\xff" * 4096,
        b'{"state_dict": {}}',
        b"l" * 65536,
    ],
    ids=["empty", "byte", "PK", "zip", "pickle", "text", "git-lfs", "html", "png", "zeros", "ones", "json", "opcodes"],
)  # fmt: skip
def test_a_file_that_is_not_a_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    assert "is not a checkpoint, or a damaged or truncated one" in refusal(content, tmp_path)


def test_a_zip_of_something_else_is_not_a_checkpoint(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("readme/readme.txt", "hello")
    assert "is not a checkpoint" in refusal(buffer.getvalue(), tmp_path)


@pytest.mark.parametrize("whole", [SMALL_ZIP, SMALL_OLD, SMALL_SAFE], ids=["zip", "old torch", "safetensors"])
def test_a_file_cut_off_anywhere_is_refused(whole: bytes, tmp_path: Path) -> None:
    for length in (*range(0, 64), *range(64, len(whole), 41), len(whole) - 1):
        refusal(whole[:length], tmp_path)


@pytest.mark.parametrize("whole", [SMALL_ZIP, SMALL_OLD, SMALL_SAFE], ids=["zip", "old torch", "safetensors"])
@settings(max_examples=25, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_end_in_one_line_too(
    whole: bytes, changes: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(whole)
    for place, value in changes:
        content[place % len(content)] = value
    refusal(bytes(content), tmp_path_factory.mktemp("changed"))


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 10**9, 0])
def test_a_safetensors_header_that_lies_about_its_length_is_refused(size: int, tmp_path: Path) -> None:
    assert "safetensors" in refusal(struct.pack("<Q", size) + SMALL_SAFE[8:], tmp_path)


@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**40]},
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
    ],
)
def test_a_safetensors_header_that_lies_about_a_tensor_is_refused(tensor: dict[str, object], tmp_path: Path) -> None:
    header = json.dumps({"a": tensor}).encode()
    assert "safetensors" in refusal(struct.pack("<Q", len(header)) + header + bytes(16), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        json.dumps({**TINY.to_dict(), "run": "me"}),
        json.dumps({**TINY.to_dict(), "text_layers": "two"}),
        json.dumps({**TINY.to_dict(), "vision_heads": 3}),
        json.dumps({**TINY.to_dict(), "vision_width": 10**12, "embed_dim": 8 * 10**12}),
        json.dumps({**TINY.to_dict(), "vocabulary_size": 65536}),
    ],
    ids=["nothing", "half", "list", "null", "deep", "extra key", "text", "heads", "huge", "vocabulary"],
)
def test_a_config_that_cannot_be_is_refused_before_anything_is_built(config: str, tmp_path: Path) -> None:
    refusal(save(SMALL, {FORMAT: config}), tmp_path)


def test_a_config_of_more_blocks_than_tensors_is_not_built_first(tmp_path: Path) -> None:
    """Seconds of building would go before the first missing tensor is found."""
    config = json.dumps({**TINY.to_dict(), "vision_layers": [1, 1, 128, 1]})
    message = refusal(save(SMALL, {FORMAT: config}), tmp_path)
    assert "has a config of 133 blocks but only 3 tensors" in message


@pytest.mark.parametrize(
    "change", [{"vision_layers": [1, 1, 20_000, 1]}, {"text_layers": 20_000}, {"text_layers": 129}], ids=str
)
def test_a_config_of_thousands_of_blocks_is_refused_before_it_is_built(
    change: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 20,000 small tensors in the file, minutes went into building the network."""
    monkeypatch.setattr(checkpoint, "CausalCLIPSeg", lambda config: pytest.fail("was built"))
    tensors = {str(number): torch.zeros(1) for number in range(20_100)}
    message = refusal(save(tensors, {FORMAT: json.dumps({**TINY.to_dict(), **change})}), tmp_path)
    assert "the limit is 128" in message


@pytest.mark.parametrize("name", [None, 1, ["tiny"], "", "x" * 65, "two\nlines", "\x1b[2J"], ids=repr)
def test_a_config_without_a_plain_name_is_refused(name: object, tmp_path: Path) -> None:
    """`null` was taken, and failed in `export` and in the manifest."""
    config = json.dumps({**TINY.to_dict(), "name": name})
    assert "name must have 1 to 64 characters" in refusal(save(SMALL, {FORMAT: config}), tmp_path)


@pytest.mark.parametrize(
    "kind", [torch.int8, torch.uint8, torch.bool, torch.complex64, torch.int64, torch.float8_e4m3fn], ids=str
)
def test_weights_of_a_type_that_networks_do_not_have_are_refused(
    kind: torch.dtype, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Codes without their scales, booleans and the real part of complex numbers were taken for weights."""
    tensors = load_file(tiny_checkpoint)
    name = "head.mix.weight"
    tensors[name] = torch.ones(tensors[name].shape).to(kind)
    message = refusal(save(tensors, {FORMAT: json.dumps(TINY.to_dict())}), tmp_path)
    assert f"has 1 tensor of another type: {name} {str(kind).removeprefix('torch.')}" in message


def test_a_counter_that_is_not_a_whole_number_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_checkpoint)
    name = next(name for name in tensors if name.endswith("num_batches_tracked"))
    tensors[name] = torch.tensor(1.5)
    message = refusal(save(tensors, {FORMAT: json.dumps(TINY.to_dict())}), tmp_path)
    assert f"of another type: {name} float32" in message


@pytest.mark.parametrize("spoil", [lambda t: t.to(torch.int8), lambda t: t.clone().to_sparse()], ids=["int8", "sparse"])
def test_a_published_weight_of_another_type_is_named_as_published(
    spoil: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    tensors = published_stub()
    name = "proj.txt.bias"
    assert f"of another type: {name} " in refusal(saved({**tensors, name: spoil(tensors[name])}), tmp_path)


CUT_OFF = """
import os, sys
from pathlib import Path
import safetensors, safetensors.torch, torch

path = sys.argv[1]

def cutting(read):
    def reading(*arguments, **options):
        found = read(*arguments, **options)
        os.truncate(path, 100)
        return found
    return reading

for place, name in ((torch, "load"), (safetensors, "safe_open"), (safetensors.torch, "load")):
    setattr(place, name, cutting(getattr(place, name)))
from cclip_deploy.model.checkpoint import load_checkpoint
print(load_checkpoint(Path(path)).layout, os.path.getsize(path))
"""


@pytest.mark.parametrize("kind", ["ours", "published"])
def test_a_file_that_is_cut_off_while_it_is_read_does_not_kill_the_process(
    kind: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Before, the file was mapped, and the process ended with SIGBUS at the first weight behind its new end."""
    path = tmp_path / "cut"
    path.write_bytes(tiny_checkpoint.read_bytes() if kind == "ours" else saved(published_stub()))
    done = subprocess.run([sys.executable, "-c", CUT_OFF, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{kind} 100\n"), done.stderr


@pytest.mark.parametrize("left", [0, 8, 100, 5000])
def test_a_file_that_is_cut_off_as_it_is_opened_is_refused(
    left: int, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copyfile(tiny_checkpoint, tmp_path / "cut.safetensors"))
    opens = io.open

    def cutting(file: Any, *arguments: Any, **options: Any) -> Any:
        found = opens(file, *arguments, **options)
        if file == path:
            os.truncate(path, left)
        return found

    monkeypatch.setattr(io, "open", cutting)
    with pytest.raises(CheckpointError, match=r"cut\.safetensors is (not a checkpoint|a damaged)"):
        load_checkpoint(path)


def test_the_hash_of_a_checkpoint_is_of_the_bytes_that_were_loaded(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was read for its tensors first and for its hash later."""
    path = Path(shutil.copyfile(tiny_checkpoint, tmp_path / "changing.safetensors"))
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    real = checkpoint.CausalCLIPSeg

    def change_first(config: ModelConfig) -> Any:
        path.write_bytes(b"something else")
        return real(config)

    monkeypatch.setattr(checkpoint, "CausalCLIPSeg", change_first)
    assert load_checkpoint(path).sha256 == expected


def test_an_archive_that_unpacks_to_much_more_than_its_size_is_refused(tmp_path: Path) -> None:
    """Kilobytes of deflated zeros."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(SMALL_ZIP)) as plain, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member) + bytes(3 * 10**6))
    assert len(buffer.getvalue()) < 10**5
    assert "it unpacks to" in refusal(buffer.getvalue(), tmp_path)


def test_a_format_of_the_future_is_named(tmp_path: Path) -> None:
    content = save(SMALL, {"cclip-deploy checkpoint 2": json.dumps(TINY.to_dict())})
    assert "'cclip-deploy checkpoint 2', but this version reads 'cclip-deploy checkpoint 1'" in refusal(
        content, tmp_path
    )


@pytest.mark.parametrize(
    "content",
    [[1, 2], torch.zeros(3), "words", None, {}, {"a": 1}, {"state_dict": {"a": "b"}}, {1: 2}, OrderedDict(a=[1])],
    ids=str,
)
def test_a_torch_file_without_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    refusal(saved(content), tmp_path)


def test_names_that_would_write_to_a_terminal_are_shown_escaped(tmp_path: Path) -> None:
    names = ["two\nlines", "\x1b[2J\x1b[31mred", "x" * 10_000, "\u202ereversed"]
    message = refusal(saved({name: torch.zeros(1) for name in names}), tmp_path)
    assert "'two\\nlines'" in message
    message = refusal(saved({f"backbone.{name}": torch.zeros(1) for name in names}), tmp_path)
    assert "lacks 931 tensors" in message
    message = refusal(saved({f"neck_ad.{name}": torch.zeros(1) for name in names}), tmp_path)
    assert "'neck_ad.two\\nlines'" in message
    refusal(saved({"state_dict": dict.fromkeys(names, 1)}), tmp_path)


def test_a_file_of_some_kilobytes_that_asks_for_4_tb_is_refused_by_shape(tmp_path: Path) -> None:
    content = saved({**published_stub(), "proj.txt.bias": torch.zeros(()).expand(2**20, 2**20)})
    assert len(content) < 500_000
    assert "1 tensor of another shape: proj.txt.bias (1048576, 1048576) instead of (2305,)" in refusal(
        content, tmp_path
    )
