"""Copies of a bundle, changed as an accident or a stranger would change them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.runtime.graph_check import read_checked

Change = Callable[[dict[str, Any]], object]


def copy_of(bundle: Path, folder: Path, name: str = "copy.cclip") -> Path:
    """A copy that shares no bytes with the bundle."""
    return Path(shutil.copytree(bundle, folder / name))


def linked_copy(bundle: Path, folder: Path, name: str = "copy.cclip") -> Path:
    """A copy by hard links, cheap; unlink a file of it before writing another one in its place."""
    return Path(shutil.copytree(bundle, folder / name, copy_function=os.link))


def flip_byte(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, hidden ones too, by relative name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def seal(folder: Path) -> None:
    """Write SHA256SUMS for what lies there now, so that no checksum gives a change away."""
    lines = [f"{digest}  {name}\n" for name, digest in digests(folder).items() if name != "SHA256SUMS"]
    replace_text(folder / "SHA256SUMS", "".join(lines))


def replace_text(path: Path, text: str) -> None:
    """Write a file anew, so that hard links to the old one keep their content."""
    path.unlink(missing_ok=True)
    path.write_text(text)


def reseal(folder: Path, change: Change | None = None) -> None:
    """Make a changed bundle consistent again, as a forger would: hashes in the manifest, then SHA256SUMS.

    `change` edits the manifest, after the hashes.
    """
    manifest = json.loads((folder / "manifest.json").read_bytes())
    found = digests(folder)
    for entry in [*manifest["graphs"].values(), *manifest["engines"]]:
        entry["sha256"] = found.get(entry["file"], entry["sha256"])
    for name, entry in manifest["graphs"].items():
        if entry["precision"] != "fp32":
            entry["made_from_sha256"] = manifest["graphs"][name.split(".")[0]]["sha256"]
    if change is not None:
        change(manifest)
    replace_text(folder / "manifest.json", json.dumps(manifest))
    seal(folder)


def store_all_weights(folder: Path) -> None:
    """Write `fused` with all its weights, as earlier builds did, so that the other graphs can be changed alone."""
    bundle = Bundle.open(folder)
    content = read_checked(bundle, bundle.graph("fused"))
    (folder / "graphs/fused.onnx").unlink()
    (folder / "graphs/fused.onnx").write_bytes(content)
    reseal(folder)


def change_weights(graph: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Put other values in the largest floating-point weight of an ONNX file."""
    model = onnx.load(graph)
    floats = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    largest = max(floats, key=lambda tensor: int(np.prod(tensor.dims)))
    values = change(numpy_helper.to_array(largest).copy())
    largest.CopyFrom(numpy_helper.from_array(values.astype(np.float32), largest.name))
    onnx.save(model, graph)
