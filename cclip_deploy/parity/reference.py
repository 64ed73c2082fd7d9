"""References: inputs and the outputs of the plain PyTorch network, subsampled to fit into a bundle."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import GraphEntry
from cclip_deploy.datasets.synthetic.generator import make_sample
from cclip_deploy.errors import BundleError
from cclip_deploy.parity.npz import read_arrays
from cclip_deploy.parity.source import Source

if TYPE_CHECKING:
    from cclip_deploy.runtime.pytorch import PyTorchBackend

Array = NDArray[np.generic]
Floats = NDArray[np.float32]

SEED = 20240
REFERENCE_BYTES = 2**30
"""Size limit for all arrays of a bundle's references, which `verify` holds in memory."""
START_ID, END_ID, FIRST_WORD, LAST_WORD = 49406, 49407, 320, 49000
PICTURE_PROMPTS = (
    "Bilateral pulmonary infection, two infected areas, lower left lung and upper right lung.",
    "Unilateral pulmonary infection, one infected area, middle left lung.",
)
SHORTEST_PROMPT = "lung"
_EIGHTH = (slice(None), slice(None, None, 8))
SUBSAMPLED = {
    "features": (slice(None), slice(None, None, 4), slice(None, None, 4), slice(None, None, 16)),
    **dict.fromkeys(("mask3", "mask4", "mask5", "confounding_features"), _EIGHTH),
}
"""Slices of large outputs that references contain."""
TILE = 16
"""Side of the tiles, in pixels, of which the mask decoder's features consist."""
_NPZ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Reference:
    """Inputs, the logits of every prompt on every image, and the outputs of each graph."""

    name: str
    image: Floats  # (B, 3, H, W)
    tokens: NDArray[np.int64]  # (P, L)
    logits: Floats  # (B, P, H, W)
    outputs: Mapping[str, Mapping[str, Floats]] = field(default_factory=dict)
    decoder_inputs: Mapping[str, Floats] = field(default_factory=dict)
    source: Source | None = None
    """Sentences and images that `tokens` and `image` were made from; None in seeded and older references."""

    def pairs(self) -> tuple[Floats, NDArray[np.int64]]:
        """Return all pairs of image and prompt, one per row: (B P, 3, H, W) and (B P, L)."""
        return np.repeat(self.image, len(self.tokens), axis=0), np.tile(self.tokens, (len(self.image), 1))

    def inputs_of(self, graph: str) -> dict[str, Array]:
        """Return the inputs of a graph by name, and those of other graphs; pairs for `fused` and `plain`."""
        images, tokens = self.pairs() if graph in ("fused", "plain") else (self.image, self.tokens)
        return {"image": images, "tokens": tokens, **(expand(self.decoder_inputs) if self.decoder_inputs else {})}


