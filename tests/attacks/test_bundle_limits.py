"""Bundles with oversized, repeated or inconsistent checksums, manifests or references are refused.

Before, a second line for one name in SHA256SUMS replaced the first, digests could be anything, a manifest of any size
was read whole, and `verify` took 5.6 GB for 20,000 references.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import BundleError
from cclip_deploy.parity.reference import load_references
from tests.bundles import Change, linked_copy, replace_text, reseal

ZEROS = "0" * 64
MIB = 2**20


@pytest.fixture
def copy(tiny_bundle_path: Path, tmp_path: Path) -> Path:
    return linked_copy(tiny_bundle_path, tmp_path)


@pytest.fixture
def no_more_than_64_mib() -> Iterator[None]:
    """Python and numpy may not hold more than 64 MiB at any moment of the test."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * MIB, f"{peak / MIB:.0f} MiB"


def with_line(copy: Path, line: str) -> Path:
    """A bundle with one more line in SHA256SUMS."""
    replace_text(copy / "SHA256SUMS", (copy / "SHA256SUMS").read_text() + line)
    return copy


def first_line(copy: Path) -> str:
    return (copy / "SHA256SUMS").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"{ZEROS}  tokenizer.json\n", "names 'tokenizer.json', an earlier line 'tokenizer.json'"),
        (f"{ZEROS}  Tokenizer.JSON\n", "names 'Tokenizer.JSON', an earlier line 'tokenizer.json'"),
        (f"{ZEROS}  re\u0301f\n{ZEROS}  r\u00e9f\n", "that is the same file"),
        (f"{ZEROS}  graphs/./x\n", "not of the form"),
        (f"{ZEROS}  graphs//x\n", "not of the form"),
        (f"{ZEROS}  a\rb\n", "not of the form"),
        (f"{ZEROS}  a\x1b[2Jb\n", "not of the form"),
        (f"{ZEROS}  a\x00b\n", "not of the form"),
        (f"{'g' * 64}  x\n", "is not a SHA-256"),
        (f"{'A' * 64}  x\n", "is not a SHA-256"),
        (f"{'0' * 63}  x\n", "is not a SHA-256"),
        (f"{'0' * 65}  x\n", "is not a SHA-256"),
        (f"{ZEROS} *x\n", "is not a SHA-256"),
        (f"{ZEROS}  {'x' * 1025}\n", "is not a SHA-256"),
        (f"{ZEROS}  {'x' * MIB}\n", "is not a SHA-256"),
        ("\n", "is not a SHA-256"),
        (f"{ZEROS}  x", "cut off"),
    ],
)
def test_a_line_that_is_not_a_checksum_or_doubles_a_name_is_refused(copy: Path, line: str, said: str) -> None:
    with pytest.raises(BundleError, match="SHA256SUMS is damaged") as caught:
        Bundle.open(with_line(copy, line))
    assert said in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_doubled_line_is_refused_even_where_both_say_the_same(copy: Path) -> None:
    with pytest.raises(BundleError, match="an earlier line"):
        Bundle.open(with_line(copy, first_line(copy) + "\n"))


@pytest.mark.parametrize("name", ["SHA256SUMS", "manifest.json", "tokenizer.json", "reference/seeded.npz"])
def test_a_file_too_large_for_its_kind_is_refused_before_it_is_read(
    copy: Path, name: str, no_more_than_64_mib: None
) -> None:
    """Four terabytes of holes."""
    (copy / name).unlink()
    with (copy / name).open("wb") as file:
        file.truncate(4 * 2**40)
    with pytest.raises(BundleError, match=r"has 4,398,046,511,104 bytes; the limit is [\d,]+"):
        use(copy)


def use(copy: Path) -> None:
    bundle = Bundle.open(copy)
    bundle.tokenizer()
    load_references(bundle)


