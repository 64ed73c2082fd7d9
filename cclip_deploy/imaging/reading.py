"""Pictures from files: PNG, JPEG, TIFF, BMP and DICOM as float arrays; content decides, not the suffix."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cclip_deploy.common.limits import LARGEST_PICTURE_FILE, MAX_PIXELS, MAX_SIDE, MAX_VALUES
from cclip_deploy.common.paths import BoundedFile, check_regular_file
from cclip_deploy.errors import CclipError, ImageError, UsageError
from cclip_deploy.imaging.raster_pixels import UPRIGHT, orientation_of, read_pixels

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm", ".dicom"})

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_KINDS = {"PNG": "png", "JPEG": "jpeg", "MPO": "jpeg", "TIFF": "tiff", "BMP": "bmp"}
_TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 322, 323
_GREY_MODES = frozenset({"1", "L", "I", "F"})
_TELLING_CHUNKS, _MOST_CHUNKS = frozenset({b"eXIf", b"tEXt", b"zTXt", b"iTXt"}), 100_000
_ON_ITS_SIDE = frozenset({5, 6, 7, 8})
_DECODING = threading.Lock()


@dataclass(frozen=True)
class Picture:
    """One decoded picture.

    `pixels` is (H, W) or (H, W, 3) float32 in [0, 1], 0 is black, right side up. `bits` is the depth that `pixels`
    carries for each channel. `sha256` is of the file's bytes, in hex; empty where it was not computed.
    """

    path: Path
    pixels: NDArray[np.float32]
    kind: str
    bits: int
    sha256: str = ""


def read_picture(path: Path) -> Picture:
    """Read a PNG, JPEG, TIFF, BMP or single-frame DICOM file.

    Gray keeps its depth: 1, 8, 12 and 16 bits are divided by their largest value (whole-number TIFFs of 32 bits are
    read as 16-bit values, float TIFFs must be in [0, 1] already). Pillow reduces color and gray-with-alpha of 16 bits
    to 8. Transparent pixels are laid on black, the color of air on a film. EXIF orientation is applied.

    Raises:
        ImageError: not a file, empty, truncated, of another type, with several pages, of more than MAX_PIXELS pixels
            or MAX_VALUES pixels times channels, or with a side above MAX_SIDE.
        EnvironmentIssue: DICOM without pydicom, or compressed with a method that has no decoder here.
    """
    _check_file(path)
    if has_dicom_mark(path):
        from cclip_deploy.imaging.dicom import read_dicom

        return read_dicom(path)
    with opened_raster(path) as image:
        return _decode(path, image)


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, right side up, as the header of a PNG, JPEG, TIFF, BMP or DICOM file says them.

    Raises:
        ImageError: not a file, empty, or of another type.
        EnvironmentIssue: DICOM without pydicom.
    """
    _check_file(path)
    if has_dicom_mark(path):
        from cclip_deploy.imaging.dicom import dicom_size

        return dicom_size(path)
    with opened_raster(path) as image:
        return image.size[::-1] if _orientation(path, image) in _ON_ITS_SIDE else image.size


def picture_orientation(path: Path) -> int:
    """EXIF orientation of a PNG, JPEG, TIFF or BMP file, 1 to 8; 1, right side up, where it says none, or is DICOM."""
    if has_dicom_mark(path):
        return UPRIGHT
    with opened_raster(path) as image:
        return _orientation(path, image)


@contextmanager
def opened_raster(path: Path) -> Iterator[Image.Image]:
    """Open a PNG, JPEG, TIFF or BMP file in Pillow, and no other format: some of them start programs.

    Raises:
        ImageError: the file is no regular one, of another type or too large, or what the block does with it fails.
    """
    _check_file(path)
    # Opened here, because Pillow maps a named file into memory and then misreads TIFFs of orientation 5 to 8.
    with decoding(path), BoundedFile(path) as file, _open(path, file) as image:
        check_picture_size(path, *image.size, _channels(image))
        tags = getattr(image, "tag_v2", {})
        tile = (tags.get(_TIFF_TILE_WIDTH, 1), tags.get(_TIFF_TILE_LENGTH, 1))
        check_picture_size(path, *tile, _channels(image))
        yield image


