"""DICOM pictures as a radiologist sees them: modality LUT, VOI LUT or window, and polarity applied (PS3.3 C.11)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.data.images import Picture, check_pixel_count, decoding
from cclip_deploy.errors import EnvironmentProblem, ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydicom.dataset import Dataset
    from pydicom.uid import UID

_GREY = frozenset({"MONOCHROME1", "MONOCHROME2"})
_NEEDED = ("Rows", "Columns", "BitsStored", "PhotometricInterpretation")


def read_dicom(path: Path) -> Picture:
    """Read a single-frame grey, RGB, YBR or (plain, not segmented) palette file of DICOM PS3.10.

    Grey goes through the modality LUT (or rescale), then the first VOI LUT, or else the first window, or else is
    stretched from its least to its greatest value; MONOCHROME1 is inverted, so that 0 is always black. Pixels that
    PixelPaddingValue marks are no part of the picture: they take no part in the stretch and become 0.

    Raises:
        ImageError: damaged, several frames, no picture inside, or values that the standard does not allow.
        EnvironmentProblem: pydicom, or a decoder for the file's compression, is not installed.
    """
    pydicom = _import_pydicom()
    with decoding(path):
        _check_transfer_syntax(path)
        header = pydicom.dcmread(path, stop_before_pixels=True)
        _check_header(path, header)
        stored = pydicom.pixels.pixel_array(path)
        show = _grey if header.PhotometricInterpretation in _GREY else _colour
        pixels, bits = show(path, stored, header)
        if not np.isfinite(pixels).all():
            raise ImageError(f"{path} has a rescale that overflows. Correct RescaleSlope and RescaleIntercept.")
    return Picture(path=path, pixels=np.ascontiguousarray(pixels, dtype=np.float32), kind="dicom", bits=bits)


def dicom_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels of a single-frame file, from its header; raises as `read_dicom`."""
    pydicom = _import_pydicom()
    with decoding(path):
        _check_transfer_syntax(path)
        header = pydicom.dcmread(path, stop_before_pixels=True)
        _check_header(path, header)
        return int(header.Columns), int(header.Rows)


def _import_pydicom() -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise EnvironmentProblem(
            f"Reading DICOM needs pydicom ({error}). Install it: pip install 'cclip-deploy[medical]'"
        ) from error
    return pydicom


def _check_transfer_syntax(path: Path) -> None:
    """Refuse what cannot be decoded before any of it is read; deflated files could fill the memory."""
    from pydicom.filereader import read_file_meta_info
    from pydicom.pixels import get_decoder

    syntax: UID | None = read_file_meta_info(path).get("TransferSyntaxUID")
    if syntax is None:
        raise ImageError(f"{path} names no transfer syntax (0002,0010). Export it again as a DICOM file.")
    if syntax.is_transfer_syntax and syntax.is_deflated:
        raise ImageError(f"{path} uses {syntax.name}, which is not read. Convert it, e.g. with DCMTK: dcmconv +te")
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise ImageError(
            f"{path} uses transfer syntax {syntax.name}, which is not read. "
            "Convert it to Explicit VR Little Endian, for example with DCMTK or GDCM."
        ) from None
    if not decoder.is_available:
        raise EnvironmentProblem(_describe_missing_decoder(path, syntax.name, decoder.missing_dependencies))


def _describe_missing_decoder(path: Path, syntax_name: str, missing: list[str]) -> str:
    """`missing` holds lines of pydicom such as 'pylibjpeg - requires pylibjpeg>=2.0 and pylibjpeg-libjpeg>=2.1'."""
    plugins = dict(line.split(" - requires ", 1) for line in missing if " - requires " in line)
    packages = [name.strip() for name in plugins.get("pylibjpeg", "").split(" and ") if name.strip()]
    remedy = f"Install one: pip install {' '.join(map(repr, packages))}" if packages else f"Install: {missing}"
    return f"{path} is compressed with {syntax_name}, and no decoder for that is installed. {remedy}"


def _check_header(path: Path, header: Dataset) -> None:
    missing = [name for name in _NEEDED if header.get(name) is None]
    if missing:
        kind = getattr(header.get("SOPClassUID"), "name", "of an unknown class")
        raise ImageError(f"{path} ({kind}) holds no picture: it lacks {', '.join(missing)}. Name an image file.")
    frames = int(header.get("NumberOfFrames") or 1)
    if frames > 1:
        raise ImageError(f"{path} has {frames} frames; one is read. Save the frame you want to a file of its own.")
    check_pixel_count(path, int(header.Columns), int(header.Rows))


def _colour(path: Path, stored: NDArray[Any], header: Dataset) -> tuple[NDArray[Any], int]:
    """RGB (H, W, 3) in [0, 1]; pydicom has turned YBR into RGB already."""
    if header.PhotometricInterpretation == "PALETTE COLOR":
        return _apply_palette(path, stored, header)
    bits = int(header.BitsStored)
    if stored.ndim != 3 or stored.shape[-1] != 3 or stored.dtype.kind != "u":
        raise ImageError(
            f"{path} is {header.PhotometricInterpretation} with an array of shape {stored.shape} and type "
            f"{stored.dtype}; unsigned grey, palette, RGB or YBR is read. Export it as RGB."
        )
    return np.clip(stored.astype(np.float64) / (2**bits - 1), 0, 1), bits


