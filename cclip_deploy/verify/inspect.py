"""Describe the content of a bundle after verifying all checksums; needs neither torch nor onnx."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cclip_deploy.bundle.bundle import RECORD_BYTES, Bundle
from cclip_deploy.bundle.manifest import EngineEntry, TensorSpec
from cclip_deploy.errors import BundleError
from cclip_deploy.runtime.graph_check import read_checked
from cclip_deploy.runtime.tensorrt.layers import LayerTable


def describe_bundle(path: Path) -> dict[str, Any]:
    """Return the JSON form of `inspect --json`: graphs and engines, with their sources."""
    bundle = Bundle.open(path)
    strays = bundle.check_all()
    manifest = bundle.manifest
    height, width = manifest.image_hw
    for entry in manifest.graphs.values():
        read_checked(bundle, entry)
    return {
        "summary": f"{manifest.model['name']}, {manifest.form} form, {height}x{width}, {manifest.prompt_length} tokens",
        "graphs": {
            name: {
                "inputs": [_tensor(t) for t in entry.inputs],
                "outputs": [_tensor(t) for t in entry.outputs],
                "multiply_adds": entry.multiply_adds,
                "sha256": entry.sha256,
                "precision": entry.precision,
                "made_from_sha256": entry.made_from_sha256,
                "file": entry.file,
                "bytes": bundle.check(entry.file),
            }
            for name, entry in manifest.graphs.items()
        },
        "engines": [_engine(bundle, engine) for engine in manifest.engines],
        "checkpoint": manifest.checkpoint.model_dump(),
        "preprocessing": manifest.preprocessing.model_dump(mode="json"),
        "created": manifest.created,
        "command": manifest.command,
        "versions": manifest.versions,
        "files_checked": len(bundle.sums),
        "files_without_checksum": list(strays),
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _engine(bundle: Bundle, engine: EngineEntry) -> dict[str, Any]:
    content = bundle.read(engine.layers, RECORD_BYTES)
    try:
        table = LayerTable.from_dict(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{bundle.path / engine.layers} is not a layer table: {error}. Build the engine again."
        ) from error
    return {
        **engine.model_dump(mode="json"),
        "bytes": bundle.check(engine.file),
        "all_layers": table.summary(),
        "product_layers": table.product_summary(),
    }
