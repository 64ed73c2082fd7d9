"""Read npz files safely: number and size of the arrays are checked before they are loaded; pickles are rejected."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

Array = NDArray[np.generic]

MOST_ARRAYS = 4096
_DIRECTORY_ENTRY = b"PK\x01\x02"


def read_arrays(content: bytes, most_bytes: int, cost: Callable[[str], int] = lambda _: 1) -> dict[str, Array]:
    """Return the arrays of an npz file by name.

    Args:
        content: the file's bytes.
        most_bytes: limit for all arrays together.
        cost: factor by which the bytes of an array count, from its name.

    Raises:
        ValueError: there are too many arrays or bytes, two arrays of one name, or a header contradicts the content.
        Exception: what `zipfile`, `zlib` and numpy raise for damaged files.
    """
    if content.count(_DIRECTORY_ENTRY) > MOST_ARRAYS:
        raise ValueError(f"more than {MOST_ARRAYS} arrays")
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = {member.filename.removesuffix(".npy"): member for member in file.infolist()}
        if len(members) < len(file.infolist()):
            raise ValueError("two arrays with the same name")
        total = sum(member.file_size * cost(name) for name, member in members.items())
        if total > most_bytes:
            raise ValueError(f"arrays of {total:,} bytes; the limit is {most_bytes:,}")
        for name, member in members.items():
            with file.open(member) as stream:
                if _size_from_header(stream) != member.file_size:
                    raise ValueError(f"array {name!r} does not match its header")
        return {name: _read(file, member) for name, member in members.items()}


def _size_from_header(stream: IO[bytes]) -> int:
    """Return the size in bytes of an npy file according to its header."""
    version = npy.read_magic(stream)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"npy format {version}")
    shape, _, dtype = readers[version](stream)
    if dtype.hasobject:
        raise ValueError("an array of Python objects")
    elements = 1
    for side in shape:
        elements *= side
    return int(stream.tell() + elements * dtype.itemsize)


def _read(file: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    with file.open(member) as stream:
        array: Array = npy.read_array(stream, allow_pickle=False)
        return array