def _apply_palette(path: Path, stored: NDArray[Any], header: Dataset) -> tuple[NDArray[Any], int]:
    channels = []
    for colour in ("Red", "Green", "Blue"):
        name = f"{colour}PaletteColorLookupTable"
        if f"{name}Descriptor" not in header or f"{name}Data" not in header:
            raise ImageError(
                f"{path} lacks a plain {colour.lower()} palette (segmented ones are not read). Save as RGB."
            )
        channels.append(_look_up(path, stored, header[f"{name}Descriptor"].value, header[f"{name}Data"].value, header))
    return np.stack([values for values, _ in channels], axis=-1), channels[0][1]


def _grey(path: Path, stored: NDArray[Any], header: Dataset) -> tuple[NDArray[Any], int]:
    if stored.ndim != 2 or not np.isfinite(stored).all():
        raise ImageError(f"{path} is grey, but its array has shape {stored.shape} or values that are not numbers.")
    padding = _find_padding(stored, header)
    shown = _apply_voi(path, _apply_modality(path, stored, header), padding, header)  # (H, W) in [0, 1]
    if header.PhotometricInterpretation == "MONOCHROME1":
        shown = 1 - shown
    shown[padding] = 0
    return shown, int(header.BitsStored)


def _find_padding(stored: NDArray[Any], header: Dataset) -> NDArray[np.bool_]:
    value = header.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    limit = header.get("PixelPaddingRangeLimit")
    low, high = sorted((int(value), int(value if limit is None else limit)))
    return (stored >= low) & (stored <= high)


def _apply_modality(path: Path, stored: NDArray[Any], header: Dataset) -> NDArray[np.float64]:
    """Stored values as the modality's units, for instance Hounsfield units."""
    if header.get("ModalityLUTSequence"):
        table = header.ModalityLUTSequence[0]
        looked_up, bits = _look_up(path, stored, table.LUTDescriptor, table.LUTData, header)
        return looked_up * float(2**bits - 1)
    slope, intercept = _first_number(path, header, "RescaleSlope"), _first_number(path, header, "RescaleIntercept")
    rescaled: NDArray[np.float64] = stored.astype(np.float64) * (1 if slope is None else slope) + (intercept or 0)
    return rescaled


def _apply_voi(
    path: Path, values: NDArray[np.float64], padding: NDArray[np.bool_], header: Dataset
) -> NDArray[np.float64]:
    """Values of interest as [0, 1], in the order of preference that `read_dicom` states."""
    if header.get("VOILUTSequence"):
        table = header.VOILUTSequence[0]
        return _look_up(path, values, table.LUTDescriptor, table.LUTData, header)[0]
    centre, width = _first_number(path, header, "WindowCenter"), _first_number(path, header, "WindowWidth")
    if centre is not None and width is not None:
        return _window(path, values, centre, width, str(header.get("VOILUTFunction") or "LINEAR").upper())
    seen = values[~padding]
    if not seen.size or seen.min() == seen.max():
        return np.zeros(values.shape)
    stretched: NDArray[np.float64] = np.clip((values - seen.min()) / (seen.max() - seen.min()), 0, 1)
    return stretched


def _window(path: Path, values: NDArray[np.float64], centre: float, width: float, function: str) -> NDArray[np.float64]:
    """Window to [0, 1] by the formulas of PS3.3 C.11.2.1.2.1 and C.11.2.1.3."""
    least = 1 if function == "LINEAR" else 0
    if function not in {"LINEAR", "LINEAR_EXACT", "SIGMOID"} or width < least or width == 0:
        raise ImageError(
            f"{path} has a window of function {function} and width {width:g}, which DICOM does not allow. "
            "Correct or remove WindowCenter and WindowWidth."
        )
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if width == 0:
        return (values > centre).astype(np.float64)
    distance: NDArray[np.float64] = (values - centre) / width
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * distance, -700, 700)))
    return np.clip(distance + 0.5, 0, 1)


def _look_up(
    path: Path, values: NDArray[Any], descriptor: Sequence[int], data: bytes | Sequence[int], header: Dataset
) -> tuple[NDArray[np.float64], int]:
    """Values through a table as [0, 1], and the bits of its entries (PS3.3 C.11.1.1.1).

    pydicom's own look-ups index with the type of the entries, so tables of over 256 entries of 8 bits wrap there.
    """
    entries, first, bits = (int(number) for number in descriptor)
    entries = entries % 2**16 or 2**16
    if first >= 2**15 and values.min() < 0:
        first -= 2**16  # a rescale made the input signed, which pydicom cannot know when it reads the descriptor
    numbers: Any = data
    if isinstance(data, bytes):
        order = "<" if header.file_meta.TransferSyntaxUID.is_little_endian else ">"
        packed = len(data) < 2 * entries
        numbers, bits = np.frombuffer(data, np.uint8 if packed else f"{order}u2"), 8 if packed else bits
    table = np.atleast_1d(np.asarray(numbers, dtype=np.float64))[:entries]
    if len(table) < entries or not 8 <= bits <= 16 or table.max() > 2**bits - 1:
        raise ImageError(
            f"{path} has a lookup table of {len(table)} entries up to {table.max(initial=0):g}, where its descriptor "
            f"says {entries} of {bits} bits. Export the file again."
        )
    places = np.clip(np.rint(values) - first, 0, entries - 1).astype(np.int64)
    return table[places] / (2**bits - 1), bits


def _first_number(path: Path, header: Dataset, name: str) -> float | None:
    """The first value of a DS element, None where the element is absent or empty."""
    value = header.get(name)
    values = [] if value is None else list(value) if header[name].VM > 1 else [value]
    if not values:
        return None
    number = float(values[0])
    if not np.isfinite(number):
        raise ImageError(f"{path} has {name} {number}. Correct it, or export the file again.")
    return number
