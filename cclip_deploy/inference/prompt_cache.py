"""Prompt kernels that were computed before: the last used ones in memory and, with a folder, all of them on disk."""

from __future__ import annotations

import hashlib
import json
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.common.files import disk_problem
from cclip_deploy.common.locks import clear_leftovers, unfinished_file
from cclip_deploy.errors import EnvironmentIssue, ParityError, UsageError

KERNELS_IN_MEMORY = 4096
SUFFIX = ".kernel"

_DIGEST_BYTES = 32
_LITTLE_ENDIAN = np.dtype("<f4")

Floats = NDArray[np.float32]
Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class PromptKernels:
    """The last convolutions of P prompts: kernel (P, 9, 256), tap_bias (P, 9), bias (P,), all float32."""

    kernel: Floats
    tap_bias: Floats
    bias: Floats

    def __len__(self) -> int:
        return len(self.bias)

    def part(self, start: int, stop: int) -> PromptKernels:
        """The prompts from `start` to before `stop`."""
        return PromptKernels(self.kernel[start:stop], self.tap_bias[start:stop], self.bias[start:stop])

    @staticmethod
    def join(parts: Sequence[PromptKernels]) -> PromptKernels:
        """All prompts of the parts, in order."""
        return PromptKernels(
            np.concatenate([part.kernel for part in parts]),
            np.concatenate([part.tap_bias for part in parts]),
            np.concatenate([part.bias for part in parts]),
        )


@dataclass(frozen=True)
class CacheCounts:
    """How prompts were answered, each look-up counted once; `rebuilt` were computed because their file was unusable."""

    memory_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    rebuilt: int = 0

    def to_dict(self) -> dict[str, int]:
        """The form of `predict --json`."""
        return asdict(self)

    def describe(self) -> str:
        """The form of `predict`'s summary."""
        told = f"{self.misses} computed, {self.memory_hits} from memory, {self.disk_hits} from disk"
        return f"Prompt kernels: {told}" + (
            f", {self.rebuilt} rebuilt because their file was unusable" * bool(self.rebuilt)
        )

    def since(self, earlier: CacheCounts) -> CacheCounts:
        """What was counted after `earlier`."""
        then = asdict(earlier)
        return CacheCounts(**{name: count - then[name] for name, count in asdict(self).items()})


@dataclass(frozen=True)
class KernelOrigin:
    """What, besides the prompt, decides a kernel's numbers; `channels` is the width of the features."""

    graph_sha256: str
    precision: str
    tokenizer_sha256: str
    prompt_length: int
    channels: int

    def header(self, tokens: Tokens) -> bytes:
        """The facts of one prompt's kernel as one line of JSON; their SHA-256 is its name on disk."""
        facts = {"format": 1, **asdict(self), "tokens": tokens.tolist()}
        return json.dumps(facts, separators=(",", ":")).encode() + b"\n"


class UnusableKernel(Exception):
    """A file of the prompt cache is damaged, of another origin or no file; the kernel is computed again."""


class KernelFolder:
    """Prompt kernels as files, one a prompt, shared by any number of processes.

    A file is the SHA-256 of all that follows, the line of facts, then kernel (9, channels), tap bias (9,) and bias as
    little-endian float32. The reader knows the facts and so every byte of the line and the length: a file that
    differs, whose checksum fails or that holds a number that is not finite is not used. Files are written under a
    hidden name and renamed, so that none is ever seen half-written; two writers of one prompt write the same facts.
    What a killed process left under a hidden name is removed when the folder is next opened.
    """

    def __init__(self, folder: Path, origin: KernelOrigin) -> None:
        """Make the folder, and see that it takes a file before anything is computed for it.

        Raises:
            UsageError: a file lies at its place.
            EnvironmentIssue: it cannot be made or written, or the disk is full.
        """
        self.folder = Path(folder)
        self.origin = origin
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is a file, where a folder for prompt kernels is expected. Choose another.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self.folder)
            with unfinished_file(self.folder / f"probe{SUFFIX}") as probe:
                probe.write_bytes(bytes(4 * self._floats()))
        except OSError as error:
            raise _cache_problem(self.folder, error) from error

    def path(self, tokens: Tokens) -> Path:
        """Where the kernel of a prompt lies."""
        return self.folder / (hashlib.sha256(self.origin.header(tokens)).hexdigest() + SUFFIX)

    def read(self, tokens: Tokens) -> PromptKernels | None:
        """The kernel (1 prompt), or None where there is none.

        Raises:
            UnusableKernel: what lies there is damaged, or of something else.
        """
        header = self.origin.header(tokens)
        expected_bytes = _DIGEST_BYTES + len(header) + 4 * self._floats()
        content = _read_regular_file(self.path(tokens), expected_bytes + 1)
        if content is None:
            return None
        digest, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if len(content) != expected_bytes or not body.startswith(header) or hashlib.sha256(body).digest() != digest:
            raise UnusableKernel
        values = np.frombuffer(body, _LITTLE_ENDIAN, offset=len(header)).astype(np.float32)
        if not np.isfinite(values).all():
            raise UnusableKernel
        kernel, tap_bias, bias = np.split(values, np.cumsum([9 * self.origin.channels, 9]))
        return PromptKernels(kernel.reshape(1, 9, -1), tap_bias.reshape(1, 9), bias)

    def write(self, tokens: Tokens, kernels: PromptKernels) -> None:
        """Keep the kernel of one prompt; it is whole on disk, or not there.

        Raises:
            EnvironmentIssue: the disk is full, or the folder cannot be written any more.
        """
        arrays = (kernels.kernel, kernels.tap_bias, kernels.bias)
        body = self.origin.header(tokens) + b"".join(a.astype(_LITTLE_ENDIAN).tobytes() for a in arrays)
        path = self.path(tokens)
        try:
            with unfinished_file(path) as unfinished:
                unfinished.write_bytes(hashlib.sha256(body).digest() + body)
                unfinished.replace(path)
        except OSError as error:
            raise _cache_problem(self.folder, error) from error

    def _floats(self) -> int:
        return 9 * self.origin.channels + 9 + 1


