"""From a split to batches: the order of an epoch, random changes, and reading ahead while the network computes.

Everything random is drawn from (seed, epoch, place) alone, so that a training can go on from any step, and so that
any number of processes and reading threads see the same films changed in the same way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.datasets.augmentation import Augmentation, apply_change, draw_change
from cclip_deploy.errors import DataError
from cclip_deploy.imaging.preprocess import Preprocessing, normalize
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.train.config import TrainConfig
from cclip_deploy.train.training_set import TrainingSet

T = TypeVar("T")
READ_AHEAD = 3


class Batch(NamedTuple):
    """B images, each with P of its rows."""

    images: NDArray[np.float32]  # (B, 3, H, W), normalized
    tokens: NDArray[np.int64]  # (B, P, L)
    masks: NDArray[np.bool_]  # (B, P, H, W)
    rows: NDArray[np.int64]  # (B, P), the rows' numbers in the split


class Share(NamedTuple):
    """One process of several that split every batch among them."""

    rank: int = 0
    processes: int = 1


def passes_per_epoch(images: int, config: TrainConfig, processes: int = 1) -> int:
    """Passes of each process in an epoch, a multiple of `accumulate`; what fills no step is left out.

    DataError if not even one step is filled.
    """
    images_per_step = config.images_per_batch * config.accumulate * processes
    if images < images_per_step:
        raise DataError(
            f"The train split has {images} images, fewer than images_per_batch = {config.images_per_batch} "
            f"x accumulate {config.accumulate} x {processes} processes. Add images or lower them."
        )
    return images // images_per_step * config.accumulate


def plan_epoch(data: TrainingSet, config: TrainConfig, epoch: int, share: Share = Share()) -> NDArray[np.int64]:  # noqa: B008
    """The rows of every pass of a process: (passes, B, P); all images in a new order, rows of each in a new order."""
    rng = np.random.default_rng([config.seed, epoch])
    order = rng.permutation(len(data.rows_of_image))
    rows = np.stack([np.resize(rng.permutation(data.rows_of_image[i]), config.prompts_per_image) for i in order])
    passes = passes_per_epoch(len(order), config, share.processes)
    size = config.images_per_batch
    used = rows[: passes * size * share.processes]
    return used.reshape(passes, share.processes, size, config.prompts_per_image)[:, share.rank]


def make_batch(
    data: TrainingSet,
    rows: NDArray[np.int64],
    tokenizer: PromptTokenizer,
    config: TrainConfig,
    epoch: int | None = None,
) -> Batch:
    """Read and normalize the rows (B, P) of B images; changed at random, differently each epoch, where one is given."""
    drawn = [_draw_one(data, of_image, tokenizer, config, epoch) for of_image in rows]
    images, tokens, masks = (np.stack(part) for part in zip(*drawn, strict=True))
    return Batch(images, tokens, masks, rows)


def read_ahead(make: Callable[[int], T], numbers: range, threads: int) -> Iterator[T]:
    """make(n) of each number, in order, made by other threads while the caller works on earlier ones."""
    with ThreadPoolExecutor(threads, thread_name_prefix="reading") as pool:
        coming: deque[Future[T]] = deque()
        try:
            for number in numbers:
                coming.append(pool.submit(make, number))
                if len(coming) > READ_AHEAD * threads:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()


def _draw_one(
    data: TrainingSet, rows: NDArray[np.int64], tokenizer: PromptTokenizer, config: TrainConfig, epoch: int | None
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
    image = int(data.image_of_row[rows[0]])
    pixels, masks, tokens = data.images[image], np.stack([data.masks[row] for row in rows]), data.tokens[rows]
    if epoch is not None and config.augmentation != Augmentation():
        change = draw_change(np.random.default_rng([config.seed, epoch, image, 1]), config.augmentation)
        texts = tuple(data.texts[row] for row in rows)
        changed, masks, texts = apply_change(change, pixels.transpose(1, 2, 0), masks, texts)
        pixels = changed.transpose(2, 0, 1)
        tokens = np.stack([tokenizer.encode_cut(text, config.prompt_length) for text in texts])
    return normalize(pixels, Preprocessing()), tokens, masks
