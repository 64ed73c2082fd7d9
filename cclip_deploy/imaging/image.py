"""Decoded images: their type, size limits, and errors raised while decoding."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.common.limits import MAX_PIXELS, MAX_SIDE, MAX_VALUES
from cclip_deploy.errors import CclipError, ImageError

_DECODING = threading.Lock()


@dataclass(frozen=True)
class Picture:
    """Decoded image; not named Image, which is Pillow's.

    Attributes:
        path: file it was read from; for an image in memory, a name for messages.
        pixels: (H, W) or (H, W, 3) float32 in [0, 1], 0 is black, upright.
        kind: file format, such as "png" or "dicom"; "array" or "pillow" for an image in memory without one.
        bits: bits per channel that `pixels` carries.
        sha256: hex digest of the file's bytes; empty if it was not computed.
        spacing_mm: distances in mm between the centers of rows and of columns; None if they are not known.
        warnings: sentences on what is unusual about the pixels.
    """

    path: Path
    pixels: NDArray[np.float32]
    kind: str
    bits: int
    sha256: str = ""
    spacing_mm: tuple[float, float] | None = None
    warnings: tuple[str, ...] = ()


def check_image_size(path: Path, width: int, height: int, channels: int = 1) -> None:
    """Raise ImageError for an image without pixels, or with more than MAX_PIXELS, MAX_VALUES or MAX_SIDE allow."""
    few = width * height <= MAX_PIXELS and width * height * channels <= MAX_VALUES
    if not (few and min(width, height) > 0 and max(width, height) <= MAX_SIDE):
        raise ImageError(
            f"{path} is declared as {width}x{height} pixels with {channels} channels. Supported are sides of 1 to "
            f"{MAX_SIDE:,}, up to {MAX_PIXELS:,} pixels, and up to {MAX_VALUES:,} pixels times channels. Reduce or "
            "crop the image first."
        )


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Suppress warnings of decoders and turn whatever they raise into an ImageError.

    One decoder runs at a time, because the filters of `warnings` are global to the process.
    """
    try:
        with _DECODING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CclipError:
        raise
    except MemoryError as error:
        raise ImageError(f"{path} takes more memory to decode than there is. Reduce the image first.") from error
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ImageError(
            f"{path} cannot be decoded: {reason}. It may be truncated or damaged; copy or export it again."
        ) from error