def many(place: tuple[str, ...], count: int) -> Change:
    """A change that fills a list or a table of the manifest with copies of an entry."""

    def change(manifest: dict[str, Any]) -> None:
        held = manifest
        for key in place[:-1]:
            held = held[key]
        found = held[place[-1]]
        if isinstance(found, dict):
            first = next(iter(found.values()))
            held[place[-1]] = {f"{number}": first for number in range(count)}
        else:
            held[place[-1]] = [found[0]] * count

    return change


ENGINE = {
    "graph": "fused", "backend": "tensorrt-rtx", "backend_version": "1", "precision": "fp32", "file": "engines/x",
    "sha256": ZEROS, "graph_sha256": ZEROS, "layers": "engines/y", "shapes": {}, "target": "x", "build_seconds": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        many(("references",), 65),
        many(("references",), 20_000),
        many(("graphs",), 65),
        many(("versions",), 65),
        many(("model",), 65),
        many(("graphs", "fused", "inputs"), 17),
        many(("graphs", "fused", "outputs"), 20_000),
        many(("graphs", "fused", "inputs", 0, "shape"), 9),  # type: ignore[arg-type]
        lambda manifest: manifest.update(engines=[ENGINE] * 257),
        lambda manifest: manifest["graphs"]["fused"]["inputs"][0].update(shape=[0, 3, 64, 96]),
        lambda manifest: manifest["graphs"]["fused"]["inputs"][0].update(shape=[2**40, 3, 64, 96]),
        lambda manifest: manifest["graphs"]["fused"].update(sha256="short"),
        lambda manifest: manifest["graphs"]["fused"].update(multiply_adds=-1),
        lambda manifest: manifest.update(prompt_length=0),
        lambda manifest: manifest.update(prompt_length=78),
        lambda manifest: manifest.update(image_hw=[0, 96]),
        lambda manifest: manifest.update(image_hw=[2**20, 2**20]),
        lambda manifest: manifest.update(command="x" * (2**18 + 1)),
        lambda manifest: manifest["graphs"].update({"x" * 257: manifest["graphs"]["fused"]}),
    ],
)
def test_a_manifest_of_too_many_or_impossible_entries_is_refused(copy: Path, change: Change) -> None:
    reseal(copy, change)
    with pytest.raises(BundleError, match=r"is not a manifest of schema 2: \w+") as caught:
        Bundle.open(copy)
    assert len(str(caught.value)) < 600


