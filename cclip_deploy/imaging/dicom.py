"""Read DICOM images with modality LUT, VOI LUT or window, and polarity applied (PS3.3 C.11)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from cclip_deploy.common.paths import BoundedFile
from cclip_deploy.errors import EnvironmentIssue, ImageError
from cclip_deploy.imaging.dicom_frames import check_frame
from cclip_deploy.imaging.dicom_values import color_pixels, gray_pixels
from cclip_deploy.imaging.image import Picture, check_image_size, decoding

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from pydicom.uid import UID

_PREAMBLE_BYTES = 132
_GREY = frozenset({"MONOCHROME1", "MONOCHROME2"})
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_NEEDED = ("Rows", "Columns", "BitsStored", "PhotometricInterpretation")


def read_dicom(path: Path, file: BinaryIO | None = None) -> Picture:
    """Read a single-frame gray, RGB, YBR or palette DICOM PS3.10 file; segmented palettes are not supported.

    Gray values pass through the modality LUT (or rescale) and then the first VOI LUT, else the first window, else a
    stretch from minimum to maximum. MONOCHROME1 is inverted, so 0 is always black. Pixels in the range of
    PixelPaddingValue are excluded from the stretch and become 0.

    Args:
        path: the file, or a name for messages.
        file: what is read instead of the file at `path`.

    Raises:
        ImageError: damaged, several frames, no image inside, or values that the standard does not allow.
        EnvironmentIssue: pydicom, or a decoder for the file's compression, is not installed.
    """
    pydicom = _import_pydicom()
    with decoding(path), file or BoundedFile(path) as opened:
        _check_decoder(path, _transfer_syntax(path, opened))
        header = pydicom.dcmread(opened, stop_before_pixels=True)
        _check_header(path, header)
        if header.file_meta.TransferSyntaxUID.is_encapsulated:
            check_frame(path, _pixel_data(opened), header)
        return _decoded(path, opened, header)


def read_dicom_dataset(dataset: Dataset) -> Picture:
    """Convert a `pydicom.Dataset` with its pixel data; raises like `read_dicom`, and applies the same tables."""
    _import_pydicom()
    path = Path(str(getattr(dataset, "filename", None) or "The DICOM dataset"))
    with decoding(path):
        syntax = (getattr(dataset, "file_meta", None) or {}).get("TransferSyntaxUID")
        if syntax is None:
            raise ImageError(
                f"{path} has no transfer syntax (0002,0010). Set dataset.file_meta.TransferSyntaxUID, or read a DICOM "
                "file with pydicom.dcmread."
            )
        _check_decoder(path, syntax)
        _check_header(path, dataset)
        if not any(name in dataset for name in _PIXELS):
            raise ImageError(f"{path} has no pixel data. Read it without stop_before_pixels.")
        if syntax.is_encapsulated:
            check_frame(path, dataset.PixelData, dataset)
        return _decoded(path, dataset, dataset)


def dicom_size(path: Path) -> tuple[int, int]:
    """Return width and height in pixels from the header; raises like `read_dicom` but needs no decoder."""
    pydicom = _import_pydicom()
    with decoding(path), BoundedFile(path) as file:
        _transfer_syntax(path, file)
        header = pydicom.dcmread(file, stop_before_pixels=True)
        _check_header(path, header)
        return int(header.Columns), int(header.Rows)


def _import_pydicom() -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise EnvironmentIssue(
            f"Reading DICOM needs pydicom ({error}). Install it: pip install 'cclip-deploy[medical]'"
        ) from error
    return pydicom


def _pixel_data(file: BinaryIO) -> bytes:
    from pydicom import dcmread

    file.seek(0)
    content: bytes = dcmread(file, specific_tags=["PixelData"]).PixelData
    file.seek(0)
    return content


def _decoded(path: Path, source: BinaryIO | Dataset, header: Dataset) -> Picture:
    from pydicom.pixels import pixel_array

    show = gray_pixels if header.PhotometricInterpretation in _GREY else color_pixels
    pixels, bits = show(path, pixel_array(source), header)
    if not np.isfinite(pixels).all():
        raise ImageError(f"{path} has a rescale that overflows. Correct RescaleSlope and RescaleIntercept.")
    return Picture(path=path, pixels=pixels, kind="dicom", bits=bits, spacing_mm=_pixel_spacing(header))


def _pixel_spacing(header: Dataset) -> tuple[float, float] | None:
    """Return PixelSpacing, in mm between rows and between columns; None if it is missing or not two positive numbers.

    ImagerPixelSpacing is not used: it is measured at the detector, where a body is magnified.
    """
    try:
        down, across = (float(number) for number in header.PixelSpacing)
    except (AttributeError, TypeError, ValueError):
        return None
    return (down, across) if 0 < down < math.inf and 0 < across < math.inf else None


def _transfer_syntax(path: Path, file: BinaryIO) -> UID:
    """Return the transfer syntax; refuse a deflated one, whose header alone could exhaust memory."""
    from pydicom.filereader import read_dataset

    file.seek(_PREAMBLE_BYTES)
    meta = read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, *_: tag.group != 2)
    file.seek(0)

    syntax: UID | None = meta.get("TransferSyntaxUID")
    if syntax is None:
        raise ImageError(f"{path} has no transfer syntax (0002,0010). Export it again as a DICOM file.")
    if syntax.is_transfer_syntax and syntax.is_deflated:
        raise ImageError(
            f"{path} uses {syntax.name}, which is not supported. Convert it, for example with DCMTK: dcmconv +te"
        )
    return syntax


def _check_decoder(path: Path, syntax: UID) -> None:
    """Raise an error before the pixels are read if no decoder for the transfer syntax is available."""
    from pydicom.pixels import get_decoder

    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise ImageError(
            f"{path} uses transfer syntax {syntax.name}, which is not supported. "
            "Convert it to Explicit VR Little Endian, for example with DCMTK or GDCM."
        ) from None
    if not decoder.is_available:
        raise EnvironmentIssue(_describe_missing_decoder(path, syntax.name, decoder.missing_dependencies))


def _describe_missing_decoder(path: Path, syntax_name: str, missing: list[str]) -> str:
    """`missing` has pydicom's lines, such as 'pylibjpeg - requires pylibjpeg>=2.0 and pylibjpeg-libjpeg>=2.1'."""
    plugins = dict(line.split(" - requires ", 1) for line in missing if " - requires " in line)
    packages = [name.strip() for name in plugins.get("pylibjpeg", "").split(" and ") if name.strip()]
    remedy = f"Install one: pip install {' '.join(map(repr, packages))}" if packages else f"Install: {missing}"
    return f"{path} is compressed with {syntax_name}, but no decoder for it is installed. {remedy}"


def _check_header(path: Path, header: Dataset) -> None:
    missing = [name for name in _NEEDED if header.get(name) is None]
    if missing:
        kind = getattr(header.get("SOPClassUID"), "name", "of an unknown class")
        raise ImageError(f"{path} ({kind}) has no image: it lacks {', '.join(missing)}. Name an image file.")
    frames = int(header.get("NumberOfFrames") or 1)
    if frames > 1:
        raise ImageError(
            f"{path} has {frames} frames; only single-frame files are supported. Save the frame as a separate file."
        )
    bits = int(header.get("BitsAllocated") or header.BitsStored)
    samples = int(header.get("SamplesPerPixel") or 1) * max(1, -(-bits // 32))
    check_image_size(path, int(header.Columns), int(header.Rows), samples)
