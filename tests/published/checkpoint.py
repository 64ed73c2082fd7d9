"""Writes a checkpoint in the published CausalCLIPSeg layout, filled by a fixed rule.

The trained weights are not public. Every tensor of upstream_state_dict.tsv gets values drawn by NumPy from a generator
seeded with (seed, CRC-32 of its key); the npz files beside hold what the published network computes with them.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent


def layout() -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor of a published checkpoint."""
    rows = [line.split("\t") for line in (HERE / "upstream_state_dict.tsv").read_text().splitlines()]
    return {
        key: () if dims == "scalar" else tuple(int(n) for n in dims.split("x"))
        for key, dims, *_ in (row for row in rows if not row[0].startswith("#"))
    }


def fill(key: str, shape: tuple[int, ...], seed: int) -> NDArray[np.generic]:
    """Values of one tensor, scaled so that activations keep unit order of magnitude."""
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())]))
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if key.endswith("running_mean"):
        return rng.normal(0, 0.05, shape).astype(np.float32)
    if key.endswith("running_var"):
        return rng.uniform(0.75, 1.25, shape).astype(np.float32)
    if key.endswith("logit_scale"):
        return np.asarray(np.log(1 / 0.07), np.float32).reshape(shape)
    if key.endswith(("token_embedding.weight", "positional_embedding")):
        return rng.normal(0, 0.3, shape).astype(np.float32)
    if key.endswith("bias"):
        return rng.normal(0, 0.05, shape).astype(np.float32)
    if len(shape) == 1:
        return rng.uniform(0.75, 1.25, shape).astype(np.float32)
    if key.endswith("text_projection"):
        return rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    gain = 2.0 if len(shape) == 4 else 1.0
    if ".conv3.weight" in key:
        gain = 0.1
    return rng.normal(0, (gain / fan_in) ** 0.5, shape).astype(np.float32)


def state_dict(seed: int = 0) -> dict[str, NDArray[np.generic]]:
    """All tensors of the checkpoint, keyed as in the published network."""
    return {key: fill(key, shape, seed) for key, shape in layout().items()}


def example(
    seed: int, batch: int, height: int, words: int, width: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """A normalized image batch (batch, 3, height, width or height) and tokens (batch, words)."""
    width = width or height
    rng = np.random.Generator(np.random.PCG64([seed, 1000 + height]))
    coarse = rng.normal(0, 1, (batch, 3, height // 16, width // 16))
    image = np.kron(coarse, np.ones((1, 1, 16, 16))) + rng.normal(0, 0.3, (batch, 3, height, width))
    tokens = np.zeros((batch, words), np.int64)
    for row in tokens:
        n = int(rng.integers(4, words - 1))
        row[0], row[1:n], row[n] = 49406, rng.integers(256, 49000, n - 1), 49407
    return image.astype(np.float32), tokens


def golden(name: str) -> dict[str, NDArray[np.float32]]:
    """What the published network computed: `224` (seed 0) or `256x320` (seed 1)."""
    with np.load(HERE / f"upstream_golden_{name}.npz") as file:
        return {key: file[key] for key in file.files}
