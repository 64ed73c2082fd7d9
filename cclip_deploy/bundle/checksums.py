"""SHA256SUMS of a bundle, and files read once: the bytes that are checked are the bytes that are used."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from cclip_deploy.bundle.manifest import inside
from cclip_deploy.errors import BundleError

SUMS = "SHA256SUMS"
SUMS_BYTES = 4 * 2**20
FILE_BYTES = 8 * 2**30
"""The largest file of a bundle that is read; engines are the largest, about as large as the network's weights."""
_LINE = re.compile(r"([0-9a-f]{64})  (.{1,1024})")


def parse_sums(content: bytes, path: Path) -> dict[str, str]:
    """SHA-256 by file name, of lines as `sha256sum` writes them.

    Raises:
        BundleError: a line is no checksum, or two lines name one file. Names that differ only in case or in Unicode
            normalization are one file on some file systems.
    """
    sums: dict[str, str] = {}
    seen: dict[str, str] = {}
    try:
        *lines, rest = content.decode("utf-8").split("\n")
        if rest:
            raise ValueError(f"its last line is cut off: {rest[:80]!r}")
        for number, line in enumerate(lines, 1):
            match = _LINE.fullmatch(line)
            if match is None:
                raise ValueError(f"line {number} is no SHA-256, two blanks and a file name: {line[:80]!r}")
            name = inside(match[2])
            other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
            if name in sums or other != name:
                raise ValueError(f"line {number} names {name!r}, an earlier line {other!r}: that is one file")
            sums[name] = match[1]
    except ValueError as error:
        raise BundleError(f"{path} is damaged: {error}. Export or copy the bundle again.") from error
    return sums


def format_sums(sums: Mapping[str, str]) -> str:
    """The text of SHA256SUMS; `parse_sums` reads it back, and so does `sha256sum --check`."""
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())


def read_file(path: Path, most_bytes: int = FILE_BYTES) -> bytes:
    """The bytes of a regular file of a bundle.

    Raises:
        BundleError: it is missing, is no file, cannot be read, or has more than `most_bytes` bytes.
    """
    with _open(path) as (file, size):
        if size > most_bytes:
            raise BundleError(
                f"{path} has {size:,} bytes, and at most {most_bytes:,} are read. Export or copy the bundle again."
            )
        return file.read(size)


def hash_file(path: Path) -> tuple[str, int]:
    """Hex SHA-256 and size in bytes of a regular file of a bundle, of any size; raises as `read_file` does."""
    with _open(path) as (file, size):
        return hashlib.file_digest(file, "sha256").hexdigest(), size


def require_listed(folder: Path, name: str, sums: Mapping[str, str]) -> None:
    """BundleError for a file without a checksum."""
    if name not in sums:
        raise BundleError(
            f"{name} has no checksum in {folder / SUMS}, so it will not be loaded. Export the bundle again."
        )


def require_equal(path: Path, found: str, listed: str) -> None:
    """BundleError for a file whose SHA-256 is not the one in SHA256SUMS."""
    if found != listed:
        raise BundleError(
            f"{path} was altered: its SHA-256 begins {found[:12]}, {SUMS} says {listed[:12]}. "
            "Copy or export the bundle again; nothing of it was loaded."
        )


def hash_bytes(content: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(content).hexdigest()


@contextmanager
def _open(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """A regular file and its size; a pipe or a device is never read from."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FileNotFoundError
            yield file, status.st_size
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise BundleError(f"{path} is missing from the bundle. Copy or export the bundle again.") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}). Check its permissions and the disk.") from error


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe that nobody writes to would otherwise block."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
