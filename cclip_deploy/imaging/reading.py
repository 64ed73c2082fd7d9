"""Find and read image files: PNG, JPEG, TIFF, BMP and DICOM, recognized by content, as float arrays."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from cclip_deploy.common.limits import LARGEST_PICTURE_FILE, MAX_PIXELS
from cclip_deploy.common.paths import BoundedFile, check_regular_file
from cclip_deploy.errors import CclipError, ImageError, UsageError
from cclip_deploy.imaging.dicom import dicom_size, read_dicom
from cclip_deploy.imaging.image import Picture, check_image_size, decoding
from cclip_deploy.imaging.raster_pixels import UPRIGHT, orientation_of, read_pixels

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm", ".dicom"})

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
KINDS = {"PNG": "png", "JPEG": "jpeg", "MPO": "jpeg", "TIFF": "tiff", "BMP": "bmp"}
_TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 322, 323
_GREY_MODES = frozenset({"1", "L", "I", "F"})
_METADATA_CHUNKS, _MOST_CHUNKS = frozenset({b"eXIf", b"tEXt", b"zTXt", b"iTXt"}), 100_000
ON_ITS_SIDE = frozenset({5, 6, 7, 8})


def read_image(path: Path) -> Picture:
    """Read a PNG, JPEG, TIFF, BMP or single-frame DICOM file.

    Gray values of 1, 8, 12 and 16 bits are divided by the largest value of that depth. 32-bit integer TIFFs are read as
    16-bit values; float TIFFs must be in [0, 1]. Pillow reduces 16-bit color and 16-bit gray with alpha to 8 bits.
    Transparent pixels are blended with black, the color of air in a radiograph. EXIF orientation is applied.

    Raises:
        ImageError: not a file, empty, truncated, of another type, with several pages, of more than MAX_PIXELS pixels
            or MAX_VALUES pixels times channels, or with a side above MAX_SIDE.
        EnvironmentIssue: pydicom is missing for a DICOM file, or no installed decoder supports its compression.
    """
    _check_file(path)
    if is_dicom_file(path):
        return read_dicom(path)
    with open_raster(path) as image:
        return decode_raster(path, image)


def read_bytes(content: bytes, name: Path = Path("The image")) -> Picture:
    """Read the content of an image file, like `read_image`; `name` stands for the file in messages."""
    if not content:
        raise ImageError(f"{name} is empty (0 bytes). If it is an open file, go back to its start: file.seek(0).")
    if len(content) > LARGEST_PICTURE_FILE:
        raise ImageError(f"{name} has more than {LARGEST_PICTURE_FILE:,} bytes, the maximum for an image. Reduce it.")
    if content[128:132] == b"DICM":
        return read_dicom(name, io.BytesIO(content))
    with open_raster(name, io.BytesIO(content)) as image:
        return decode_raster(name, image)


def image_size(path: Path) -> tuple[int, int]:
    """Return the upright width and height in pixels from the header of a PNG, JPEG, TIFF, BMP or DICOM file.

    Raises:
        ImageError: not a file, empty, or of another type.
        EnvironmentIssue: pydicom is missing for a DICOM file.
    """
    _check_file(path)
    if is_dicom_file(path):
        return dicom_size(path)
    with open_raster(path) as image:
        return image.size[::-1] if _orientation(path, image) in ON_ITS_SIDE else image.size


def image_orientation(path: Path) -> int:
    """Return the EXIF orientation, 1 to 8, of an image file; 1 (upright) for DICOM and for files without the tag."""
    if is_dicom_file(path):
        return UPRIGHT
    with open_raster(path) as image:
        return _orientation(path, image)


@contextmanager
def open_raster(path: Path, file: BinaryIO | None = None) -> Iterator[Image.Image]:
    """Open a PNG, JPEG, TIFF or BMP file in Pillow. Other formats are refused: Pillow runs external programs for some.

    Args:
        path: the file, or a name for messages.
        file: what is read instead of the file at `path`.

    Raises:
        ImageError: the file is not a regular file, of another type or too large, or the body of the `with` fails.
    """
    if file is None:
        _check_file(path)
    # Pass a file object: Pillow memory-maps a file given by name, and then misreads TIFFs of orientation 5 to 8.
    with decoding(path), file or BoundedFile(path) as opened, _open(path, opened) as image:
        check_raster(path, image)
        yield image


def check_raster(path: Path, image: Image.Image) -> None:
    """Raise ImageError if an image that may not be decoded yet, or a tile of it, is too large."""
    check_image_size(path, *image.size, _channels(image))
    tags = getattr(image, "tag_v2", {})
    tile = (tags.get(_TIFF_TILE_WIDTH, 1), tags.get(_TIFF_TILE_LENGTH, 1))
    check_image_size(path, *tile, _channels(image))


def decode_raster(path: Path, image: Image.Image) -> Picture:
    """Convert a Pillow image; raise ImageError if it has several frames or values out of range."""
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ImageError(f"{path} has several pages or frames. Save the one you want as a separate file.")
    pixels, bits = read_pixels(path, image)
    return Picture(path=path, pixels=pixels, kind=KINDS.get(str(image.format), "pillow"), bits=bits)


def failure_of(path: Path, error: Exception) -> str:
    """Return the reason, for a message, why an image cannot be used."""
    if isinstance(error, CclipError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"{path} takes more memory than there is. Reduce the image first."
    return f"{path} cannot be used: {type(error).__name__}: {error}. Copy or export it again."


def find_images(paths: Sequence[Path]) -> list[Path]:
    """List the image files among `paths`, in the given order, without duplicates.

    Files are taken whatever their suffix. Folders are searched recursively, in sorted order, for image suffixes and
    for DICOM files of any name (except DICOMDIR); hidden files and folders are skipped.

    Raises:
        UsageError: no path was given.
        ImageError: a file does not exist, or a folder has no image.
    """
    if not paths:
        raise UsageError("No image was given. Name at least one file or folder.")
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            _check_file(path)
        for image in _images_in(path) if path.is_dir() else [path]:
            found.setdefault(image.resolve(), image)
    return list(found.values())


def is_image_file(path: Path) -> bool:
    """Return whether a file has an image suffix or is DICOM; False for DICOMDIR and hidden files (`._a.png`)."""
    if path.name.startswith(".") or path.name == "DICOMDIR" or not path.is_file():
        return False
    try:
        return path.suffix.lower() in IMAGE_SUFFIXES or is_dicom_file(path)
    except ImageError:
        return True  # unreadable: the error is raised when the file is read


def image_stem(name: str) -> str:
    """Return a file name without its image suffix; other text after a dot, as in a DICOM UID, stays."""
    return Path(name).stem if Path(name).suffix.lower() in IMAGE_SUFFIXES else name


def is_dicom_file(path: Path) -> bool:
    """Return whether a file has `DICM` after a preamble of 128 bytes (DICOM PS3.10, 7.1)."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error


