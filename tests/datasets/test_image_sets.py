"""Which images a folder gives: a data set's split in every layout, plain images, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.datasets.image_sets import ImageSet, SetImage, read_image_set
from cclip_deploy.datasets.options import DataSetOptions
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.datasets.writing import WRITERS
from cclip_deploy.errors import DataError, ImageError, UsageError
from tests.made_once import made_once

HW = (32, 48)
COUNTS = {"train": 8, "val": 2, "test": 4}
LAYOUT_OF = {"jsonl": "flat", "qata": "lvit", "mosmed": "lvit"}
PATIENTS_UNKNOWN = {"medvlsm"}


@pytest.fixture(scope="session")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives a data set in a layout that `synth` writes, with the splits of COUNTS."""

    def give(layout: str) -> Path:
        make = partial(write_dataset, counts=COUNTS, image_hw=HW, seed=3, layout=layout)
        return made_once(tmp_path_factory, f"image-set-{layout}", make)

    return give


def save(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(HW, value, np.uint8)).save(path)
    return path


def flat(folder: Path, rows: list[tuple[str, str]], text: str = "lower left lung") -> Path:
    """A flat data set of (split, subject); every image is another."""
    for number in range(len(rows)):
        save(folder / "images" / f"{number}.png", 3 * number + len(folder.name))
        save(folder / "masks" / f"{number}.png")
    with (folder / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "mask", "text", "split", "subject"))
        table.writerows((f"images/{n}.png", f"masks/{n}.png", text, *row) for n, row in enumerate(rows))
    return folder


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_gives_the_images_of_the_split_and_no_mask(
    layout: str, split: str, data_set: Callable[[str], Path]
) -> None:
    """The split is in the names that the generator gives, or in the names of the layout's folders."""
    folder = data_set(layout)
    found = read_image_set((folder,), split)
    assert len(found.images) == COUNTS[split]
    for image in found.images:
        assert not {"masks", "labelcol", "GTs"} & set(image.path.parts)
        in_test = {"lvit": "Test_Folder", "languidemedseg": "Test"}.get(LAYOUT_OF.get(layout, layout))
        assert (in_test in image.path.parts if in_test else image.path.name.startswith("test")) == (split == "test")
        assert image.prompts
    (source,) = found.sources
    assert (source.layout, source.split, source.images) == (LAYOUT_OF.get(layout, layout), split, COUNTS[split])
    expected = 0 if layout in PATIENTS_UNKNOWN else COUNTS[split]
    assert source.patients == len(found.patients) == expected
    assert source.images_without_patient == COUNTS[split] - expected


def test_prompts_are_the_data_sets_own_and_repaired(tmp_path: Path) -> None:
    right = "Unilateral pulmonary infection, one infected area, lower left lung."
    folder = flat(tmp_path / "set", [("test", "p")], right.replace("lower", "lowwer"))
    assert read_image_set((folder,), "test").images[0].prompts == (right,)


def test_a_folder_without_a_layout_gives_its_images_and_the_patients_in_their_names(tmp_path: Path) -> None:
    for name in ("sub-S07_ses-E1.png", "deep/sub-S07_ses-E2.png", "plain.png"):
        save(tmp_path / "films" / name)
    found = read_image_set((tmp_path / "films",), "train")
    assert [(image.path.name, image.prompts, image.patient) for image in found.images] == [
        ("sub-S07_ses-E2.png", (), "sub-S07"), ("plain.png", (), None), ("sub-S07_ses-E1.png", (), "sub-S07"),
    ]  # fmt: skip
    assert found.sources[0].describe() == (
        "films (images without a layout): 3 images of 1 patient, and 1 without a known patient"
    )
    with_pattern = read_image_set((tmp_path / "films" / "plain.png",), "train", DataSetOptions(subject_pattern="pl.."))
    assert with_pattern.patients == {"plai"}


