"""Checks of a bundle's manifest: schema, file hashes, and the source of every graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from cclip_deploy.bundle.checksums import SUMS
from cclip_deploy.bundle.manifest import SCHEMA_VERSION, CalibrationEntry, EngineEntry, GraphEntry, Manifest
from cclip_deploy.errors import BundleError


def parse_manifest(content: bytes, path: Path) -> Manifest:
    """Parse a manifest; raise BundleError, which names `path`, if it is invalid."""
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BundleError(
            f"{path} is not a manifest of schema {SCHEMA_VERSION}: {place}: {first['msg']}. Export the bundle again."
        ) from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema {manifest.schema_version}, this version reads {SCHEMA_VERSION}. Export it again."
        )
    return manifest


def file_hashes(manifest: Manifest) -> list[tuple[str, str]]:
    """Return (file, SHA-256) of each file whose hash is in the manifest."""
    graphs = manifest.graphs.values()
    records = [graph.calibration for graph in graphs if graph.calibration]
    entries: list[GraphEntry | EngineEntry | CalibrationEntry] = [*graphs, *manifest.engines, *records]
    return [(entry.file, entry.sha256) for entry in entries]


def check_chain(path: Path, manifest: Manifest, sums: Mapping[str, str]) -> None:
    """Raise BundleError if the manifest and the bundle differ in files, sources of graphs, or sizes."""
    for file, sha256 in file_hashes(manifest):
        if sums.get(file) != sha256:
            raise BundleError(
                f"{path} lists {file} with SHA-256 {sha256[:12]}, {SUMS} with another. Copy or export the bundle again."
            )
    for name, graph in manifest.graphs.items():
        source = manifest.graphs.get(name.removesuffix(f".{graph.precision}"))
        origin = manifest.checkpoint.sha256 if graph.precision == "fp32" else source and source.sha256
        if graph.precision.is_quantized and graph.calibration is None:
            raise BundleError(f"{path}: graph {name} has no calibration record. Build it again.")
        if graph.made_from_sha256 != origin:
            raise BundleError(
                f"{path}: graph {name} was made from another checkpoint or graph than this bundle's. Build it again."
            )
        for tensor in graph.inputs:
            sides = {
                "image": (tensor.shape[2:], manifest.image_hw),
                "features": (tensor.shape[1:3], manifest.image_hw),  # channels last
                "tokens": (tensor.shape[1:], (manifest.prompt_length,)),
            }
            have, expected = sides.get(tensor.name, ((), ()))
            if have != expected:
                raise BundleError(
                    f"{path}: input {tensor.name} of {name} has shape {tensor.shape}, expected size {expected}."
                )
