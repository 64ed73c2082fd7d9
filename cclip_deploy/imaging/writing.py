"""Write a segmentation to disk as PNG files: mask, probability map and overlay."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cclip_deploy.common.files import replace_together
from cclip_deploy.errors import EnvironmentIssue, UsageError
from cclip_deploy.imaging.image import Picture
from cclip_deploy.imaging.png import encode_png
from cclip_deploy.imaging.preprocess import check_unit_range
from cclip_deploy.imaging.raster_pixels import row_strips
from cclip_deploy.imaging.reading import open_raster
from cclip_deploy.imaging.segmentation import Segmentation

OVERLAY_LONGEST_PX = 1024
SOURCE = "cclip-deploy picture SHA-256"
"""PNG text keyword of an output with the SHA-256 of its image."""
OUTPUTS = ("mask", "probability", "overlay")
"""What `write_segmentation` can write."""

_ENLARGE_BELOW_PX, _CAPTION_LEAST_PX, _CAPTION_LINES = 512, 320, 6
_PREDICTED, _REFERENCE = (56, 199, 214), (255, 179, 71)
_STRIP, _TEXT = (18, 22, 27), (232, 236, 239)
_TINT, _HALO = 0.28, 0.4


@dataclass(frozen=True)
class WrittenMask:
    """PNG files of one image and prompt, by kind: those of `OUTPUTS` that were written."""

    files: Mapping[str, Path]

    @property
    def mask(self) -> Path:
        return self.files["mask"]

    @property
    def probability(self) -> Path:
        return self.files["probability"]

    @property
    def overlay(self) -> Path:
        return self.files["overlay"]


def check_outputs(outputs: Sequence[str]) -> None:
    """Raise UsageError unless `outputs` names at least one of `OUTPUTS`, and nothing else."""
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown or not outputs:
        problem = f"{unknown[0]!r} is not an output" if unknown else "No output is named"
        raise UsageError(f"{problem}. Name some of {','.join(OUTPUTS)}.")


def write_segmentation(
    picture: Picture, segmentation: Segmentation, folder: Path, stem: str, outputs: Sequence[str] = OUTPUTS
) -> WrittenMask:
    """Write `<stem>-mask.png`, `<stem>-probability.png` and `<stem>-overlay.png`, replacing existing ones.

    The mask is 8-bit gray, 255 inside; the probability is 16-bit gray, 65535 is 1; the overlay is made by
    `draw_overlay`. Each stores `picture.sha256` as PNG text. They are replaced together (`files.replace_together`).

    Args:
        picture: image that was segmented.
        segmentation: its mask; the prompt is shown below the overlay.
        folder: created if missing.
        stem: start of the file names.
        outputs: which of `OUTPUTS` to write.

    Raises:
        UsageError: a wrong shape, value, threshold, stem or output.
        EnvironmentIssue: the disk is full or the folder cannot be written.
    """
    height, width = picture.pixels.shape[:2]
    probability, threshold = segmentation.probability, segmentation.threshold
    if probability.shape != (height, width):
        raise UsageError(f"The probability is {probability.shape}, the image {(height, width)}. Use to_source first.")
    check_unit_range("The probability", probability)
    if not 0 < threshold <= 1:
        raise UsageError(f"Threshold {threshold} is not in (0, 1]. Use 0.5, for example.")
    if not stem or Path(stem).name != stem:
        raise UsageError(f"{stem!r} cannot begin a file name. Make one with file_stem.")
    check_outputs(outputs)
    source = {SOURCE: picture.sha256} if picture.sha256 else {}
    encode: dict[str, Callable[[], bytes]] = {
        "mask": lambda: segmentation.mask_png(source),
        "probability": lambda: encode_png(_to_uint16(probability), source),
        "overlay": lambda: encode_png(
            np.asarray(draw_overlay(picture.pixels, segmentation.mask, segmentation.prompt)), source
        ),
    }
    written = {name: output_path(folder, stem, name) for name in OUTPUTS if name in outputs}
    encoded = {path: encode[name]() for name, path in written.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_together(encoded)
    except OSError as error:
        raise _writing_issue(folder, error) from error
    return WrittenMask(written)


def output_path(folder: Path, stem: str, output: str) -> Path:
    """Return the path where `write_segmentation` writes an output."""
    return folder / f"{stem}-{output}.png"


def mask_source(path: Path) -> str | None:
    """Return the SHA-256 of the image that an output was made from, or None if the file does not store it.

    Raises:
        ImageError: the file is not an image.
    """
    with open_raster(path) as image:
        found = image.info.get(SOURCE)
        return found if isinstance(found, str) else None


def draw_overlay(
    pixels: NDArray[Any], mask: NDArray[Any], prompt: str, truth: NDArray[Any] | None = None
) -> Image.Image:
    """Draw the tinted and outlined mask on the image, with the prompt in a strip below; returns RGB.

    The longest side of the image becomes at most 1024 pixels; an image under 512 is enlarged by an integer factor.
    Prompts of more than six lines are cut. The font has Latin letters only.

    Args:
        pixels: (H, W) or (H, W, 3) in [0, 1].
        mask: (H, W), True or nonzero inside.
        prompt: text of the strip.
        truth: reference mask (H, W), outlined in another color with a legend.
    """
    for what, region in (("mask", mask), ("truth", truth)):
        if region is not None and region.shape != pixels.shape[:2]:
            raise UsageError(f"The {what} has shape {region.shape}, the image {pixels.shape[:2]}; they must be equal.")
    size = _overlay_size(*pixels.shape[:2])
    image = _resized_image(pixels, size)
    fine = _fine_region(mask, size)
    _blend(image, _PREDICTED, fine, _TINT)
    if truth is not None:
        _draw_outline(image, _fine_region(truth, size), _REFERENCE)
    _draw_outline(image, fine, _PREDICTED)
    return _add_caption(image, prompt, with_reference=truth is not None)


def _to_uint16(probability: NDArray[Any]) -> NDArray[np.uint16]:
    scaled = np.empty(probability.shape, np.uint16)
    for rows in row_strips(probability.shape):
        scaled[rows] = np.rint(np.multiply(probability[rows], 65535, dtype=np.float64))
    return scaled


def _writing_issue(folder: Path, error: OSError) -> EnvironmentIssue:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return EnvironmentIssue(f"No room for masks in {folder} ({error.strerror}). Free space or use another folder.")
    return EnvironmentIssue(f"Masks cannot be written to {folder}: {error}. Check its permissions or use another.")


def _overlay_size(height: int, width: int) -> tuple[int, int]:
    """(width, height) of the image inside the overlay."""
    longest = max(height, width)
    if longest < _ENLARGE_BELOW_PX:
        scale = float(-(-_ENLARGE_BELOW_PX // longest))
    else:
        scale = min(1.0, OVERLAY_LONGEST_PX / longest)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _resized_image(pixels: NDArray[Any], size: tuple[int, int]) -> Image.Image:
    values = np.empty(pixels.shape, np.uint8)
    for rows in row_strips(pixels.shape):
        values[rows] = np.rint(np.clip(pixels[rows], 0, 1) * 255)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC).convert("RGB")


def _fine_region(region: NDArray[Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Resample the region to twice the overlay's resolution, for antialiased edges."""
    image = Image.fromarray((region != 0).astype(np.uint8) * 255)
    # When doubling, a pixel's own bilinear weight is 9/16, so thresholding gives the same result as nearest.
    same_size = region.shape == size[::-1]
    resample = Image.Resampling.NEAREST if same_size else Image.Resampling.BILINEAR
    return np.asarray(image.resize((2 * size[0], 2 * size[1]), resample)) >= 128


