"""Fixtures for networks, checkpoints and bundles, built once per test run."""

from __future__ import annotations

import os

# pytest-xdist workers share the cores. Set before numpy and torch are imported: too many threads slow the tests down
# and distort timings.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it; tables in a pipe have a width of their own
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.export.export import ExportOptions, export_bundle
from cclip_deploy.model.checkpoint import save_checkpoint
from cclip_deploy.model.config import TINY, ModelConfig
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.parity.reference import seeded_inputs
from tests.made_once import made_once
from tests.published.checkpoint import state_dict

pytest_plugins = ["tests.made_bundles", "tests.made_data"]
TINY_HW = (64, 96)
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first: a file runs in one worker, and a slow last one would leave the others idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(THREADS)


def random_network(config: ModelConfig = TINY, seed: int = 0) -> CausalCLIPSeg:
    """Return an untrained network in which every part affects the logits.

    Freshly initialized networks have zero-scaled residuals and neutral norms. Batch-norm statistics are computed from
    images; with random statistics the logits would be almost constant, and a wrong image encoder would pass the parity
    tests. About half of the pixels are inside.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = CausalCLIPSeg(config).requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if name.endswith("bn3.weight"):
            tensor.uniform_(0.2, 0.6, generator=generator)
        elif name.endswith("bias"):
            tensor.normal_(0, 0.1, generator=generator)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    image, tokens = (torch.from_numpy(array) for array in seeded_inputs(TINY_HW, 24))
    model.train()(image, tokens)
    for norm in norms:
        norm.momentum = 0.1
    model.head.prompt.bias[-1] -= model.eval().causal_logits(image, tokens).mean()
    return model


@pytest.fixture(scope="session")
def tiny_network() -> CausalCLIPSeg:
    """A tiny float32 network. Do not change it."""
    return random_network()


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_network: CausalCLIPSeg, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of the tiny network in this project's layout."""
    return made_once(tmp_path_factory, "tiny.safetensors", partial(save_checkpoint, tiny_network))


@pytest.fixture(scope="session")
def tiny_bundle_path(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle of the tiny network at 64x96 with the causal masks as outputs. Copy it before changing it."""
    options = ExportOptions(TINY_HW, 24, with_masks=True, threads=THREADS)

    def make(path: Path) -> None:
        export_bundle(tiny_checkpoint, path, options, "test")

    return made_once(tmp_path_factory, "tiny.cclip", make)


@pytest.fixture
def tiny_bundle(tiny_bundle_path: Path) -> Bundle:
    """The tiny bundle, newly opened."""
    return Bundle.open(tiny_bundle_path)


@pytest.fixture(scope="session")
def published_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a function from a seed to an rn101 checkpoint in the published layout (0.7 GB), written once."""

    def write(seed: int) -> Path:
        def make(path: Path) -> None:
            torch.save({key: torch.from_numpy(value) for key, value in state_dict(seed).items()}, path)

        return made_once(tmp_path_factory, f"published-seed{seed}.pth", make)

    return write


@pytest.fixture
def float64() -> Iterator[None]:
    """Set torch's default dtype to float64 during a test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
