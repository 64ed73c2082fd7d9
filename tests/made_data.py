"""Fixtures for training: small data sets, a small recipe and the tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from cclip_deploy.datasets.flat import read_flat
from cclip_deploy.datasets.sample import Sample, of_split
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.train.config import Devices, TrainConfig

CPU = Devices(accelerator="cpu")
SMALL = TrainConfig(image_size=64, epochs=1, images_per_batch=2, prompts_per_image=2, threads=1, devices=CPU)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training and three test images with two prompts each; no val split."""
    folder = tmp_path_factory.mktemp("train") / "data"
    write_dataset(folder, {"train": 4, "test": 3}, (64, 64), seed=0, prompts_per_image=2)
    return folder


@pytest.fixture(scope="session")
def validated_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training and three validation images with two prompts each."""
    folder = tmp_path_factory.mktemp("validated") / "data"
    write_dataset(folder, {"train": 8, "val": 3}, (64, 64), seed=1, prompts_per_image=2)
    return folder


@pytest.fixture(scope="session")
def train_rows(data_folder: Path) -> list[Sample]:
    return of_split(read_flat(data_folder), "train")


@pytest.fixture(scope="session")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer.from_open_clip()