def _draw_outline(image: Image.Image, fine: NDArray[np.bool_], color: tuple[int, int, int]) -> None:
    """Draw a line of two overlay pixels centered on the edge, on a faint dark halo."""
    line = _dilate(_boundary(fine))
    halo = _dilate(_dilate(line))
    _blend(image, _STRIP, halo, _HALO)
    _blend(image, color, line, 1)


def _boundary(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels on both sides of the edge: those with a 4-neighbor of the other value."""
    boundary = np.zeros_like(region)
    vertical, horizontal = region[1:] ^ region[:-1], region[:, 1:] ^ region[:, :-1]
    boundary[1:] |= vertical
    boundary[:-1] |= vertical
    boundary[:, 1:] |= horizontal
    boundary[:, :-1] |= horizontal
    return boundary


def _dilate(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    dilated = region.copy()
    dilated[1:] |= region[:-1]
    dilated[:-1] |= region[1:]
    dilated[:, 1:] |= region[:, :-1]
    dilated[:, :-1] |= region[:, 1:]
    return dilated


def _blend(image: Image.Image, color: tuple[int, int, int], fine: NDArray[np.bool_], opacity: float) -> None:
    """Blend a color into the image, weighting each pixel by how much of it the fine region covers."""
    covered = Image.fromarray(fine.view(np.uint8) * np.uint8(round(255 * opacity))).reduce(2)
    if box := covered.getbbox():
        image.paste(color, box, covered.crop(box))


def _add_caption(image: Image.Image, prompt: str, with_reference: bool) -> Image.Image:
    width = max(image.width, _CAPTION_LEAST_PX)
    text_px = min(max(width // 44, 14), 22)
    font, margin, line_px = ImageFont.load_default(text_px), text_px, round(1.4 * text_px)
    indent = margin + text_px + text_px // 2
    lines = _wrap(prompt, font, width - indent - margin)
    rows = len(lines) + (1 if with_reference else 0)
    sheet = Image.new("RGB", (width, image.height + 2 * (margin * 3 // 4) + rows * line_px), _STRIP)
    sheet.paste(image, ((width - image.width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    top = image.height + margin * 3 // 4 + line_px // 2
    _draw_swatch(draw, margin, top, text_px, _PREDICTED)
    for number, line in enumerate(lines):
        draw.text((indent, top + number * line_px), line, fill=_TEXT, font=font, anchor="lm")
    if with_reference:
        middle = top + len(lines) * line_px
        _draw_swatch(draw, margin, middle, text_px, _REFERENCE)
        draw.text((indent, middle), "reference", fill=_REFERENCE, font=font, anchor="lm")
    return sheet


def _draw_swatch(draw: ImageDraw.ImageDraw, left: int, middle: int, side: int, color: tuple[int, int, int]) -> None:
    half = side * 3 // 8
    draw.rounded_rectangle((left, middle - half, left + 2 * half, middle + half), radius=side // 5, fill=color)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> list[str]:
    """Wrap text to at most `_CAPTION_LINES` lines, splitting words that are too long for a line."""
    # Limit the length first: six lines are far shorter, and measuring a very long prompt letter by letter is slow.
    text = "".join(letter if letter.isprintable() else " " for letter in text[:4000])
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width_px:
            lines[-1] = joined
            continue
        *full, rest = _split_word(word, font, width_px)
        lines.extend([*full, rest])
        if len(lines) > _CAPTION_LINES + 1:
            break
    lines = [line for line in lines if line] or ["(no prompt)"]
    if len(lines) > _CAPTION_LINES:
        lines = lines[:_CAPTION_LINES]
        while font.getlength(lines[-1] + " …") > width_px:
            lines[-1] = lines[-1][:-1]
        lines[-1] += " …"
    return lines


def _split_word(word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> list[str]:
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width_px:
            pieces.append("")
        pieces[-1] += letter
    return pieces
