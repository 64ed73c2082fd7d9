"""DICOM images with PNG masks in data sets of every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cclip_deploy.datasets.image_sets import read_image_set
from cclip_deploy.datasets.mask_file import read_mask
from cclip_deploy.datasets.reading import read_data_set
from cclip_deploy.datasets.report import report_data_set
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.datasets.writing import WRITERS
from cclip_deploy.errors import DataError
from cclip_deploy.imaging.preprocess import Preprocessing, resize_pixels
from cclip_deploy.imaging.reading import read_image
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.train.config import TrainConfig
from cclip_deploy.train.training_set import open_training_set
from tests.imaging.test_dicom import write_dicom

HW = (32, 48)
UID = "1.2.840.113619.2.{}"


def to_dicom(folder: Path, rename: Callable[[Path], str]) -> dict[str, np.ndarray]:
    """Replace every image by a 16-bit DICOM file of that gray, in tables too; the pixels by the new names."""
    pixels = {}
    for path in {row.image for row in read_data_set(folder).samples}:
        gray, name = read_image(path).pixels, rename(path)
        path.unlink()
        stored = np.rint(gray * 65535).astype(np.uint16)
        write_dicom(path.with_name(name), stored, WindowCenter=32768, WindowWidth=65536)
        pixels[name] = gray
        for table in (*folder.glob("*.csv"), *folder.glob("*.jsonl"), *folder.glob("anns/*.json")):
            table.write_text(
                table.read_text().replace(f"/{path.name}", f"/{name}").replace(f'"{path.name}', f'"{name}')
            )
    return pixels


@pytest.mark.parametrize("suffix", [".dcm", ""])
@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_reads_dicom_images(layout: str, suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_dataset(folder, {"train": 4, "val": 1, "test": 2}, HW, 5, layout=layout)
    before = read_data_set(folder).samples
    pixels = to_dicom(folder, lambda path: path.stem + suffix)
    data_set = read_data_set(folder)
    assert [(r.mask, r.text, r.split) for r in data_set.samples] == [(r.mask, r.text, r.split) for r in before]
    for row in data_set.samples:
        assert row.image.suffix == suffix
        np.testing.assert_allclose(read_image(row.image).pixels, pixels[row.image.name], atol=2e-5)
        assert read_mask(row.mask).shape == HW
    tokenizer = PromptTokenizer.from_open_clip()
    report = report_data_set(data_set, tokenizer, 32)
    assert (report.splits["train"].images, report.splits["train"].image_sizes) == (4, ("48x32",))
    assert not report.unused_files
    train = open_training_set(data_set.samples, tokenizer, TrainConfig(image_size=64))
    expected = resize_pixels(pixels[train.images.paths[0].name], (64, 64), Preprocessing())
    np.testing.assert_allclose(train.images[0], expected, atol=1e-4)
    assert len(read_image_set((folder,), "test").images) == 2


def test_a_name_that_is_a_uid_keeps_its_last_number(tmp_path: Path) -> None:
    """LViT finds images by the masks' names, and in a UID the last number stands where a suffix would."""
    folder = tmp_path / "set"
    write_dataset(folder, {"train": 3}, HW, 5, layout="mosmed")
    names = {path.stem: UID.format(number) for number, path in enumerate((folder / "Train_Folder" / "img").iterdir())}
    to_dicom(folder, lambda path: names[path.stem])
    masks = folder / "Train_Folder" / "labelcol"
    for stem, name in names.items():
        (masks / f"{stem}.png").rename(masks / f"{name}.png")
    table = "Image,Description\n" + "".join(f"{name}.png,left lung\n" for name in names.values())
    (folder / "Train_Folder" / "Train_text.xlsx").unlink()
    (folder / "Train_Folder" / "Train_text.csv").write_text(table)
    assert [row.image.name for row in read_data_set(folder).samples] == list(names.values())


def test_a_mask_of_another_size_and_a_dicom_mask_are_named(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", np.zeros((6, 8), np.uint16))
    write_dicom(tmp_path / "turned.dcm", np.zeros((8, 6), np.uint16))
    for mask, said in (("turned.dcm", r"row 1: mask .*turned\.dcm is"), ("a.dcm", r"row 1: mask .*is a DICOM file")):
        row = {"image": "a.dcm", "mask": mask, "text": "left"}
        (tmp_path / "table.jsonl").write_text(json.dumps(row))
        with pytest.raises(DataError, match=said):
            read_data_set(tmp_path)
