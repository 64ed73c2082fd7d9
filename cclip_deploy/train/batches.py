"""Training batches: epoch order, random augmentation and prefetching.

Random numbers depend only on the seed, the epoch and the image. A run can therefore resume at any step, and the
numbers of processes and loader threads do not change the data.
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
PREFETCH_FACTOR = 3


class Batch(NamedTuple):
    """B images with P prompts each."""

    images: NDArray[np.float32]  # (B, 3, H, W), normalized
    tokens: NDArray[np.int64]  # (B, P, L)
    masks: NDArray[np.bool_]  # (B, P, H, W)
    rows: NDArray[np.int64]  # (B, P), row indices in the split


class DataShard(NamedTuple):
    """The part of every batch that one process handles."""

    rank: int = 0
    world_size: int = 1


def passes_per_epoch(images: int, config: TrainConfig, world_size: int = 1) -> int:
    """Return the number of forward passes of one process in an epoch, a multiple of `accumulate`.

    Images that do not fill a step are dropped.

    Raises:
        DataError: there are too few images for one step.
    """
    images_per_step = config.images_per_batch * config.accumulate * world_size
    if images < images_per_step:
        raise DataError(
            f"The train split has {images} images, fewer than images_per_batch = {config.images_per_batch} "
            f"x accumulate {config.accumulate} x {world_size} processes. Add images or lower these settings."
        )
    return images // images_per_step * config.accumulate


def plan_epoch(data: TrainingSet, config: TrainConfig, epoch: int, shard: DataShard = DataShard()) -> NDArray[np.int64]:  # noqa: B008
    """Return the row indices of every pass of a process, (passes, B, P), shuffled by image and within each image."""
    rng = np.random.default_rng([config.seed, epoch])
    order = rng.permutation(len(data.rows_of_image))
    rows = np.stack([np.resize(rng.permutation(data.rows_of_image[i]), config.prompts_per_image) for i in order])
    passes = passes_per_epoch(len(order), config, shard.world_size)
    size = config.images_per_batch
    used = rows[: passes * size * shard.world_size]
    return used.reshape(passes, shard.world_size, size, config.prompts_per_image)[:, shard.rank]


def make_batch(
    data: TrainingSet,
    rows: NDArray[np.int64],
    tokenizer: PromptTokenizer,
    config: TrainConfig,
    epoch: int | None = None,
) -> Batch:
    """Load and normalize the images of `rows`, (B, P), and augment them if `epoch` is given."""
    loaded = [_load_image(data, image_rows, tokenizer, config, epoch) for image_rows in rows]
    images, tokens, masks = (np.stack(part) for part in zip(*loaded, strict=True))
    return Batch(images, tokens, masks, rows)


def prefetch(load: Callable[[int], T], numbers: range, threads: int) -> Iterator[T]:
    """Yield `load(n)` for each number in order, computed ahead by worker threads."""
    with ThreadPoolExecutor(threads, thread_name_prefix="prefetch") as pool:
        pending: deque[Future[T]] = deque()
        try:
            for number in numbers:
                pending.append(pool.submit(load, number))
                if len(pending) > PREFETCH_FACTOR * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _load_image(
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