def seeded_inputs(image_hw: tuple[int, int], prompt_length: int) -> tuple[Floats, NDArray[np.int64]]:
    """Return two images of colored blocks and noise, and two prompts of random words, the same on every machine."""
    rng = np.random.default_rng(SEED)
    height, width = image_hw
    blocks = rng.normal(0, 1, (2, 3, height // TILE, width // TILE))
    image = np.kron(blocks, np.ones((1, 1, TILE, TILE))) + rng.normal(0, 0.3, (2, 3, height, width))
    tokens = np.zeros((2, prompt_length), np.int64)
    for row, words in zip(tokens, (prompt_length - 2, max(1, prompt_length // 3)), strict=True):
        row[0], row[words + 1] = START_ID, END_ID
        row[1 : words + 1] = rng.integers(FIRST_WORD, LAST_WORD, words)
    return image.astype(np.float32), tokens


def synthetic_radiographs(image_hw: tuple[int, int]) -> list[Floats]:
    """Return two synthetic chest radiographs (H, W)."""
    return [make_sample(np.random.default_rng(SEED + n), image_hw).image for n in range(2)]


def record(
    name: str,
    reference: PyTorchBackend,
    image: Floats,
    tokens: NDArray[np.int64],
    graphs: Sequence[str],
    known: tuple[Source, Floats] | None = None,
) -> Reference:
    """Record the outputs of plain PyTorch that a bundle's graphs are compared with.

    Args:
        name: of the reference.
        reference: plain PyTorch.
        image: (B, 3, H, W).
        tokens: (P, L).
        graphs: names of the bundle's graphs.
        known: the source of image and tokens, and the logits (B, P, H, W), if they were computed before.
    """
    source, logits = known or (None, reference.all_pairs(image, tokens))
    outputs: dict[str, dict[str, Floats]] = {}
    decoder_inputs: dict[str, Floats] = {}
    if "image_encoder" in graphs:
        outputs["image_encoder"] = _subsample_all(reference.run("image_encoder", {"image": image}))
    if "prompt_encoder" in graphs:
        outputs["prompt_encoder"] = reference.run("prompt_encoder", {"tokens": tokens})
    if "mask_decoder" in graphs:
        decoder_inputs = _decoder_inputs(outputs["prompt_encoder"]["kernel"].shape[2], image.shape[2:])
        outputs["mask_decoder"] = reference.run("mask_decoder", expand(decoder_inputs))
    return Reference(name, image, tokens, logits, outputs, decoder_inputs, source)


def expand(decoder_inputs: Mapping[str, Floats]) -> dict[str, Floats]:
    """Return the mask decoder's inputs, with each feature repeated over a tile of pixels: (1, H, W, 256)."""
    tile = decoder_inputs["features"]
    return {**decoder_inputs, "features": tile.repeat(TILE, axis=1).repeat(TILE, axis=2)}


def subsample(name: str, value: Floats) -> Floats:
    """Return the part of an output that references contain; all of a small output."""
    return value[SUBSAMPLED[name]] if name in SUBSAMPLED else value


def save_reference(reference: Reference, path: Path) -> None:
    """Write a reference as a compressed npz file."""
    arrays: dict[str, Array] = {"image": reference.image, "tokens": reference.tokens, "logits": reference.logits}
    arrays |= {f"in/{key}": value for key, value in reference.decoder_inputs.items()}
    for graph, outputs in reference.outputs.items():
        arrays |= {f"out/{graph}/{key}": value for key, value in outputs.items()}
    if reference.source is not None:
        arrays |= reference.source.to_arrays()
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def load_references(bundle: Bundle) -> list[Reference]:
    """Load a bundle's references.

    Raises:
        BundleError: there are none, they are larger than `REFERENCE_BYTES` in total, or they lack outputs of a graph.
    """
    references: list[Reference] = []
    bytes_left = REFERENCE_BYTES
    for name in bundle.manifest.references:
        arrays = _arrays(bundle, name, bytes_left)
        bytes_left -= sum(array.nbytes * _cost(key) for key, array in arrays.items())
        references.append(_reference(bundle.path / name, arrays))
        _check_answers(references[-1], bundle)
    if not references:
        raise BundleError(f"{bundle.path} has no references. Export it again.")
    return references


def _check_answers(reference: Reference, bundle: Bundle) -> None:
    """Raise BundleError unless the shapes agree and the outputs of every FP32 graph are there."""
    manifest = bundle.manifest
    faults = []
    if reference.image.ndim != 4 or reference.image.shape[1:] != (3, *manifest.image_hw) or not reference.image.size:
        faults.append(f"image {reference.image.shape}")
    if (
        reference.tokens.ndim != 2
        or reference.tokens.shape[1:] != (manifest.prompt_length,)
        or not reference.tokens.size
    ):
        faults.append(f"tokens {reference.tokens.shape}")
    if reference.logits.shape != (len(reference.image), len(reference.tokens), *manifest.image_hw):
        faults.append(f"logits {reference.logits.shape}")
    if reference.source is not None:
        faults += _source_faults(reference, reference.source)
    faults += _kind_faults(reference)
    for name, graph in manifest.graphs.items():
        if graph.precision != "fp32" or name in ("fused", "plain"):
            continue
        missing = {output.name for output in graph.outputs} - reference.outputs.get(name, {}).keys()
        faults += [f"no {name}/{output}" for output in sorted(missing)]
        if name == "mask_decoder":
            faults += _decoder_faults(reference, graph)
    if faults:
        raise BundleError(
            f"Reference {reference.name} of {bundle.path} does not match its graphs: {', '.join(faults)}. Export again."
        )


def _kind_faults(reference: Reference) -> list[str]:
    """Return arrays that are not float32, and tokens that are not int64."""
    outputs = {f"{graph}/{key}": array for graph, each in reference.outputs.items() for key, array in each.items()}
    floats = {"image": reference.image, "logits": reference.logits, **reference.decoder_inputs, **outputs}
    faults = [f"{name} of {array.dtype}" for name, array in floats.items() if array.dtype != np.float32]
    return faults + [f"tokens of {reference.tokens.dtype}"] * (reference.tokens.dtype != np.int64)


def _decoder_faults(reference: Reference, graph: GraphEntry) -> list[str]:
    """Return inputs of the mask decoder that are missing or, after `expand`, not of the graph's shape."""
    faults = []
    for tensor in graph.inputs:
        array = reference.decoder_inputs.get(tensor.name)
        if array is None:
            faults.append(f"no {tensor.name}")
            continue
        scale = (1, TILE, TILE, 1) if tensor.name == "features" else (1,) * array.ndim
        sides = [side * factor for side, factor in zip(array.shape, scale, strict=False)]
        fits = all(
            side == expected or isinstance(expected, str) for side, expected in zip(sides, tensor.shape, strict=False)
        )
        if array.ndim != len(tensor.shape) or not fits or (tensor.name == "features" and len(array) != 1):
            faults.append(f"{tensor.name} {array.shape}")
    return faults


def _source_faults(reference: Reference, source: Source) -> list[str]:
    faults = []
    if len(source.sentences) < len(reference.tokens):
        faults.append(f"{len(source.sentences)} sentences")
    if len(source.masks) != len(reference.image) or {len(m) for m in source.masks} != {len(reference.tokens)}:
        faults.append(f"masks {[masks.shape for masks in source.masks]}")
    if source.probe_inputs.shape[1:] != reference.image.shape[1:]:
        faults.append(f"probe inputs {source.probe_inputs.shape}")
    return faults


def _cost(key: str) -> int:
    """Return the bytes in memory for each byte in the file: masks are stored as bits."""
    return 8 if key.startswith("source/mask/") else 1


def _arrays(bundle: Bundle, name: str, most_bytes: int) -> dict[str, Any]:
    try:
        return read_arrays(bundle.read(name, REFERENCE_BYTES), most_bytes, _cost)
    except _NPZ_ERRORS as error:
        raise BundleError(
            f"{bundle.path / name} is not a reference, or too large: {error}. Export the bundle again, with fewer or "
            "smaller images if you gave your own."
        ) from error


def _reference(path: Path, arrays: Mapping[str, Any]) -> Reference:
    try:
        outputs: dict[str, dict[str, Floats]] = {}
        for key in arrays:
            if key.startswith("out/"):
                _, graph, name = key.split("/")
                outputs.setdefault(graph, {})[name] = arrays[key]
        inputs = {key.removeprefix("in/"): value for key, value in arrays.items() if key.startswith("in/")}
        source = Source.from_arrays(arrays)
        return Reference(path.stem, arrays["image"], arrays["tokens"], arrays["logits"], outputs, inputs, source)
    except _NPZ_ERRORS as error:
        raise BundleError(f"{path} is not a reference: {error}. Export the bundle again.") from error


def _subsample_all(outputs: Mapping[str, Floats]) -> dict[str, Floats]:
    return {name: np.ascontiguousarray(subsample(name, value)) for name, value in outputs.items()}


def _decoder_inputs(width: int, image_hw: tuple[int, ...]) -> dict[str, Floats]:
    rng = np.random.default_rng(SEED + 1)
    tiles = (image_hw[0] // TILE, image_hw[1] // TILE)
    shapes = {"features": (1, *tiles, width), "kernel": (3, 9, width), "tap_bias": (3, 9), "bias": (3,)}
    return {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