def failure_of(path: Path, error: Exception) -> str:
    """Why a picture cannot be used, in a sentence, whatever its decoder raised."""
    if isinstance(error, CclipError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"{path} takes more memory than there is. Reduce the picture first."
    return f"{path} cannot be used: {type(error).__name__}: {error}. Copy or export it again."


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """List the pictures that files and folders name, in the order given, each once.

    A file is taken whatever its suffix. A folder is searched to the bottom, in sorted order, for picture suffixes and
    for DICOM files of any name (not DICOMDIR); hidden files and folders are passed over.

    Raises:
        UsageError: no path was given.
        ImageError: a file does not exist, or a folder has no picture.
    """
    if not paths:
        raise UsageError("No picture was given. Name at least one file or folder.")
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            _check_file(path)
        for picture in _pictures_in(path) if path.is_dir() else [path]:
            found.setdefault(picture.resolve(), picture)
    return list(found.values())


def is_picture_name(path: Path) -> bool:
    """Whether a file is a picture by its suffix, or DICOM of any name; not DICOMDIR, and no hidden file (`._a.png`)."""
    if path.name.startswith(".") or path.name == "DICOMDIR" or not path.is_file():
        return False
    try:
        return path.suffix.lower() in PICTURE_SUFFIXES or has_dicom_mark(path)
    except ImageError:
        return True  # it cannot be read, which is said when its turn comes


def picture_stem(name: str) -> str:
    """A file's name without a picture's suffix; what else stands behind a dot, as in a DICOM UID, belongs to it."""
    return Path(name).stem if Path(name).suffix.lower() in PICTURE_SUFFIXES else name


def has_dicom_mark(path: Path) -> bool:
    """Whether the file has `DICM` after a preamble of 128 bytes (DICOM PS3.10, 7.1)."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error


def check_picture_size(path: Path, width: int, height: int, channels: int = 1) -> None:
    """Raise ImageError where a picture has no pixels, or so many that decoding it could fill the memory."""
    few = width * height <= MAX_PIXELS and width * height * channels <= MAX_VALUES
    if not (few and min(width, height) > 0 and max(width, height) <= MAX_SIDE):
        raise ImageError(
            f"{path} says that it is {width}x{height} pixels of {channels} channels; sides of 1 to {MAX_SIDE:,} are "
            f"read, up to {MAX_PIXELS:,} pixels, and up to {MAX_VALUES:,} times channels. Reduce or crop the picture "
            "first."
        )


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Keep decoders' warnings inside, and make an ImageError of whatever they raise on damaged bytes.

    One decoder runs at a time, because the filters of `warnings` belong to the process, not to a thread.
    """
    try:
        with _DECODING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CclipError:
        raise
    except MemoryError as error:
        raise ImageError(f"{path} takes more memory to decode than there is. Reduce the picture first.") from error
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ImageError(
            f"{path} cannot be decoded: {reason}. It may be truncated or damaged; copy or export it again."
        ) from error


def _check_file(path: Path) -> None:
    check_regular_file(path, "picture", ImageError, LARGEST_PICTURE_FILE)


def _pictures_in(folder: Path) -> list[Path]:
    pictures = [path for path in sorted(folder.rglob("*")) if _is_shown(path, folder)]
    if not pictures:
        suffixes = " ".join(sorted(PICTURE_SUFFIXES))
        raise ImageError(f"Folder {folder} has no picture ({suffixes}, or DICOM of any name). Name another folder.")
    return pictures


def _is_shown(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and is_picture_name(path)


def _decode(path: Path, image: Image.Image) -> Picture:
    kind = _KINDS[str(image.format)]
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ImageError(f"{path} has several pages or frames. Save the one you want to a file of its own.")
    pixels, bits = read_pixels(path, image)
    return Picture(path=path, pixels=pixels, kind=kind, bits=bits)


def _channels(image: Image.Image) -> int:
    """Channels of the pixels that `_decode` makes of an image, transparency counted."""
    if image.mode in _GREY_MODES or image.mode.startswith("I;"):
        return 1
    return 2 if image.mode in {"LA", "La"} else 3 + image.has_transparency_data


def _orientation(path: Path, image: Image.Image) -> int:
    # Pillow decodes a whole PNG file for this, as what says it may stand behind the pixels.
    decode = image.format != "PNG" or _says_more_behind_pixels(path)
    exif = image.getexif() if decode else Image.Image.getexif(image)
    return orientation_of(exif)


def _says_more_behind_pixels(path: Path) -> bool:
    """Whether a PNG file has EXIF or a text behind its pixels, or so many chunks that looking on would take long."""
    pixels = False
    with path.open("rb") as file:
        file.seek(8)
        for _ in range(_MOST_CHUNKS):
            head = file.read(8)
            if len(head) < 8 or head[4:] == b"IEND":
                return False
            pixels = pixels or head[4:] == b"IDAT"
            if pixels and head[4:] in _TELLING_CHUNKS:
                return True
            file.seek(int.from_bytes(head[:4]) + 4, os.SEEK_CUR)
    return True


def _open(path: Path, file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{path} says that it is far larger than the {MAX_PIXELS:,} pixels that are read: {error} "
            "Reduce or crop the picture first."
        ) from error
    except UnidentifiedImageError as error:
        file.seek(0)
        raise ImageError(
            f"{path} is not a complete PNG, JPEG, TIFF, BMP or DICOM file (it starts with bytes "
            f"{file.read(8).hex(' ')}). Export the picture to one of these; DICOM needs its 128-byte preamble."
        ) from error
