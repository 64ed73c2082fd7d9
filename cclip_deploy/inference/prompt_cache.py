"""Cache of prompt kernels: recently used ones in memory and, optionally, all of them on disk."""

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
    """Weights of the last convolution for P prompts: kernel (P, 9, 256), tap_bias (P, 9), bias (P,), all float32."""

    kernel: Floats
    tap_bias: Floats
    bias: Floats

    def __len__(self) -> int:
        return len(self.bias)

    def part(self, start: int, stop: int) -> PromptKernels:
        """Return the kernels of prompts `start` to `stop - 1`."""
        return PromptKernels(self.kernel[start:stop], self.tap_bias[start:stop], self.bias[start:stop])

    @staticmethod
    def join(parts: Sequence[PromptKernels]) -> PromptKernels:
        """Concatenate the kernels of several groups of prompts."""
        return PromptKernels(
            np.concatenate([part.kernel for part in parts]),
            np.concatenate([part.tap_bias for part in parts]),
            np.concatenate([part.bias for part in parts]),
        )


@dataclass(frozen=True)
class CacheCounts:
    """Number of look-ups by where the kernel came from; `rebuilt` were computed because their file was unusable."""

    memory_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    rebuilt: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return the JSON form of `predict --json`."""
        return asdict(self)

    def describe(self) -> str:
        """Return the counts as a sentence."""
        counts = f"{self.misses} computed, {self.memory_hits} from memory, {self.disk_hits} from disk"
        rebuilt = f", {self.rebuilt} rebuilt because their file was unusable" if self.rebuilt else ""
        return f"Prompt kernels: {counts}{rebuilt}"

    def since(self, earlier: CacheCounts) -> CacheCounts:
        """Return the difference to `earlier` counts."""
        before = asdict(earlier)
        return CacheCounts(**{name: count - before[name] for name, count in asdict(self).items()})


@dataclass(frozen=True)
class KernelOrigin:
    """What a kernel depends on besides the prompt. `channels` is the number of feature channels."""

    graph_sha256: str
    precision: str
    tokenizer_sha256: str
    prompt_length: int
    channels: int

    def header(self, tokens: Tokens) -> bytes:
        """Return the origin and tokens of a kernel as a line of JSON; its SHA-256 is the file name."""
        facts = {"format": 1, **asdict(self), "tokens": tokens.tolist()}
        return json.dumps(facts, separators=(",", ":")).encode() + b"\n"


class UnusableKernel(Exception):
    """A cache file is damaged or of another origin; the kernel is computed again."""


class KernelFolder:
    """A folder with one file per prompt kernel, which processes can share.

    A file contains the SHA-256 of the rest, the header line of `KernelOrigin`, then kernel (9, channels), tap bias (9,)
    and bias as little-endian float32. A file is not used if its header, length or checksum is wrong, or a number is not
    finite. Files are written under a hidden name and renamed, so none is read half-written. Hidden files that a killed
    process left are removed when the folder is opened.
    """

    def __init__(self, folder: Path, origin: KernelOrigin) -> None:
        """Create the folder, and check that it is writable before anything is computed.

        Raises:
            UsageError: `folder` is a file.
            EnvironmentIssue: the folder cannot be created or written, or the disk is full.
        """
        self.folder = Path(folder)
        self.origin = origin
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is a file; the prompt cache needs a folder. Choose another.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self.folder)
            with unfinished_file(self.folder / f"probe{SUFFIX}") as probe:
                probe.write_bytes(bytes(4 * self._floats()))
        except OSError as error:
            raise _cache_problem(self.folder, error) from error

    def path(self, tokens: Tokens) -> Path:
        """Return the file of a prompt's kernel."""
        return self.folder / (hashlib.sha256(self.origin.header(tokens)).hexdigest() + SUFFIX)

    def read(self, tokens: Tokens) -> PromptKernels | None:
        """Return the kernel of one prompt; None if there is no file.

        Raises:
            UnusableKernel: the file is damaged, or of another origin.
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
        """Write the kernel of one prompt atomically.

        Raises:
            EnvironmentIssue: the disk is full, or the folder is not writable.
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
    """Kernels by token row: the last `capacity` used in memory, 9 kB each, and all of them in `folder`, if given.

    Prompts with equal tokens, such as "Left  Lung" and "left lung", share an entry. The backend is not part of the key:
    rounding differences between backends of one precision are about 1e-6.

    Thread-safe; each prompt is computed once.
    """

    def __init__(self, folder: KernelFolder | None = None, capacity: int = KERNELS_IN_MEMORY) -> None:
        if capacity < 1:
            raise UsageError(f"The capacity of the prompt cache is {capacity}; it must be 1 or more.")
        self.folder = folder
        self.capacity = capacity
        self.counts = CacheCounts()
        self._entries: OrderedDict[bytes, PromptKernels] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def kernels(self, rows: Sequence[Tokens], compute: Callable[[Tokens], PromptKernels]) -> PromptKernels:
        """Return the kernels of token rows (L,), in order.

        Args:
            rows: token rows.
            compute: called once with the distinct rows (P, L) that are not cached.

        Raises:
            ParityError: a computed kernel is not finite; it is not cached.
            EnvironmentIssue: the folder is not writable.
        """
        keys = [row.tobytes() for row in rows]
        distinct = dict(zip(keys, rows, strict=True))
        with self._lock:
            found, unusable = self._find(distinct)
            absent = {key: row for key, row in distinct.items() if key not in found}
            if absent:
                found |= self._compute(absent, compute)
            self._count(memory_hits=len(keys) - len(distinct), misses=len(absent) - unusable, rebuilt=unusable)
            self._store(found)
        return PromptKernels.join([found[key] for key in keys])

    def _find(self, rows: dict[bytes, Tokens]) -> tuple[dict[bytes, PromptKernels], int]:
        """Return the kernels in memory and on disk, and the number of unusable files."""
        found = {key: self._entries[key] for key in rows if key in self._entries}
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
                "The prompt encoder gave values that are not finite. Check the bundle: cclip-deploy verify BUNDLE."
            )
        # Joining copies: a slice would hold the memory of the whole array.
        single = {key: PromptKernels.join([computed.part(i, i + 1)]) for i, key in enumerate(rows)}
        if self.folder is not None:
            for key, kernels in single.items():
                self.folder.write(rows[key], kernels)
        return single

    def _store(self, found: dict[bytes, PromptKernels]) -> None:
        for key, kernels in found.items():
            self._entries[key] = kernels
            self._entries.move_to_end(key)
        while len(self._entries) > self.capacity:
            self._entries.popitem(last=False)

    def _count(self, **more: int) -> None:
        self.counts = replace(self.counts, **{name: getattr(self.counts, name) + n for name, n in more.items()})


def _read_regular_file(path: Path, most_bytes: int) -> bytes | None:
    """Return at most so many bytes; None if there is no file, b"" if it is unreadable or not a regular file."""
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
    return EnvironmentIssue(f"The prompt cache cannot be used. {problem} Or leave out --prompt-cache.")