def npz(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def header(shape: tuple[int, ...], kind: str = "<f4", version: int = 1) -> bytes:
    told = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    told += " " * (-(11 + len(told)) % 64) + "\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(told)) + told.encode()


def that_lies(content: bytes, size: int) -> bytes:
    """An npz file whose directory gives one member another size."""
    entry = content.rindex(b"PK\x01\x02")
    return content[: entry + 24] + struct.pack("<I", size) + content[entry + 28 :]


def doubled() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in ("image.npy", "imagf.npy"):
            file.writestr(name, header((1,)) + bytes(4))
    return buffer.getvalue().replace(b"imagf", b"image")


BOMBS: dict[str, Callable[[], bytes]] = {
    "announces 8 GB": lambda: npz({"image.npy": header((2**31,)) + bytes(64)}),
    "announces 4 EB": lambda: npz({"image.npy": header((2**60,)) + bytes(64)}),
    "announces less than nothing": lambda: npz({"image.npy": header((-1,)) + bytes(64)}),
    "directory says 4 GB": lambda: that_lies(npz({"image.npy": header((2**30 - 32,)) + bytes(64)}), 2**32 - 1),
    "header and directory say 1 GB": lambda: that_lies(npz({"image.npy": header((2**28,)) + bytes(64)}), 2**30 + 128),
    "20,000 arrays": lambda: npz({f"out/fused/{number}.npy": header((1,)) + bytes(4) for number in range(20_000)}),
    "two of one name": doubled,
    "objects": lambda: npz({"image.npy": header((1,), "|O") + bytes(8)}),
    "npy format 9": lambda: npz({"image.npy": header((1,), version=9) + bytes(4)}),
    "a header of its own length": lambda: npz({"image.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{"}),
    "no zip": lambda: b"PK\x05\x06" + bytes(100),
    "bits that unpack to 4 GB": lambda: that_lies(npz({"source/mask/0.npy": header((1, 2**29), "|u1")}), 2**29 + 128),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_reference_that_announces_more_than_it_holds_takes_no_memory(
    copy: Path, bomb: Callable[[], bytes], no_more_than_64_mib: None
) -> None:
    (copy / "reference" / "seeded.npz").unlink()
    (copy / "reference" / "seeded.npz").write_bytes(bomb())
    reseal(copy)
    with pytest.raises(BundleError, match=r"seeded\.npz is not a reference") as caught:
        load_references(Bundle.open(copy))
    assert len(str(caught.value)) < 600


def test_a_member_that_unpacks_to_more_than_it_says_is_refused(copy: Path, no_more_than_64_mib: None) -> None:
    """100 MB of zeros behind the size of one number."""
    content = npz({"image.npy": header((1,)) + bytes(100 * MIB)})
    assert len(content) < MIB
    tracemalloc.reset_peak()
    (copy / "reference" / "seeded.npz").unlink()
    (copy / "reference" / "seeded.npz").write_bytes(that_lies(content, 128 + 4))
    reseal(copy)
    with pytest.raises(BundleError, match=r"seeded\.npz is not a reference"):
        load_references(Bundle.open(copy))


def test_references_are_bounded_together(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = json.loads((copy / "manifest.json").read_text())["references"]
    assert len(names) == 2
    sizes = []
    for name in names:
        with np.load(copy / name) as file:
            sizes.append(sum(file[key].nbytes * (8 if "/mask/" in key else 1) for key in file.files))
    monkeypatch.setattr("cclip_deploy.parity.reference.REFERENCE_BYTES", sum(sizes) + 64 * 2**10)  # room for headers
    assert len(load_references(Bundle.open(copy))) == 2
    monkeypatch.setattr("cclip_deploy.parity.reference.REFERENCE_BYTES", sum(sizes) - 1)
    with pytest.raises(BundleError, match=r"pictures\.npz is not a reference, or too large: .* the limit is"):
        load_references(Bundle.open(copy))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("in/features", np.zeros((1, 400, 600, 32), np.float32), r"features \(1, 400, 600, 32\)"),
        ("in/features", np.zeros((500, 4, 6, 32), np.float32), r"features \(500, 4, 6, 32\)"),
        ("in/kernel", np.zeros((3, 9, 31), np.float32), r"kernel \(3, 9, 31\)"),
        ("image", np.zeros((2, 3, 64, 96), np.float64), "image of float64"),
        ("image", np.zeros((2, 3, 64, 96), np.complex64), "image of complex64"),
        ("tokens", np.zeros((2, 24), np.int8), "tokens of int8"),
        ("out/image_encoder/features", np.zeros((2, 16, 24, 2), "<U1"), "image_encoder/features of <U1"),
    ],
)
def test_reference_arrays_of_other_shapes_or_types_are_refused(
    copy: Path, key: str, value: np.ndarray, said: str
) -> None:
    """A tile of features was blown up 256 times, whatever its size."""
    path = copy / "reference" / "seeded.npz"
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    assert key in arrays
    path.unlink()
    np.savez_compressed(path, **{**arrays, key: value})
    reseal(copy)
    with pytest.raises(BundleError, match=said):
        load_references(Bundle.open(copy))


def test_a_pipe_or_a_device_in_a_references_place_does_not_hang(copy: Path) -> None:
    (copy / "reference" / "seeded.npz").unlink()
    os.mkfifo(copy / "reference" / "seeded.npz")
    with pytest.raises(BundleError, match=r"seeded\.npz is missing"):
        load_references(Bundle.open(copy))
