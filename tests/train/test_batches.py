"""Tests of training batches: epoch order, sharding, augmentation and prefetching."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from cclip_deploy.datasets.augmentation import Augmentation
from cclip_deploy.datasets.sample import Sample
from cclip_deploy.errors import DataError
from cclip_deploy.imaging.preprocess import Preprocessing, normalize
from cclip_deploy.prompts.reader import mirror
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.train.batches import DataShard, make_batch, passes_per_epoch, plan_epoch, prefetch
from cclip_deploy.train.training_set import TrainingSet, open_training_set
from tests.made_data import SMALL


@pytest.fixture
def data(train_rows: list[Sample], tokenizer: PromptTokenizer) -> TrainingSet:
    return open_training_set(train_rows, tokenizer, SMALL)


def test_every_image_is_used_once_per_epoch_with_its_own_rows(data: TrainingSet) -> None:
    plan = plan_epoch(data, SMALL, 0)
    assert plan.shape == (2, 2, 2)
    assert sorted(data.image_of_row[plan[..., 0]].flatten().tolist()) == [0, 1, 2, 3]
    for rows in plan.reshape(4, 2):
        assert set(rows.tolist()) == set(data.rows_of_image[data.image_of_row[rows[0]]].tolist())


def test_each_epoch_has_its_own_order_determined_by_the_seed(data: TrainingSet) -> None:
    plans = [plan_epoch(data, SMALL.model_copy(update={"images_per_batch": 4}), epoch) for epoch in (0, 1, 2, 0)]
    assert np.array_equal(plans[0], plans[3])
    assert len({plan.tobytes() for plan in plans}) > 1


def test_two_processes_split_the_batches_of_one(data: TrainingSet) -> None:
    whole = plan_epoch(data, SMALL, 3)
    single = SMALL.model_copy(update={"images_per_batch": 1})
    shares = [plan_epoch(data, single, 3, DataShard(rank, 2)) for rank in (0, 1)]
    assert np.array_equal(np.concatenate(shares, axis=1), whole)


def test_too_few_images_for_a_step_raise_an_error() -> None:
    config = SMALL.model_copy(update={"accumulate": 3})
    assert passes_per_epoch(13, config) == 6
    with pytest.raises(DataError, match="11 images, fewer than images_per_batch = 2 x accumulate 3 x 2 processes"):
        passes_per_epoch(11, config, world_size=2)


def test_a_batch_is_read_and_normalized(data: TrainingSet, tokenizer: PromptTokenizer) -> None:
    rows = np.array([[2, 3], [0, 1]])
    batch = make_batch(data, rows, tokenizer, SMALL, epoch=0)
    assert batch.images.shape == (2, 3, 64, 64)
    assert np.array_equal(batch.images[0], normalize(data.images[1], Preprocessing()))
    assert np.array_equal(batch.masks[1, 1], data.masks[1])
    assert np.array_equal(batch.tokens[0, 1], data.tokens[3])


def test_augmentation_changes_images_masks_and_prompts_together(data: TrainingSet, tokenizer: PromptTokenizer) -> None:
    flipping = SMALL.model_copy(update={"augmentation": Augmentation(flip_share=1.0)})
    rows = np.array([[0, 1], [4, 5]])
    plain, flipped, again = (make_batch(data, rows, tokenizer, c, 0) for c in (SMALL, flipping, flipping))
    assert np.allclose(flipped.images, plain.images[..., ::-1], atol=1e-6)
    assert np.array_equal(flipped.masks, plain.masks[..., ::-1])
    words = [[tokenizer.encode(mirror(data.texts[row]) or "", 32) for row in of_image] for of_image in rows]
    assert np.array_equal(flipped.tokens, words)
    assert not np.array_equal(flipped.tokens, plain.tokens)
    assert all(map(np.array_equal, flipped, again))


def test_augmentation_differs_between_epochs_and_skips_validation(
    data: TrainingSet, tokenizer: PromptTokenizer
) -> None:
    config = SMALL.model_copy(update={"augmentation": Augmentation(gain=0.3)})
    rows = np.array([[0, 1]])
    first, second, none = (make_batch(data, rows, tokenizer, config, epoch).images for epoch in (0, 1, None))
    assert not np.allclose(first, second)
    assert np.array_equal(none, make_batch(data, rows, tokenizer, SMALL).images)


def test_prefetch_keeps_the_order_and_uses_worker_threads() -> None:
    readers: set[str] = set()

    def make(number: int) -> int:
        readers.add(threading.current_thread().name)
        time.sleep(0.002 * (number % 3))
        return number * number

    assert list(prefetch(make, range(2, 14), threads=2)) == [n * n for n in range(2, 14)]
    assert threading.current_thread().name not in readers


def test_prefetch_raises_errors_of_the_workers() -> None:
    def make(number: int) -> int:
        if number == 3:
            raise DataError("broken picture")
        return number

    with pytest.raises(DataError, match="broken picture"):
        list(prefetch(make, range(9), threads=1))
