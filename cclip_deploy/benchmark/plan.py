"""Options, stages and inputs of a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cclip_deploy.benchmark.candidate import Floats, Tokens
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.common.threads import check_threads
from cclip_deploy.errors import UsageError
from cclip_deploy.parity.reference import END_ID, FIRST_WORD, LAST_WORD, SEED, START_ID, seeded_inputs
from cclip_deploy.runtime.onnxruntime.session import Device
from cclip_deploy.runtime.registry import BackendConfig, BackendName

Progress = Callable[[str], None]
LeftOut = list[dict[str, str]]

WHOLE, IMAGE, PROMPT, DECODE, MACHINE = (
    "image and prompt", "image alone", "prompt alone", "one more prompt", "matrix product",
)  # fmt: skip


@dataclass(frozen=True)
class BenchOptions:
    """Options of a benchmark. PyTorch and the baselines need `checkpoint`.

    `peers` adds the baselines in ONNX Runtime and OpenVINO, `workloads` (images, prompts for each image), the peak of
    the machine, and the cost of `predict` in a subprocess. The default backend is ONNX Runtime; with `peers` on a CPU,
    ONNX Runtime and OpenVINO.
    """

    checkpoint: Path | None = None
    plain_bundle: Path | None = None
    compile: bool = True
    device: Device = "cpu"
    threads: int = 2
    rounds: int = 30
    warmup_rounds: int = 2
    budget_seconds: float = 180.0
    seed: int = 0
    backend: BackendName | None = None
    peers: bool = False
    choice: BackendConfig | None = None
    workloads: tuple[tuple[int, int], ...] = ((1, 16), (1, 128), (8, 1))

    def __post_init__(self) -> None:
        check_threads(self.threads)
        if self.peers and self.checkpoint is None:
            raise UsageError("--peers needs the checkpoint: give --checkpoint FILE.")
        if any(images < 1 or prompts < 1 for images, prompts in self.workloads):
            raise UsageError(f"Workloads need at least 1 image and 1 prompt, not {self.workloads}.")

    def choice_of(self, backend: BackendName) -> BackendConfig:
        """Return the configuration of a backend; `choice` sets the GPU options and the fallback."""
        return replace(self.choice or BackendConfig(), backend=backend, device=self.device, threads=self.threads)

    def backends(self) -> tuple[BackendName, ...]:
        """Return the backends that run the bundle."""
        if self.backend is not None:
            return (self.backend,)
        return ("onnxruntime", "openvino") if self.peers and self.device == "cpu" else ("onnxruntime",)


@dataclass(frozen=True)
class BenchInputs:
    """Random images (N, 3, H, W) and prompts (P, L) with a fixed seed."""

    images: Floats
    tokens: Tokens

    @staticmethod
    def for_bundle(bundle: Bundle, options: BenchOptions) -> BenchInputs:
        """Generate inputs for the largest workload; the first of each are those of the bundle's reference."""
        pictures, prompts = (max(counts) for counts in zip((1, 1), *_workloads(options), strict=True))
        image, tokens = seeded_inputs(bundle.manifest.image_hw, bundle.manifest.prompt_length)
        rng = np.random.default_rng(SEED)
        images = np.concatenate([image[:1], *(np.roll(image[:1], 7 * n, axis=3) for n in range(1, pictures))])
        rows = np.tile(tokens[1:2], (prompts, 1))
        words = (rows != 0) & (rows != START_ID) & (rows != END_ID)
        rows[words] = rng.integers(FIRST_WORD, LAST_WORD, int(words.sum()))
        rows[0] = tokens[0]
        return BenchInputs(images, rows)

    @property
    def image(self) -> Floats:
        """First image (1, 3, H, W)."""
        return self.images[:1]

    @property
    def prompt(self) -> Tokens:
        """First prompt (1, L)."""
        return self.tokens[:1]


def workload_stage(images: int, prompts: int) -> str:
    """Return the name of the stage of a workload."""
    return f"{images} × image, {prompts} × prompt"


def _workloads(options: BenchOptions) -> tuple[tuple[int, int], ...]:
    return options.workloads if options.peers else ()
