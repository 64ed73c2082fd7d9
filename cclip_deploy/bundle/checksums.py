"""Read and check SHA256SUMS and the files of a bundle; a file is checked on the same bytes that are used."""

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
"""Size limit of a file in bytes. Engines are the largest files, about as large as the network's weights."""
_LINE = re.compile(r"([0-9a-f]{64})  (.{1,1024})")


def parse_sums(content: bytes, path: Path) -> dict[str, str]:
    """Return the SHA-256 of each file, from lines as `sha256sum` writes them.

    Raises:
        BundleError: a line is not a checksum, or two lines name the same file. Names that differ only in case or in
            Unicode normalization are the same file on some file systems.
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
                raise ValueError(f"line {number} is not a SHA-256, two spaces and a file name: {line[:80]!r}")
            name = inside(match[2])
            other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
            if name in sums or other != name:
                raise ValueError(f"line {number} names {name!r}, an earlier line {other!r}: that is the same file")
            sums[name] = match[1]
    except ValueError as error:
        raise BundleError(f"{path} is damaged: {error}. Export or copy the bundle again.") from error
    return sums


def format_sums(sums: Mapping[str, str]) -> str:
    """Return the text of SHA256SUMS, which `parse_sums` and `sha256sum --check` read."""
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())


def read_file(path: Path, most_bytes: int = FILE_BYTES) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        BundleError: the file is missing, not a regular file, unreadable, or has more than `most_bytes` bytes.
    """
    with _open(path) as (file, size):
        if size > most_bytes:
            raise BundleError(
                f"{path} has {size:,} bytes; the limit is {most_bytes:,}. Export or copy the bundle again."
            )
        return file.read(size)


def hash_file(path: Path) -> tuple[str, int]:
    """Return the hex SHA-256 and size in bytes of a regular file of any size; raise like `read_file`."""
    with _open(path) as (file, size):
        return hashlib.file_digest(file, "sha256").hexdigest(), size


def require_listed(folder: Path, name: str, sums: Mapping[str, str]) -> None:
    """Raise BundleError if a file has no checksum."""
    if name not in sums:
        raise BundleError(f"{name} has no checksum in {folder / SUMS}, so it is not loaded. Export the bundle again.")


def require_equal(path: Path, found: str, listed: str) -> None:
    """Raise BundleError if the SHA-256 of a file is not the listed one."""
    if found != listed:
        raise BundleError(
            f"{path} was altered: its SHA-256 starts with {found[:12]}, {SUMS} lists {listed[:12]}. "
            "Copy or export the bundle again; nothing was loaded."
        )


def hash_bytes(content: bytes | memoryview) -> str:
    """Return the hex SHA-256."""
    return hashlib.sha256(content).hexdigest()


@contextmanager
def _open(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """Yield an open regular file and its size; pipes and devices are rejected."""
    try:
        with open(path, "rb", opener=_nonblocking) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FileNotFoundError
            yield file, status.st_size
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise BundleError(f"{path} is missing from the bundle. Copy or export the bundle again.") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}). Check its permissions and the disk.") from error


def _nonblocking(path: str, flags: int) -> int:
    """Open a file without blocking, in case it is a pipe without a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
