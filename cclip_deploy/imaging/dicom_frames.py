"""Check compressed DICOM frames before decoding: image size in the stream, and unpacked size of RLE segments."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cclip_deploy.errors import ImageError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_RLE_HEADER, _MOST_SEGMENTS = 64, 15
_RUN_GAIN = 64
"""Largest expansion of a PackBits run: two bytes become up to 128."""
_FREE_BYTES = 2**26
"""Segments that cannot unpack to more bytes than this are not measured."""
_JPEG_START, _JPEG_FRAMES = b"\xff\xd8", frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}
_JPEG_STANDALONE = frozenset({0x01, *range(0xD0, 0xD8)})
_JPEG_2000_SIZE = b"\xff\x4f\xff\x51"


def check_frame(path: Path, pixel_data: bytes, header: Dataset) -> None:
    """Raise ImageError if the frame in compressed pixel data differs in size from Rows and Columns."""
    from pydicom.encaps import get_frame
    from pydicom.uid import RLELossless

    frame = bytes(get_frame(pixel_data, 0, number_of_frames=1))
    declared = (int(header.Columns), int(header.Rows))
    if header.file_meta.TransferSyntaxUID == RLELossless:
        for segment in _segments(frame):
            if _RUN_GAIN * len(segment) > _FREE_BYTES and unpacked_bytes(segment) > 2 * declared[0] * declared[1]:
                raise ImageError(
                    f"{path} has runs that unpack to far more than its {declared[0]}x{declared[1]} pixels. "
                    "Export it again."
                )
        return
    found = coded_size(frame)
    if found != declared:
        shown = "has no size" if found is None else f"is {found[0]}x{found[1]}"
        raise ImageError(
            f"{path} is declared as {declared[0]}x{declared[1]} pixels, but the compressed image inside {shown}. "
            "Export it again."
        )


def unpacked_bytes(segment: bytes) -> int:
    """Return how many bytes a PackBits segment unpacks to, without unpacking it."""
    at = total = 0
    while at < len(segment):
        control = segment[at]
        total += control + 1 if control < 128 else 257 - control if control > 128 else 0
        at += control + 2 if control < 128 else 2 if control > 128 else 1
    return total


def coded_size(frame: bytes) -> tuple[int, int] | None:
    """Return width and height from the header of a JPEG, JPEG-LS or JPEG 2000 stream, or None if it has no size."""
    if not frame.startswith(_JPEG_START):
        at = frame.find(_JPEG_2000_SIZE)
        if at < 0 or len(frame) < at + 24:
            return None
        right, bottom, left, top = struct.unpack_from(">4I", frame, at + 8)
        return right - left, bottom - top
    for marker, at in _jpeg_markers(frame):
        if marker in _JPEG_FRAMES and len(frame) >= at + 7:
            height, width = struct.unpack_from(">2H", frame, at + 3)
            return width, height
    return None


def _jpeg_markers(frame: bytes) -> Iterator[tuple[int, int]]:
    """Yield each marker before the pixels and the offset of its length field."""
    at = 2
    while at + 4 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in _JPEG_STANDALONE:
            at += 2
        else:
            yield marker, at + 2
            at += 2 + max(2, int.from_bytes(frame[at + 2 : at + 4]))


def _segments(frame: bytes) -> Iterator[bytes]:
    if len(frame) < _RLE_HEADER:
        return
    count, *offsets = struct.unpack_from("<16I", frame)
    ends = [*offsets[1:count], len(frame)]
    for start, end in zip(offsets[: min(count, _MOST_SEGMENTS)], ends, strict=False):
        yield frame[start:end]
