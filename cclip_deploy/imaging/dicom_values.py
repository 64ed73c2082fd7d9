"""Convert stored DICOM values to pixels in [0, 1]: modality LUT, VOI LUT or window, palette, padding and polarity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.errors import ImageError
from cclip_deploy.imaging.raster_pixels import row_strips

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydicom.dataset import Dataset

Values = NDArray[np.float64]


def color_pixels(path: Path, stored: NDArray[Any], header: Dataset) -> tuple[NDArray[np.float32], int]:
    """Scale color to RGB (H, W, 3) in [0, 1]; pydicom has already converted YBR to RGB."""
    if header.PhotometricInterpretation == "PALETTE COLOR":
        return _apply_palette(path, stored, header)
    bits = int(header.BitsStored)
    if stored.ndim != 3 or stored.shape[-1] != 3 or stored.dtype.kind != "u":
        raise ImageError(
            f"{path} is {header.PhotometricInterpretation} with an array of shape {stored.shape} and type "
            f"{stored.dtype}; supported are unsigned gray, palette, RGB and YBR. Export it as RGB."
        )
    shown = np.empty(stored.shape, np.float32)
    for rows in row_strips(stored.shape):
        shown[rows] = np.clip(np.divide(stored[rows], 2**bits - 1, dtype=np.float64), 0, 1)
    return shown, bits


def _apply_palette(path: Path, stored: NDArray[Any], header: Dataset) -> tuple[NDArray[np.float32], int]:
    shown = np.empty((*stored.shape, 3), np.float32)
    depths = []
    for channel, color in enumerate(("Red", "Green", "Blue")):
        name = f"{color}PaletteColorLookupTable"
        if f"{name}Descriptor" not in header or f"{name}Data" not in header:
            raise ImageError(
                f"{path} lacks a plain {color.lower()} palette (segmented palettes are not supported). Save it as RGB."
            )
        palette = _Table.read(path, header[f"{name}Descriptor"].value, header[f"{name}Data"].value, header)
        depths.append(palette.bits)
        for rows in row_strips(stored.shape):
            shown[rows, ..., channel] = palette.look_up(stored[rows], bool(stored.min() < 0))
    return shown, depths[0]


def gray_pixels(path: Path, stored: NDArray[Any], header: Dataset) -> tuple[NDArray[np.float32], int]:
    """Scale gray to (H, W) in [0, 1] in two passes over strips of rows: first the extremes, then the values."""
    if stored.ndim != 2 or not np.isfinite(stored).all():
        raise ImageError(f"{path} is gray, but its array has shape {stored.shape} or values that are not finite.")
    modality = _read_modality(path, bool(stored.min() < 0), header)
    every, seen = [], []
    for rows in row_strips(stored.shape):
        values, padding = modality(stored[rows]), _find_padding(stored[rows], header)
        every.append(values.min())
        if not padding.all():
            seen += [values[~padding].min(), values[~padding].max()]
    values_of_interest = _read_voi(path, bool(min(every) < 0), np.array(seen), header)
    shown = np.empty(stored.shape, np.float32)
    for rows in row_strips(stored.shape):
        values = values_of_interest(modality(stored[rows]))
        values = 1 - values if header.PhotometricInterpretation == "MONOCHROME1" else values
        values[_find_padding(stored[rows], header)] = 0
        shown[rows] = values
    return shown, int(header.BitsStored)


def _find_padding(stored: NDArray[Any], header: Dataset) -> NDArray[np.bool_]:
    value = header.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    limit = header.get("PixelPaddingRangeLimit")
    low, high = sorted((int(value), int(value if limit is None else limit)))
    return (stored >= low) & (stored <= high)


def _read_modality(path: Path, signed: bool, header: Dataset) -> Callable[[NDArray[Any]], Values]:
    """Return the function from stored values to modality units such as HU; `signed` if any stored value is negative."""
    if header.get("ModalityLUTSequence"):
        sequence = header.ModalityLUTSequence[0]
        table = _Table.read(path, sequence.LUTDescriptor, sequence.LUTData, header)
        return lambda stored: table.look_up(stored, signed) * float(2**table.bits - 1)
    slope, intercept = _first_number(path, header, "RescaleSlope"), _first_number(path, header, "RescaleIntercept")
    return lambda stored: stored.astype(np.float64) * (1 if slope is None else slope) + (intercept or 0)


def _read_voi(path: Path, signed: bool, seen: Values, header: Dataset) -> Callable[[Values], Values]:
    """Return the function from modality units to [0, 1], in the order of preference of `read_dicom`.

    `seen` includes the minimum and maximum of the values outside the padding.
    """
    if header.get("VOILUTSequence"):
        sequence = header.VOILUTSequence[0]
        table = _Table.read(path, sequence.LUTDescriptor, sequence.LUTData, header)
        return lambda values: table.look_up(values, signed)
    center, width = _first_number(path, header, "WindowCenter"), _first_number(path, header, "WindowWidth")
    if center is not None and width is not None:
        function = str(header.get("VOILUTFunction") or "LINEAR").upper()
        return lambda values: _window(path, values, center, width, function)
    if not seen.size or seen.min() == seen.max():
        return lambda values: np.zeros(values.shape)
    low, high = seen.min(), seen.max()
    return lambda values: np.clip((values - low) / (high - low), 0, 1)


def _window(path: Path, values: Values, center: float, width: float, function: str) -> Values:
    """Apply a window to [0, 1] with the formulas of PS3.3 C.11.2.1.2.1 and C.11.2.1.3."""
    least = 1 if function == "LINEAR" else 0
    if function not in {"LINEAR", "LINEAR_EXACT", "SIGMOID"} or width < least or width == 0:
        raise ImageError(
            f"{path} has a window of function {function} and width {width:g}, which DICOM does not allow. "
            "Correct or remove WindowCenter and WindowWidth."
        )
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if width == 0:
        return (values > center).astype(np.float64)
    distance: Values = (values - center) / width
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * distance, -700, 700)))
    return np.clip(distance + 0.5, 0, 1)


@dataclass(frozen=True)
class _Table:
    """Lookup table (PS3.3 C.11.1.1.1). pydicom's own indexes with the entries' type, so large values overflow."""

    entries: Values
    first: int
    bits: int

    @staticmethod
    def read(path: Path, descriptor: Sequence[int], data: bytes | Sequence[int], header: Dataset) -> _Table:
        """Parse a table; raise ImageError if the entries contradict the descriptor."""
        count, first, bits = (int(number) for number in descriptor)
        count = count % 2**16 or 2**16
        numbers: Any = data
        if isinstance(data, bytes):
            order = "<" if header.file_meta.TransferSyntaxUID.is_little_endian else ">"
            packed = len(data) < 2 * count
            numbers, bits = np.frombuffer(data, np.uint8 if packed else f"{order}u2"), 8 if packed else bits
        entries = np.atleast_1d(np.asarray(numbers, dtype=np.float64))[:count]
        if len(entries) < count or not 8 <= bits <= 16 or entries.max() > 2**bits - 1:
            raise ImageError(
                f"{path} has a lookup table of {len(entries)} entries up to {entries.max(initial=0):g}, but its "
                f"descriptor declares {count} of {bits} bits. Export the file again."
            )
        return _Table(entries, first, bits)

    def look_up(self, values: NDArray[Any], signed: bool) -> Values:
        """Map values through the table to [0, 1].

        `signed` is whether any value of the image is negative, for example after a rescale; pydicom cannot know this
        when it reads the descriptor.
        """
        first = self.first - 2**16 if signed and self.first >= 2**15 else self.first
        places = np.clip(np.rint(values) - first, 0, len(self.entries) - 1).astype(np.int64)
        found: Values = self.entries[places] / (2**self.bits - 1)
        return found


def _first_number(path: Path, header: Dataset, name: str) -> float | None:
    """Return the first value of a DS element, or None if it is absent or empty."""
    value = header.get(name)
    values = [] if value is None else list(value) if header[name].VM > 1 else [value]
    if not values:
        return None
    number = float(values[0])
    if not np.isfinite(number):
        raise ImageError(f"{path} has {name} {number}. Correct it, or export the file again.")
    return number
