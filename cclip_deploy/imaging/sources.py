"""Read an image from whatever holds it: a path, encoded bytes, a binary file, an array, a Pillow image or DICOM."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cclip_deploy.common.limits import LARGEST_PICTURE_FILE
from cclip_deploy.errors import ImageError, UsageError
from cclip_deploy.imaging.dicom import read_dicom_dataset
from cclip_deploy.imaging.image import Picture, check_image_size, decoding
from cclip_deploy.imaging.raster_pixels import orientation_of, row_strips
from cclip_deploy.imaging.reading import KINDS, ON_ITS_SIDE, check_raster, decode_raster, read_bytes, read_image

_READ_BYTES = 2**20
_TWELVE_BITS = 4095
_SUPPORTED = "a path, bytes, a binary file, a NumPy array, a Pillow image, a pydicom Dataset, or a list of these"


class BinaryFile(Protocol):
    """A file object opened in binary mode."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes."""
        ...


class DicomDataset(Protocol):
    """A `pydicom.Dataset` with pixel data."""

    @property
    def pixel_array(self) -> Any: ...


ImageSource = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryFile | NDArray[Any] | Image.Image | DicomDataset
    | Picture
)  # fmt: skip


def read_source(source: ImageSource, name: str = "The image") -> Picture:
    """Return the pixels of an image, with the limits of `read_image` whatever kind of object holds it.

    Args:
        source: a path; the content of an image file as bytes, or a binary file, which is read from its position to its
            end; an array, see `read_array`; a Pillow image; a `pydicom.Dataset`; a `Picture` is returned as it is.
        name: stands for an image in memory in messages.

    Raises:
        ImageError: the image cannot be decoded or used; see `read_image`.
        UsageError: an object of another type.
        EnvironmentIssue: see `read_image`.
    """
    path = Path(name)
    if isinstance(source, Picture):
        return source
    if isinstance(source, str | os.PathLike):
        return read_image(Path(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return read_bytes(bytes(source), path)
    if isinstance(source, np.ndarray):
        return read_array(source, path)
    if isinstance(source, Image.Image):
        return _read_pillow(source, path)
    if _is_dataset(source):
        return read_dicom_dataset(source)
    if hasattr(source, "read"):
        return read_bytes(_content(source, path), path)
    raise UsageError(f"{name} is of type {type(source).__name__}. Give {_SUPPORTED}.")


def read_array(array: NDArray[Any], name: Path = Path("The image")) -> Picture:
    """Convert a gray (H, W) or RGB (H, W, 3) array, 0 is black: uint8, uint16, or floats in [0, 1].

    White is the largest value of the integer type, as in a PNG file of that depth. An array of uint16 whose values end
    at 4095 gets a warning, because 12-bit values would be almost black.

    Raises:
        ImageError: another shape (channels first, alpha, a stack of images) or type (white is not known), floats out of
            range or not finite, or more pixels than `check_image_size` allows.
    """
    _check_shape(name, array)
    check_image_size(name, array.shape[1], array.shape[0], array.shape[2] if array.ndim == 3 else 1)
    if array.dtype.kind == "f":
        _check_floats(name, array)
        return Picture(name, np.asarray(array, np.float32), "array", 32)
    if array.dtype.kind != "u" or array.itemsize > 2:
        raise ImageError(
            f"{name} is an array of {array.dtype}, for which white is not known. Convert it to uint8 or uint16, or "
            "scale it to floats from 0 (black) to 1 (white)."
        )
    white, largest = int(np.iinfo(array.dtype).max), int(array.max())
    # The same arithmetic as for files, so that an array and its PNG file give the same pixels.
    arithmetic = np.float32 if array.itemsize == 1 else np.float64
    pixels = np.empty(array.shape, np.float32)
    for rows in row_strips(array.shape):
        pixels[rows] = np.divide(array[rows], white, dtype=arithmetic)
    dark = array.itemsize == 2 and 0 < largest <= _TWELVE_BITS
    return Picture(name, pixels, "array", 8 * array.itemsize, warnings=(_dark(name, largest),) if dark else ())


def _check_shape(name: Path, array: NDArray[Any]) -> None:
    shape = array.shape
    if array.ndim == 2 or (array.ndim == 3 and shape[2] == 3):
        return
    remedy = "Give one image, gray or RGB"
    if array.ndim == 3 and shape[2] in (1, 4):
        remedy = "Use array[..., 0]" if shape[2] == 1 else "Blend the alpha channel, or use array[..., :3]"
    elif array.ndim == 3 and shape[0] in (1, 3):
        remedy = "Channels come last: np.moveaxis(array, 0, -1)" if shape[0] == 3 else "Use array[0]"
    elif array.ndim in (3, 4):
        remedy = "For a batch of images, give a list: list(array)"
    raise ImageError(f"{name} is an array of shape {shape}; expected (H, W) or (H, W, 3). {remedy}.")


def _check_floats(name: Path, array: NDArray[Any]) -> None:
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):
        raise ImageError(
            f"{name} has values from {low:g} to {high:g}; floats must be from 0 (black) to 1 (white). Scale them, for "
            "example array / 255."
        )


def _dark(name: Path, largest: int) -> str:
    return (
        f"{name} is almost black: its largest value is {largest} of 65535. If its values have 12 bits, give "
        f"array / {_TWELVE_BITS}."
    )


def _read_pillow(image: Image.Image, name: Path) -> Picture:
    path = Path(getattr(image, "filename", "") or name)
    if image.format is not None and image.format not in KINDS:
        raise ImageError(
            f"{path} is of the format {image.format}; supported are PNG, JPEG, TIFF, BMP and DICOM. If you trust it, "
            "decode it yourself: give image.copy()."
        )
    with decoding(path):
        check_raster(path, image)
        if image.format == "TIFF" and path != name and orientation_of(image.getexif()) in ON_ITS_SIDE:
            raise ImageError(
                f"{path} is rotated, and Pillow misreads such TIFF files opened by name. Give the path itself."
            )
        return decode_raster(path, image)


def _is_dataset(source: object) -> bool:
    pydicom = sys.modules.get("pydicom")  # loaded, if `source` is one of its objects
    return pydicom is not None and isinstance(source, pydicom.Dataset)


def _content(file: Any, name: Path) -> bytes:
    """Read a binary file in pieces: a reader may set aside as much memory as one call asks for."""
    content = bytearray()
    while len(content) <= LARGEST_PICTURE_FILE:
        piece = file.read(_READ_BYTES)
        if not isinstance(piece, bytes | bytearray | memoryview):
            getattr(piece, "close", lambda: None)()  # a coroutine that nobody awaits would warn
            raise UsageError(
                f"{name}: read() of {type(file).__name__} gave {type(piece).__name__}, not bytes. Open the file in "
                "binary mode; of an asynchronous upload, give its file, such as upload.file."
            )
        if not piece:
            break
        content += piece
    return bytes(content)
