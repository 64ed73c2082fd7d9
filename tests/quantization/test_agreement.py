"""Images and prompts of the mask comparison, and its report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.datasets.image_sets import read_image_set
from cclip_deploy.datasets.reading import read_data_set
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.datasets.writing import WRITERS
from cclip_deploy.parity.reference import PICTURE_PROMPTS
from cclip_deploy.quantization.agreement import evaluation_images, measure_mask_agreement, with_prompts, write_agreement
from cclip_deploy.quantization.calibrate import CalibrationOptions
from tests.conftest import THREADS, TINY_HW


@pytest.mark.parametrize("layout", WRITERS)
def test_in_every_format_the_test_images_are_evaluated_with_their_prompts(layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_dataset(folder, {"train": 8, "val": 2, "test": 3}, (32, 48), 5, layout=layout)
    found = evaluation_images(CalibrationOptions((), evaluation_set=(folder,)))
    rows = [row for row in read_data_set(folder).samples if row.split == "test"]
    assert {(image.path, text) for image in found.images for text in image.prompts} == {(r.image, r.text) for r in rows}
    assert len(found.images) == 3


def test_plain_images_get_the_reference_prompts_and_the_limit_applies(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", {"test": 5}, (32, 48), 5)
    images = tmp_path / "data" / "images"
    found = evaluation_images(CalibrationOptions((), evaluation_set=(images,), evaluation_limit=3))
    assert [image.prompts for image in found.images] == [PICTURE_PROMPTS] * 3
    assert found.sources[0].images == 5


def test_images_of_one_name_and_long_prompts_count(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Two images of one name in different folders; one has a prompt longer than the bundle's 24 tokens."""
    rows = []
    write_dataset(tmp_path / "source", {"test": 2}, TINY_HW, 8)
    for number in range(2):
        place = tmp_path / "set" / f"study{number}"
        place.mkdir(parents=True)
        shutil.copy(tmp_path / "source" / "images" / f"test-0000{number}.png", place / "image.png")
        shutil.copy(next((tmp_path / "source" / "masks").glob(f"test-0000{number}-*")), place / "target.png")
        row = {"image": f"study{number}/image.png", "mask": f"study{number}/target.png", "split": "test"}
        rows += [row | {"text": "lower left lung"}, row | {"text": "opacity near the hilum and " * 10}][: number + 1]
    (tmp_path / "set" / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = with_prompts(read_image_set((tmp_path / "set",), "test"))
    agreement = measure_mask_agreement(tiny_bundle, "fp32", found, THREADS)
    assert (agreement.pictures, agreement.masks, agreement.cut_prompts, agreement.patients) == (2, 3, 1, 0)
    assert agreement.mean == agreement.worst == 1
    write_agreement(agreement, tmp_path)
    written = json.loads((tmp_path / "reports" / "fp32.masks.json").read_text())
    assert written["sources"] == [
        {"name": "set", "layout": "flat", "split": "test", "images": 2, "patients": 0, "images_without_patient": 2}
    ]