@pytest.mark.parametrize(
    "name", ["masks/a.png", "deep/labelcol/a.png", "GTs/a.png", "a_mask.png", "mask_a.png", "a-mask.png",
             "a_segmentation.png"],
)  # fmt: skip
def test_a_folder_of_images_and_masks_is_refused(name: str, tmp_path: Path) -> None:
    save(tmp_path / "films" / "a.png")
    mask = save(tmp_path / "films" / name)
    with pytest.raises(DataError, match=r"1 of the images below it look like masks .*Name a folder with images only"):
        read_image_set((tmp_path / "films",), "train")
    assert read_image_set((mask,), "train").images[0].path == mask, "a file that is named itself is taken"


def test_a_folder_of_masks_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "set" / "masks" / "a.png")
    with pytest.raises(DataError, match="look like masks"):
        read_image_set((tmp_path / "set" / "masks",), "train")


@pytest.mark.parametrize("layout", WRITERS)
def test_the_parent_of_a_data_set_is_refused(layout: str, data_set: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(data_set(layout), tmp_path / "parent" / "set")
    with pytest.raises(DataError, match=r"is not a data set but contains one in .*set\. Name that folder"):
        read_image_set((tmp_path / "parent",), "train")


def test_a_split_that_is_missing_is_an_error_that_names_those_there_are(tmp_path: Path) -> None:
    folder = flat(tmp_path / "set", [("train", "a"), ("val", "b")])
    with pytest.raises(DataError, match=r"no rows of split 'test'; its splits: train, val\."):
        read_image_set((folder,), "test")


@pytest.mark.parametrize(("held", "wanted", "taken"), [("train", "test", True), ("val", "train", True),
                                                       ("test", "train", False)])  # fmt: skip
def test_a_single_split_is_taken_for_another_but_test_rows_never_calibrate(
    held: str, wanted: str, taken: bool, tmp_path: Path
) -> None:
    folder = flat(tmp_path / "set", [(held, "a"), (held, "b")])
    if not taken:
        with pytest.raises(DataError, match=r"no rows of split 'train'; its splits: test\."):
            read_image_set((folder,), wanted)
        return
    found = read_image_set((folder,), wanted)
    assert (len(found.images), found.sources[0].split) == (2, held)


def test_a_folder_that_cannot_be_a_source_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="has no image"):
        read_image_set((tmp_path / "empty",), "train")
    with pytest.raises(ImageError, match="does not exist"):
        read_image_set((tmp_path / "nowhere",), "train")
    with pytest.raises(UsageError, match="not a regular expression"):
        read_image_set((save(tmp_path / "a.png"),), "train", DataSetOptions(subject_pattern="("))
    (tmp_path / "both" / "anns").mkdir(parents=True)
    (tmp_path / "both" / "anns" / "test.json").write_text(json.dumps([]))
    (tmp_path / "both" / "table.csv").touch()
    with pytest.raises(DataError, match=r"looks like several layouts: medvlsm, flat\. Name one with --layout"):
        read_image_set((tmp_path / "both",), "test")


def test_a_limit_takes_as_many_patients_as_it_can(tmp_path: Path) -> None:
    """Three patients with six images and three more with one each: six images are of six patients."""
    owners = ["a"] * 6 + ["b"] * 6 + ["c"] * 6 + ["d", "e", "f"]
    found = read_image_set((flat(tmp_path / "set", [("test", owner) for owner in owners]),), "test")
    six = found.limited(6)
    assert sorted(str(image.patient) for image in six.images) == list("abcdef")
    assert {image.path for image in six.images} < {image.path for image in found.limited(9).images}
    assert len(found.limited(100).images) == len(owners)


def test_the_same_file_named_twice_is_one_image(tmp_path: Path) -> None:
    folder = flat(tmp_path / "set", [("test", "a")])
    found = read_image_set((folder, folder / "images" / "0.png"), "test")
    assert found.images == (SetImage(folder / "images" / "0.png", ("lower left lung",), "a"),)
    assert [source.images for source in found.sources] == [1, 1]
    assert len(ImageSet((*found.images, *found.images), ()).by_hash()) == 1
