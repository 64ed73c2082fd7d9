"""Malicious masks and images of a data set are refused with an error that names the file.

Before, a mask was opened with every format that Pillow knows, so a PostScript file named m.png started Ghostscript; and
an image's EXIF orientation was applied but its mask's was not, so square ones were scored against the wrong place.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.datasets.mask_file import read_mask
from cclip_deploy.datasets.reading import read_data_set
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.errors import DataError, ImageError
from cclip_deploy.imaging.reading import image_orientation, image_size, read_image

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
ORIENTATION = 274


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears when a program called `gs` is started."""
    started = tmp_path / "started"
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {started}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return started


def write_set(folder: Path, image: Image.Image, mask: Image.Image, *, turned: str = "") -> Path:
    """A flat set of one row; `turned` names which of the two has EXIF orientation 6."""
    folder.mkdir()
    for name, picture in (("image", image), ("mask", mask)):
        exif = Image.Exif()
        if name in turned:
            exif[ORIENTATION] = 6
        picture.save(folder / f"{name}.png", exif=exif)
    (folder / "table.csv").write_text("image,mask,text\nimage.png,mask.png,left lung\n")
    return folder


def pair(height: int, width: int) -> tuple[Image.Image, Image.Image]:
    pixels = np.zeros((height, width), np.uint8)
    pixels[: height // 4] = 255
    return Image.fromarray(pixels), Image.fromarray(pixels)


def test_a_postscript_file_called_png_starts_nothing(ghostscript: Path, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", *pair(32, 32))
    (folder / "mask.png").write_bytes(POSTSCRIPT)
    with pytest.raises(ImageError, match=r"mask\.png is not a complete PNG"):
        read_mask(folder / "mask.png")
    with pytest.raises(DataError, match=r"mask\.png"):
        read_data_set(folder)
    assert not ghostscript.exists()


@pytest.mark.parametrize("side", [(32, 32), (32, 48)])
@pytest.mark.parametrize("turned", ["image", "mask"])
def test_an_orientation_that_one_of_the_two_has_is_refused(side: tuple[int, int], turned: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"orientation|pixels, its image"):
        read_data_set(write_set(tmp_path / "set", *pair(*side), turned=turned))


def test_an_orientation_that_both_have_turns_both(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", *pair(32, 48), turned="image mask")
    (row,) = read_data_set(folder).samples
    pixels, mask = read_image(row.image).pixels, read_mask(row.mask)
    assert pixels.shape == mask.shape == (48, 32)
    assert np.array_equal(pixels > 0.5, mask)


LAYOUTS = {"flat": "images", "medvlsm": "images", "qata": "Test_Folder/img", "languidemedseg": "Test/Images"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_compares_the_orientations_of_a_square_pair(tmp_path: Path, layout: str) -> None:
    """All that read pairs read them through a layout: evaluation, training, ablation, data and calibration."""
    folder = tmp_path / layout
    write_dataset(folder, {"train": 4, "val": 1, "test": 1}, (32, 32), 3, layout=layout)
    (image,) = (folder / LAYOUTS[layout]).glob("*test*" if layout in ("flat", "medvlsm") else "*")
    assert len(read_data_set(folder).samples) == 6
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    with Image.open(image) as picture:
        picture.load()
    picture.save(image, exif=exif)
    with pytest.raises(DataError, match="EXIF orientation 3, its mask 1"):
        read_data_set(folder)


@pytest.mark.parametrize("behind", [False, True])
def test_an_orientation_is_found_before_and_after_the_pixels_of_a_png(tmp_path: Path, behind: bool) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = tmp_path / "a.png"
    Image.new("L", (4, 6)).save(path, exif=exif)
    data = path.read_bytes()
    at = data.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(data[at : at + 4])
    if behind:
        path.write_bytes(data[:at] + data[end:-12] + data[at:end] + data[-12:])
    assert (path.read_bytes().index(b"eXIf") > path.read_bytes().index(b"IDAT")) == behind
    assert image_orientation(path) == 6
    assert image_size(path) == (6, 4)
    assert read_image(path).pixels.shape == (4, 6)


def test_the_size_of_a_png_is_read_without_decoding_it(tmp_path: Path) -> None:
    """Before, each image and mask of a data set was decoded twice to compare sizes and orientations."""
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30)).astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:300])
    assert image_size(path) == (30, 40)
    assert image_orientation(path) == 1
    with pytest.raises(ImageError):
        read_image(path)
