"""What a benchmark compares and on what: its options, its stages, its seeded pictures and prompts."""

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
    """What to compare with, and for how long. PyTorch and the baselines need the checkpoint.

    `peers` adds what a user would run instead, `workloads` (images, prompts on each), the machine's peak, and what
    `predict` costs in a process of its own. Where no `backend` is given, ONNX Runtime is measured, and with `peers` on
    a CPU OpenVINO beside it.
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
            raise UsageError("The peers run the network itself: give --checkpoint FILE with --peers.")
        if any(pictures < 1 or prompts < 1 for pictures, prompts in self.workloads):
            raise UsageError(f"Workloads are of 1 or more pictures and prompts, not {self.workloads}.")

    def choice_of(self, backend: BackendName) -> BackendConfig:
        """How a backend is opened; `choice` has the options of GPUs, and whether another may stand in."""
        return replace(self.choice or BackendConfig(), backend=backend, device=self.device, threads=self.threads)

    def backends(self) -> tuple[BackendName, ...]:
        """The backends that run the bundle: the one that was given, or the default ones."""
        if self.backend is not None:
            return (self.backend,)
        return ("onnxruntime", "openvino") if self.peers and self.device == "cpu" else ("onnxruntime",)


@dataclass(frozen=True)
class BenchInputs:
    """Seeded pictures (N, 3, H, W) and prompts (P, L); one of each where a stage takes one."""

    images: Floats
    tokens: Tokens

    @staticmethod
    def for_bundle(bundle: Bundle, options: BenchOptions) -> BenchInputs:
        """As many as the largest workload takes; the first of each are those of every bundle's reference."""
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
        """(1, 3, H, W)"""
        return self.images[:1]

    @property
    def prompt(self) -> Tokens:
        """(1, L)"""
        return self.tokens[:1]


def workload_stage(pictures: int, prompts: int) -> str:
    """The stage's name for so many pictures and prompts on each."""
    return f"{pictures} × image, {prompts} × prompt"


def _workloads(options: BenchOptions) -> tuple[tuple[int, int], ...]:
    return options.workloads if options.peers else ()
