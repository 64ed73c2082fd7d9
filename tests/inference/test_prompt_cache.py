"""Cached kernels equal computed ones; damaged and foreign files are not used."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cclip_deploy.errors import EnvironmentIssue, ParityError, UsageError
from cclip_deploy.inference.prompt_cache import CacheCounts, KernelFolder, KernelOrigin, PromptCache, PromptKernels

ORIGIN = KernelOrigin("a" * 64, "fp32", "b" * 64, 6, 4)


def row(*ids: int) -> np.ndarray:
    tokens = np.zeros(6, np.int64)
    tokens[: len(ids)] = ids
    return tokens


def formula(tokens: np.ndarray) -> PromptKernels:
    """Kernels that say which tokens they are of."""
    first = tokens[:, :1].astype(np.float32)
    kernel = (first[:, :, None] + np.arange(36, dtype=np.float32).reshape(9, 4) / 7).astype(np.float32)
    return PromptKernels(kernel, first + np.arange(9, dtype=np.float32), first[:, 0] / 3)


def never(tokens: np.ndarray) -> PromptKernels:
    raise AssertionError("computed")


def assert_equal(found: PromptKernels, expected: PromptKernels) -> None:
    for name in ("kernel", "tap_bias", "bias"):
        have, want = getattr(found, name), getattr(expected, name)
        assert have.dtype == np.float32
        np.testing.assert_array_equal(have, want)


@pytest.fixture
def folder(tmp_path: Path) -> KernelFolder:
    return KernelFolder(tmp_path / "new" / "cache", ORIGIN)


def test_the_next_process_reads_cached_kernels(folder: KernelFolder) -> None:
    rows = [row(3, 1), row(5), row(3, 1)]
    first, second = PromptCache(folder), PromptCache(KernelFolder(folder.folder, ORIGIN))
    assert_equal(first.kernels(rows, formula), formula(np.stack(rows)))
    assert first.counts == CacheCounts(memory_hits=1, misses=2)
    assert_equal(second.kernels(rows, never), formula(np.stack(rows)))
    assert second.counts == CacheCounts(memory_hits=1, disk_hits=2)
    assert_equal(second.kernels(rows[:1], never), formula(rows[0][None]))
    assert second.counts == CacheCounts(memory_hits=2, disk_hits=2)
    assert {path.suffix for path in folder.folder.iterdir()} == {".kernel"}


def test_a_file_contains_checksum_header_and_numbers(folder: KernelFolder) -> None:
    PromptCache(folder).kernels([row(3, 1)], formula)
    (path,) = folder.folder.iterdir()
    content = path.read_bytes()
    assert hashlib.sha256(content[32:]).digest() == content[:32]
    header, numbers = content[32:].split(b"\n", 1)
    assert path.stem == hashlib.sha256(header + b"\n").hexdigest()
    facts = json.loads(header)
    assert (facts["graph_sha256"], facts["tokens"]) == ("a" * 64, [3, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(np.frombuffer(numbers, "<f4")[:36], formula(row(3, 1)[None]).kernel.ravel())


def sealed(body: bytes) -> bytes:
    return hashlib.sha256(body).digest() + body


def not_a_number(content: bytes) -> bytes:
    return sealed(content[32:-4] + np.float32(np.nan).tobytes())


def of_other_facts(content: bytes) -> bytes:
    return sealed(content[32:].replace(b"a" * 64, b"c" * 64))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "changed number": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "changed checksum": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "changed fact": lambda content: content.replace(b"fp32", b"fp16"),
    "truncated": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "not finite": not_a_number,
    "of another bundle": of_other_facts,
    "of another shape": lambda content: sealed(content[32:-40]),
    "float64": lambda content: sealed(content[32:] + content[-4 * 46 :]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_rebuilt(folder: KernelFolder, damage: str) -> None:
    PromptCache(folder).kernels([row(3), row(4)], formula)
    path = folder.path(row(3))
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[damage](whole))
    again = PromptCache(folder)
    assert_equal(again.kernels([row(3), row(4)], formula), formula(np.stack([row(3), row(4)])))
    assert again.counts == CacheCounts(disk_hits=1, rebuilt=1)
    assert path.read_bytes() == whole


def test_every_changed_bit_of_a_file_is_detected(folder: KernelFolder) -> None:
    PromptCache(folder).kernels([row(3)], formula)
    path = folder.path(row(3))
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        cache = PromptCache(folder)
        cache.kernels([row(3)], formula)
        assert cache.counts == CacheCounts(rebuilt=1), place


def test_a_pipe_or_dangling_link_in_a_files_place_does_not_hang(folder: KernelFolder) -> None:
    os.mkfifo(folder.path(row(3)))
    folder.path(row(4)).symlink_to("nowhere")
    cache = PromptCache(folder)
    assert_equal(cache.kernels([row(3), row(4)], formula), formula(np.stack([row(3), row(4)])))
    assert cache.counts == CacheCounts(misses=1, rebuilt=1)
    assert folder.path(row(3)).is_file()


@pytest.mark.parametrize(
    "change",
    [{"graph_sha256": "c" * 64}, {"precision": "fp16"}, {"tokenizer_sha256": "c" * 64}, {"prompt_length": 7},
     {"channels": 5}],
    ids=str,
)  # fmt: skip
def test_kernels_of_another_origin_are_not_found(folder: KernelFolder, change: dict[str, object]) -> None:
    PromptCache(folder).kernels([row(3)], formula)
    other = KernelFolder(folder.folder, replace(ORIGIN, **change))
    assert other.read(row(3)) is None
    assert other.path(row(3)) != folder.path(row(3))


def test_values_that_are_not_finite_are_not_cached(folder: KernelFolder) -> None:
    def broken(tokens: np.ndarray) -> PromptKernels:
        good = formula(tokens)
        return PromptKernels(good.kernel, good.tap_bias, np.full_like(good.bias, np.inf))

    cache = PromptCache(folder)
    with pytest.raises(ParityError, match="not finite"):
        cache.kernels([row(3)], broken)
    assert (len(cache), list(folder.folder.iterdir())) == (0, [])


def test_memory_holds_the_last_used_kernels_up_to_its_capacity() -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def tracked(tokens: np.ndarray) -> PromptKernels:
        computed = formula(tokens)
        alive.append(weakref.ref(computed.kernel))
        return computed

    cache = PromptCache(capacity=3)
    for first in range(1, 6):
        cache.kernels([row(first), row(1)], tracked)
    assert len(cache) == 3
    assert all(chunk() is None for chunk in alive)  # a kept slice would keep its chunk
    before = cache.counts
    cache.kernels([row(1), row(5), row(4)], never)
    assert cache.counts.since(before) == CacheCounts(memory_hits=3)
    cache.kernels([row(3)], formula)
    assert cache.counts.since(before) == CacheCounts(memory_hits=3, misses=1)
    with pytest.raises(UsageError, match="must be 1 or more"):
        PromptCache(capacity=0)


WRITER = """
import sys
from pathlib import Path
import numpy as np
from tests.inference.test_prompt_cache import ORIGIN, KernelFolder, PromptCache, assert_equal, formula, row
folder = KernelFolder(Path(sys.argv[1]), ORIGIN)
for round in range(60):
    rows = [row(1 + (round + n) % 9) for n in range(3)]
    assert_equal(PromptCache(folder).kernels(rows, formula), formula(np.stack(rows)))
    folder.write(rows[0], formula(rows[0][None]))
    cache = PromptCache(folder)
    cache.kernels(rows, formula)
    assert cache.counts.rebuilt == 0, cache.counts