def _check_file(path: Path) -> None:
    check_regular_file(path, "image", ImageError, LARGEST_PICTURE_FILE)


def _images_in(folder: Path) -> list[Path]:
    images = [path for path in sorted(folder.rglob("*")) if _is_visible_image(path, folder)]
    if not images:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise ImageError(f"Folder {folder} has no image ({suffixes}, or DICOM of any name). Name another folder.")
    return images


def _is_visible_image(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and is_image_file(path)


def _channels(image: Image.Image) -> int:
    """Number of channels that `decode_raster` allocates for an image, including alpha."""
    if image.mode in _GREY_MODES or image.mode.startswith("I;"):
        return 1
    return 2 if image.mode in {"LA", "La"} else 3 + image.has_transparency_data


def _orientation(path: Path, image: Image.Image) -> int:
    # For PNG, Pillow's getexif decodes the whole file, because metadata may follow the pixels.
    decode = image.format != "PNG" or _has_metadata_after_pixels(path)
    exif = image.getexif() if decode else Image.Image.getexif(image)
    return orientation_of(exif)


def _has_metadata_after_pixels(path: Path) -> bool:
    """Whether a PNG file has EXIF or text chunks after its pixels, or too many chunks to search."""
    pixels = False
    with path.open("rb") as file:
        file.seek(8)
        for _ in range(_MOST_CHUNKS):
            head = file.read(8)
            if len(head) < 8 or head[4:] == b"IEND":
                return False
            pixels = pixels or head[4:] == b"IDAT"
            if pixels and head[4:] in _METADATA_CHUNKS:
                return True
            file.seek(int.from_bytes(head[:4]) + 4, os.SEEK_CUR)
    return True


def _open(path: Path, file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{path} is declared to be far larger than the supported {MAX_PIXELS:,} pixels: {error} "
            "Reduce or crop the image first."
        ) from error
    except UnidentifiedImageError as error:
        file.seek(0)
        raise ImageError(
            f"{path} is not a complete PNG, JPEG, TIFF, BMP or DICOM file (it starts with bytes "
            f"{file.read(8).hex(' ')}). Export the image to one of these; DICOM needs its 128-byte preamble."
        ) from error
