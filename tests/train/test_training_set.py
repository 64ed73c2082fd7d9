"""Tests of training sets: resizing, caching and fingerprints."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from cclip_deploy.datasets.flat import read_flat
from cclip_deploy.datasets.sample import Sample, of_split
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.train.training_set import CachedArrays, data_fingerprint, open_training_set
from tests.made_data import SMALL


def test_masks_are_resized_to_the_networks_image_size(train_rows: list[Sample], tokenizer: PromptTokenizer) -> None:
    data = open_training_set(train_rows, tokenizer, SMALL)
    half = open_training_set(train_rows, tokenizer, SMALL.model_copy(update={"image_size": 32}))
    assert half.images[0].shape == (1, 32, 32)
    for row in range(8):
        share = data.masks[row].reshape(32, 2, 32, 2).mean(axis=(1, 3))
        assert np.array_equal(half.masks[row], share > 0.5)


def test_rows_are_mapped_to_their_images(train_rows: list[Sample], tokenizer: PromptTokenizer) -> None:
    data = open_training_set(train_rows, tokenizer, SMALL)
    assert [data.images.paths[image] for image in data.image_of_row] == [row.image for row in train_rows]
    assert sorted(np.concatenate(data.rows_of_image).tolist()) == list(range(8))


def test_truncated_prompts_are_counted(train_rows: list[Sample], tokenizer: PromptTokenizer) -> None:
    data = open_training_set(train_rows, tokenizer, SMALL.model_copy(update={"prompt_length": 8}))
    assert data.cut_prompts == 8
    assert data.tokens.shape == (8, 8)


def test_files_are_read_once_if_they_fit_into_the_cache() -> None:
    reads: list[str] = []

    def read(path: Path) -> np.ndarray:
        reads.append(path.name)
        return np.zeros(10, np.bool_)

    arrays = CachedArrays([Path("a"), Path("b"), Path("c")], read, capacity_bytes=25)
    for index in (0, 1, 2, 0, 1, 2):
        arrays[index]
    assert reads == ["a", "b", "c", "c"]


def test_a_fingerprint_detects_changes_but_not_a_move(data_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(data_folder, tmp_path / "copy")
    rows = of_split(read_flat(data_folder), "train")
    copied = of_split(read_flat(tmp_path / "copy"), "train")
    assert data_fingerprint(rows) == data_fingerprint(copied)
    other_text = [dataclasses.replace(copied[0], text="Lower left lung."), *copied[1:]]
    assert _differing(data_fingerprint(rows), data_fingerprint(other_text)) == {"prompts"}
    assert _differing(data_fingerprint(rows), data_fingerprint(copied[:-1])) >= {"rows", "masks", "prompts"}
    Image.new("L", (64, 64), 255).save(copied[0].mask)
    assert _differing(data_fingerprint(rows), data_fingerprint(copied)) == {"masks"}


def test_chosen_mask_values_are_trained_and_change_the_fingerprint(
    train_rows: list[Sample], tokenizer: PromptTokenizer
) -> None:
    outside = [dataclasses.replace(row, mask_values=("0",)) for row in train_rows]
    written, inverted = (open_training_set(rows, tokenizer, SMALL) for rows in (train_rows, outside))
    assert all(np.array_equal(inverted.masks[row], ~written.masks[row]) for row in range(8))
    assert data_fingerprint(outside)["mask values"] == ["0"]
    assert data_fingerprint(train_rows).keys() == data_fingerprint(outside).keys() - {"mask values"}


def _differing(one: dict[str, object], other: dict[str, object]) -> set[str]:
    return {key for key in one if one[key] != other[key]}