"""


def test_processes_that_write_at_once_never_see_half_a_file(folder: KernelFolder) -> None:
    command = [sys.executable, "-c", WRITER, str(folder.folder)]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    running = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=root, env=environment) for _ in range(3)
    ]
    for process in running:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
    assert len(list(folder.folder.iterdir())) == 9
    for first in range(1, 10):
        found = folder.read(row(first))
        assert found is not None
        assert_equal(found, formula(row(first)[None]))


def test_an_unusable_folder_raises_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file; the prompt cache needs a folder"):
        KernelFolder(tmp_path / "file", ORIGIN)
    for place in (tmp_path / "file" / "deeper", Path("/proc/cclip-cache"), Path("/proc")):
        with pytest.raises(EnvironmentIssue, match=r"prompt cache cannot be used.*could not be written") as caught:
            KernelFolder(place, ORIGIN)
        assert caught.value.exit_code == 3


@pytest.mark.parametrize("moment", ["opening", "keeping"])
def test_a_full_disk_is_an_error_and_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = KernelFolder(tmp_path, ORIGIN)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(EnvironmentIssue, match=r"disk is full.*Or leave out --prompt-cache"):
        KernelFolder(tmp_path, ORIGIN) if moment == "opening" else PromptCache(folder).kernels([row(3)], formula)
    assert list(tmp_path.iterdir()) == []
