"""What a benchmark compares and on what: its options, its stages, its seeded pictures and prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle import Bundle
from cclip_deploy.errors import ParityError, UsageError
from cclip_deploy.evidence.latency import Candidate
from cclip_deploy.evidence.parity import LIMITS, relative_error
from cclip_deploy.evidence.reference import END_ID, FIRST_WORD, LAST_WORD, SEED, START_ID, seeded_inputs
from cclip_deploy.runtime.choice import BackendName, Choice
from cclip_deploy.runtime.onnx_runtime import Device

Progress = Callable[[str], None]
LeftOut = list[dict[str, str]]
Floats = NDArray[np.float32]

WHOLE, IMAGE, PROMPT, DECODE, MACHINE = (
    "image and prompt", "image alone", "prompt alone", "one more prompt", "matrix product",
)  # fmt: skip
PEER_LIMIT = 1e-3
"""A float32 peer whose logits are farther than this from PyTorch's computes something else."""


@dataclass(frozen=True)
class BenchOptions:
    """What to compare with, and for how long. PyTorch and the peers need the checkpoint.

    `peers` adds what a user would pick instead, both of our backends, `workloads` (pictures, prompts on each), the
    machine's peak, and what `predict` costs in a process of its own.
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
    backend: BackendName = "onnxruntime"
    peers: bool = False
    choice: Choice | None = None
    workloads: tuple[tuple[int, int], ...] = ((1, 16), (1, 128), (8, 1))

    def __post_init__(self) -> None:
        if self.peers and self.checkpoint is None:
            raise UsageError("The peers run the network itself: give --checkpoint FILE with --peers.")
        if any(pictures < 1 or prompts < 1 for pictures, prompts in self.workloads):
            raise UsageError(f"Workloads are of 1 or more pictures and prompts, not {self.workloads}.")

    def extra(self) -> dict[str, object]:
        """What every row of the results says of its run."""
        return {"threads": self.threads, "device": self.device}

    def choice_of(self, backend: BackendName) -> Choice:
        """How a backend is opened; `choice` has the options of GPUs, and whether another may stand in."""
        return replace(self.choice or Choice(), backend=backend, device=self.device, threads=self.threads)

    def backends(self) -> tuple[BackendName, ...]:
        """Ours to be timed: the one that was chosen, both beside the peers."""
        return ("onnxruntime", "openvino") if self.peers else (self.backend,)


@dataclass(frozen=True)
class BenchInputs:
    """Seeded pictures (N, 3, H, W) and prompts (P, L); one of each where a stage takes one."""

    images: Floats
    tokens: NDArray[np.int64]

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
    def prompt(self) -> NDArray[np.int64]:
        """(1, L)"""
        return self.tokens[:1]


def workload_stage(pictures: int, prompts: int) -> str:
    """The stage's name for so many pictures and prompts on each."""
    return f"{pictures} × image, {prompts} × prompt"


def with_answers_checked(candidates: Iterable[Candidate], truth: Floats, left_out: LeftOut) -> list[Candidate]:
    """Run every candidate of the whole stage once, note how far its logits are from PyTorch's, drop peers too far.

    Raises:
        ParityError: one of ours breaks its precision's limit.
    """
    kept = []
    for candidate in candidates:
        if candidate.stage != WHOLE:
            kept.append(candidate)
            continue
        error = relative_error(np.asarray(candidate.run()), truth)
        ours = bool(candidate.extra.get("ours"))
        if error <= (LIMITS[candidate.precision].relative_error if ours else PEER_LIMIT):
            kept.append(replace(candidate, extra={**candidate.extra, "relative_error": error}))
        elif ours:
            raise ParityError(
                f"{candidate.name} is {error:.3g} away from PyTorch, so its time means nothing. "
                f"Check the bundle: cclip-deploy verify BUNDLE --backend {candidate.backend}"
            )
        else:
            left_out.append({"name": candidate.name, "reason": f"computes something else: relative error {error:.3g}"})
    return kept


def _workloads(options: BenchOptions) -> tuple[tuple[int, int], ...]:
    return options.workloads if options.peers else ()