class PromptCache:
    """Kernels by token row: the last `capacity` used in memory, 9 kB each, and every one in `folder` if there is one.

    The token row is the normalized prompt. open_clip's cleaning repairs encodings, resolves HTML entities, squeezes
    blanks and lowers letters before it splits, and the network sees only what comes out: "Left  Lung" and "left lung"
    are one row and share an entry, and no two prompts that the network could tell apart do. What a backend rounds
    differently (about 1e-6) is no part of the key: a kernel serves every backend of its precision.

    May be used by several threads; each prompt is computed once.
    """

    def __init__(self, folder: KernelFolder | None = None, capacity: int = KERNELS_IN_MEMORY) -> None:
        if capacity < 1:
            raise UsageError(f"A prompt cache of {capacity} kernels keeps nothing. Give 1 or more.")
        self.folder = folder
        self.capacity = capacity
        self.counts = CacheCounts()
        self._kept: OrderedDict[bytes, PromptKernels] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._kept)

    def kernels(self, rows: Sequence[Tokens], compute: Callable[[Tokens], PromptKernels]) -> PromptKernels:
        """The kernels of token rows (L,), in order; `compute` is asked once for the distinct ones that are nowhere.

        Raises:
            ParityError: a computed kernel is not finite; it is not kept.
            EnvironmentIssue: the folder cannot be written.
        """
        keys = [row.tobytes() for row in rows]
        distinct = dict(zip(keys, rows, strict=True))
        with self._lock:
            found, unusable = self._find(distinct)
            absent = {key: row for key, row in distinct.items() if key not in found}
            if absent:
                found |= self._compute(absent, compute)
            self._count(memory_hits=len(keys) - len(distinct), misses=len(absent) - unusable, rebuilt=unusable)
            self._keep(found)
        return PromptKernels.join([found[key] for key in keys])

    def _find(self, rows: dict[bytes, Tokens]) -> tuple[dict[bytes, PromptKernels], int]:
        """What memory and disk have, and how many files were unusable."""
        found = {key: self._kept[key] for key in rows if key in self._kept}
        self._count(memory_hits=len(found))
        unusable = 0
        for key, row in rows.items():
            if self.folder is None or key in found:
                continue
            try:
                kernels = self.folder.read(row)
            except UnusableKernel:
                unusable += 1
                continue
            if kernels is not None:
                found[key] = kernels
                self._count(disk_hits=1)
        return found, unusable

    def _compute(
        self, rows: dict[bytes, Tokens], compute: Callable[[Tokens], PromptKernels]
    ) -> dict[bytes, PromptKernels]:
        computed = compute(np.stack(list(rows.values())))
        if not all(np.isfinite(array).all() for array in (computed.kernel, computed.tap_bias, computed.bias)):
            raise ParityError(
                "The prompt encoder gave numbers that are not finite. Check it: cclip-deploy verify BUNDLE."
            )
        # Joining copies; a mere slice would keep all of its chunk in memory.
        single = {key: PromptKernels.join([computed.part(i, i + 1)]) for i, key in enumerate(rows)}
        if self.folder is not None:
            for key, kernels in single.items():
                self.folder.write(rows[key], kernels)
        return single

    def _keep(self, found: dict[bytes, PromptKernels]) -> None:
        for key, kernels in found.items():
            self._kept[key] = kernels
            self._kept.move_to_end(key)
        while len(self._kept) > self.capacity:
            self._kept.popitem(last=False)

    def _count(self, **more: int) -> None:
        self.counts = replace(self.counts, **{name: getattr(self.counts, name) + n for name, n in more.items()})


def _read_regular_file(path: Path, most_bytes: int) -> bytes | None:
    """At most so many bytes, None where there is nothing; b"" where it cannot be read or is no file: no pipe hangs."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return b""
        with path.open("rb") as file:
            return file.read(most_bytes)
    except FileNotFoundError:
        return None
    except OSError:
        return b""


def _cache_problem(folder: Path, error: OSError) -> EnvironmentIssue:
    problem = disk_problem(folder, error)
    return EnvironmentIssue(f"The prompt cache cannot be used. {problem} Or leave --prompt-cache out.")
