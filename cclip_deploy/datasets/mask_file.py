"""Read binary masks from image files: gray, colored, JPEG, or with soft edges."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from cclip_deploy.datasets.mask_values import NONZERO, Levels, Mask, choose_colors, choose_levels
from cclip_deploy.errors import DataError
from cclip_deploy.imaging.reading import open_raster

GREY_MODES = frozenset({"L", "I;16", "I"})
LOSSY_FORMATS = frozenset({"JPEG", "MPO"})
LOSSY_THRESHOLD, LOSSY_TOLERANCE, LOSSY_FRACTION = 128, 48, 0.02
"""A JPEG mask is thresholded at half of white; at most this fraction of its pixels may differ from both black and white
by more than the tolerance."""
SOFT_LEVELS, SOFT_BRIGHTEST, SOFT_REACH_PX, SOFT_FRACTION = 3, 128, 2, 0.95
"""A gray mask has soft edges if it has at least this many values between, its brightest value is at least this, and at
least this fraction of the pixels between have an outside and an inside pixel within reach. Label maps have not."""
SHOWN_VALUES = 6

Form = Literal["binary", "soft", "lossy", "colored"]


@dataclass(frozen=True)
class DecodedMask:
    """A mask (H, W), and what its file needed: thresholding soft edges or a JPEG, or choosing a color."""

    inside: Mask
    form: Form


def read_mask(path: Path, values: Sequence[str] = ()) -> Mask:
    """Read a mask as (H, W) bool; see `decode_mask`."""
    return decode_mask(path, values).inside


def decode_mask(path: Path, values: Sequence[str] = ()) -> DecodedMask:
    """Read a mask; without `values`, the file has 0 (black) outside and one other value or color inside.

    Gray masks with soft edges (anti-aliased) are thresholded at half of their brightest value, JPEG files, as in
    Kvasir-SEG, at half of white. Where a file has transparent pixels, they are outside. EXIF orientation is applied, as
    to images. With `values`, exactly these are inside; in a JPEG file, give or take LOSSY_TOLERANCE.

    Args:
        path: mask file.
        values: mask values that are inside (see `mask_values.parse_mask_value`).

    Raises:
        DataError: without `values`, more values than 0 and one other, no black beside a color, or a JPEG that is
            neither black nor white. The message counts the values.
        ImageError: the file cannot be decoded.
    """
    with open_raster(path) as file:
        lossy = file.format in LOSSY_FORMATS
        image = ImageOps.exif_transpose(file)
        image = image.convert("L") if image.mode == "1" else image
        pixels = np.asarray(image) if _has_gray_values(image) else _channels(path, image, bool(values))
    tolerance = LOSSY_TOLERANCE if lossy else 0
    if pixels.ndim == 3:
        inside = choose_colors(pixels, values, tolerance) if values else _check_one_color(path, image.mode, pixels)
        return DecodedMask(inside, "colored")
    if values:
        return DecodedMask(choose_levels(pixels, values, tolerance), "lossy" if lossy else "binary")
    if lossy:
        return DecodedMask(_threshold_lossy(path, pixels), "lossy")
    if _has_soft_edges(pixels):
        return DecodedMask(np.asarray(pixels >= (int(pixels.max()) + 1) // 2), "soft")
    return DecodedMask(_check_two_values(path, pixels), "binary")


def _has_gray_values(image: Image.Image) -> bool:
    """Return whether an image has gray values or, with a palette that begins with black, label numbers."""
    if image.mode == "P":
        return "transparency" not in image.info and (image.getpalette() or [0, 0, 0])[:3] == [0, 0, 0]
    return image.mode in GREY_MODES


def _channels(path: Path, image: Image.Image, chosen: bool) -> NDArray[np.uint8]:
    """Return gray values (H, W) if the channels are equal, else colors (H, W, 3); transparent pixels are black.

    One color on transparent ground gives the opacity as gray values, unless values were `chosen`.
    """
    if image.mode not in {"RGB", "RGBA", "LA", "P"}:
        raise DataError(f"Mask {path} has color mode {image.mode} and is not gray. Save it as a gray PNG of 0 and 255.")
    rgba = np.asarray(image.convert("RGBA"))
    colors, alpha = rgba[..., :3], rgba[..., 3]
    if chosen:
        colors = colors * (alpha >= LOSSY_THRESHOLD)[..., None].astype(np.uint8)
    elif alpha.min() < 255:
        visible = colors[alpha > 0]
        if alpha.min() > 0 or (len(visible) and np.ptp(visible, axis=0).max() > 0):
            raise DataError(
                f"Mask {path} has color mode {image.mode} and transparent pixels that do not say what is inside. "
                f"{_advice(['#ff0000'], 'black')}"
            )
        return alpha  # one color on transparent ground
    if np.ptp(colors, axis=2).max() == 0:
        return colors[..., 0]
    return colors


def _check_one_color(path: Path, mode: str, colors: NDArray[np.uint8]) -> Mask:
    """Return where the one color is that is not black; raise DataError for other colors."""
    red, green, blue = (colors[..., channel].astype(np.uint32) for channel in range(3))
    packed = red << 16 | green << 8 | blue
    found, counts = np.unique(packed, return_counts=True)
    if len(found) == 2 and found[0] == 0:
        return np.asarray(packed != 0)
    names = [f"#{value:06x}" for value in found]
    raise DataError(
        f"Mask {path} has color mode {mode} and {len(found):,} colors: {_shares(names, counts)}. Black and one other "
        f"color are read as outside and inside. {_advice(_by_count(names, counts), 'black' if found[0] == 0 else None)}"
    )


def _check_two_values(path: Path, values: Levels) -> Mask:
    found, counts = _count_values(values)
    inside = found[found != 0]
    if len(inside) > 1:
        names = [str(value) for value in found]
        brightest = np.iinfo(values.dtype).max if values.dtype in (np.uint8, np.uint16) else int(found.max())
        many = [f"{(brightest + 1) // 2}-{brightest}"]
        examples = _by_count(names, counts) if len(inside) < SHOWN_VALUES else many
        raise DataError(
            f"Mask {path} has {len(inside)} values besides 0: {_shares(names, counts)}. A mask must be 0 outside and "
            f"one other value inside. {_advice(examples, '0' if len(inside) < len(found) else None)}"
        )
    return np.asarray(values != 0)


def _threshold_lossy(path: Path, values: Levels) -> Mask:
    levels = values.astype(np.int16)
    between = float(np.mean((levels > LOSSY_TOLERANCE) & (levels < 255 - LOSSY_TOLERANCE)))
    if between > LOSSY_FRACTION:
        raise DataError(
            f"Mask {path} is a JPEG file in which {between:.0%} of the pixels are neither black nor white. Give a "
            f"mask, or save it as a gray PNG of 0 and 255. {_advice(['128-255'], '0')}"
        )
    return np.asarray(levels >= LOSSY_THRESHOLD)


def _has_soft_edges(levels: Levels) -> bool:
    """Return whether the values between black and the brightest are only at edges."""
    if levels.dtype != np.uint8:
        return False
    found, _ = _count_values(levels)
    brightest = int(found.max())
    if brightest < SOFT_BRIGHTEST or len(found) < SOFT_LEVELS + 1:
        return False
    outside, inside = levels <= brightest // 10, levels >= brightest - brightest // 10
    between = ~(outside | inside)
    if not between.any():
        return True
    at_edge = between & _near(outside) & _near(inside)
    return bool(at_edge.sum() >= SOFT_FRACTION * between.sum())


def _near(mask: Mask) -> Mask:
    """Return which pixels have a pixel of a mask (H, W) within SOFT_REACH_PX in both directions."""
    image = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.MaxFilter(2 * SOFT_REACH_PX + 1))) > 0


def _count_values(values: Levels) -> tuple[Levels, NDArray[np.intp]]:
    """Return the distinct values in order, and their numbers of pixels; fast for 8 bits."""
    if values.dtype != np.uint8:
        return np.unique(values, return_counts=True)
    counts = np.bincount(values.reshape(-1), minlength=256)
    return np.flatnonzero(counts), counts[counts > 0]


def _by_count(names: Sequence[str], counts: NDArray[np.intp]) -> list[str]:
    return [names[index] for index in np.argsort(-counts, kind="stable")]


def _shares(names: Sequence[str], counts: NDArray[np.intp]) -> str:
    """Format the most frequent values with their fraction of the pixels: `0 (90 %), 1 (8 %), 2 (2 %)`."""
    order = np.argsort(-counts, kind="stable")[:SHOWN_VALUES]
    total = counts.sum()
    shown = ", ".join(f"{names[index]} ({100 * counts[index] / total:.3g} %)" for index in order)
    rest = len(names) - SHOWN_VALUES
    return shown + (f" and {rest:,} more" if rest > 0 else "")


def _advice(values: Sequence[str], outside: str | None) -> str:
    """Return the options that say what is inside: one of the values or, if there is an outside value, all others."""
    others = [value for value in values if value not in ("0", "#000000")][:SHOWN_VALUES]
    offered = [f"--mask-value {shlex.quote(value)}" for value in others]
    if outside is not None:
        offered.append(f"--mask-value {NONZERO} for all but {outside}")
    return f"Say what is inside: {' or '.join(offered)}; give it once for each value (data.mask_values in a recipe)."
