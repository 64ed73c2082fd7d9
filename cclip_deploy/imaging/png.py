"""Fast PNG encoder: uses one filter for all rows, where Pillow tries five for each row."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.errors import UsageError
from cclip_deploy.imaging.raster_pixels import row_strips

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _COLOUR = 0, 2
_FILTER_UP = 2
_ZLIB_LEVEL = 1


def encode_png(pixels: NDArray[Any], text: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """Encode gray (H, W) uint8 or uint16, or RGB (H, W, 3) uint8, as a PNG file (ISO/IEC 15948).

    Rows use the "up" filter and zlib's fastest level: for masks and radiographs, files are about as large as Pillow's
    default, in less than half the time. `text` maps keywords of up to 79 letters to Latin-1 text.

    Raises:
        UsageError: another shape or type.
    """
    gray, color = pixels.ndim == 2, pixels.shape[2:] == (3,) and pixels.dtype == np.uint8
    if not pixels.size or not (color or (gray and pixels.dtype in (np.uint8, np.uint16))):
        raise UsageError(
            f"Cannot encode {pixels.dtype} of shape {pixels.shape} as PNG; expected uint8 or uint16 gray, or uint8 RGB."
        )
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, _GREY if gray else _COLOUR, 0, 0, 0)
    body = zlib.compressobj(_ZLIB_LEVEL)
    parts = [body.compress(_filter_rows(pixels, rows).data) for rows in row_strips(pixels.shape)]
    content = b"".join([*parts, body.flush()])
    texts = b"".join(_chunk(b"tEXt", f"{key}\0{value}".encode("latin-1")) for key, value in text.items())
    return _SIGNATURE + _chunk(b"IHDR", header) + texts + _chunk(b"IDAT", content) + _chunk(b"IEND", b"")


def _filter_rows(pixels: NDArray[Any], strip: slice) -> NDArray[np.uint8]:
    """Rows of a strip as differences from the row above, which of the first row of all is zeros."""
    above = max(0, strip.start - 1)
    big_endian = np.ascontiguousarray(pixels[above : strip.stop], dtype=pixels.dtype.newbyteorder(">"))
    rows = big_endian.reshape(len(big_endian), -1).view(np.uint8)  # (rows, bytes of a row)
    filtered = np.empty((len(rows), rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = _FILTER_UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    return filtered[strip.start - above :]


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))
