"""Training and validation splits: lazily loaded and cached images and masks at the network's image size."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.common.files import sha256_file
from cclip_deploy.datasets.mask_file import read_mask
from cclip_deploy.datasets.sample import Sample
from cclip_deploy.imaging.preprocess import Preprocessing, resize_pixels
from cclip_deploy.imaging.reading import read_image
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.train.config import TrainConfig

GIB = 2**30
A = TypeVar("A", bound=np.generic)


class CachedArrays(Generic[A]):
    """Sequence of arrays loaded from files on first access, and cached in memory up to a size limit."""

    def __init__(self, paths: Sequence[Path], read: Callable[[Path], NDArray[A]], capacity_bytes: float) -> None:
        self.paths = tuple(paths)
        self._read = read
        self._free_bytes = capacity_bytes
        self._cache: dict[int, NDArray[A]] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> NDArray[A]:
        """Return the array of a file. Do not modify it."""
        array = self._cache.get(index)
        if array is None:
            array = self._read(self.paths[index])
            if self._free_bytes >= array.nbytes:
                self._free_bytes -= array.nbytes
                self._cache[index] = array
        return array


@dataclass(frozen=True)
class TrainingSet:
    """One split of N images and R rows (image, mask, prompt) with prompts of L tokens."""

    images: CachedArrays[np.float32]  # N of (1 or 3, H, W) in [0, 1]
    masks: CachedArrays[np.bool_]  # R of (H, W)
    tokens: NDArray[np.int64]  # (R, L)
    texts: tuple[str, ...]  # R
    image_of_row: NDArray[np.int64]  # (R,)
    rows_of_image: tuple[NDArray[np.int64], ...]  # N arrays of row indices
    cut_prompts: int


def open_training_set(samples: Sequence[Sample], tokenizer: PromptTokenizer, config: TrainConfig) -> TrainingSet:
    """Return a split's samples as a training set; prompts that are too long are truncated and counted."""
    rows_of_path: dict[Path, list[int]] = {}
    for row, sample in enumerate(samples):
        rows_of_path.setdefault(sample.image, []).append(row)
    numbers = {path: number for number, path in enumerate(rows_of_path)}
    hw, capacity_bytes = config.image_hw, config.cache_gib * GIB
    mask_values = samples[0].mask_values  # those of the data set
    return TrainingSet(
        images=CachedArrays(list(rows_of_path), lambda path: _read_image(path, hw), 0.8 * capacity_bytes),
        masks=CachedArrays(
            [r.mask for r in samples], lambda path: _resize_mask(read_mask(path, mask_values), hw), 0.2 * capacity_bytes
        ),
        tokens=np.stack([tokenizer.encode_cut(sample.text, config.prompt_length) for sample in samples]),
        texts=tuple(sample.text for sample in samples),
        image_of_row=np.array([numbers[sample.image] for sample in samples], np.int64),
        rows_of_image=tuple(np.array(rows, np.int64) for rows in rows_of_path.values()),
        cut_prompts=sum(len(tokenizer.ids(sample.text)) > config.prompt_length for sample in samples),
    )


def data_fingerprint(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return counts and SHA-256 digests of a split's parts, so that a resumed run detects changed data."""
    images = dict.fromkeys(sample.image for sample in samples)
    root = os.path.commonpath([path.parent for r in samples for path in (r.image, r.mask)])
    names = [(os.path.relpath(r.image, root), os.path.relpath(r.mask, root), r.subject) for r in samples]
    chosen = {"mask values": list(samples[0].mask_values)} if samples[0].mask_values else {}
    return chosen | {
        "rows": len(samples),
        "images": len(images),
        "file names and patients": _digest(repr(name) for name in names),
        "prompts": _digest(sample.text for sample in samples),
        "pictures": _digest(sha256_file(path) for path in images),
        "masks": _digest(sha256_file(sample.mask) for sample in samples),
    }


def _resize_mask(mask: NDArray[np.bool_], hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Resize a mask; a pixel is inside if more than half of its area is."""
    from PIL import Image

    if mask.shape == hw:
        return mask
    fraction = Image.fromarray(mask.astype(np.float32)).resize((hw[1], hw[0]), Image.Resampling.BOX)
    return np.asarray(fraction) > 0.5


def _read_image(path: Path, hw: tuple[int, int]) -> NDArray[np.float32]:
    return resize_pixels(read_image(path).pixels, hw, Preprocessing())


def _digest(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8") + b"\0")
    return digest.hexdigest()
