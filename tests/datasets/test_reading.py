"""Every layout that the generator writes is detected and read back unchanged."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.datasets import writing
from cclip_deploy.datasets.mask_file import read_mask
from cclip_deploy.datasets.options import DataSetOptions
from cclip_deploy.datasets.reading import find_layout, read_data_set
from cclip_deploy.datasets.sample import of_split
from cclip_deploy.datasets.synthetic.generator import SyntheticOptions, make_samples, split_counts, write_dataset
from cclip_deploy.errors import DataError, EnvironmentIssue, UsageError

FOUND = {
    "flat": "flat", "jsonl": "flat", "qata": "lvit", "mosmed": "lvit",
    "languidemedseg": "languidemedseg", "medvlsm": "medvlsm",
}  # fmt: skip
COUNTS = {"train": 8, "val": 2, "test": 3}
HW = (32, 48)


def write(folder: Path, layout: str, **options: object) -> Path:
    write_dataset(folder / layout, COUNTS, HW, seed=5, layout=layout, **options)  # type: ignore[arg-type]
    return folder / layout


@pytest.mark.parametrize("layout", FOUND)
def test_a_written_layout_is_found_and_holds_what_was_drawn(tmp_path: Path, layout: str) -> None:
    data_set = read_data_set(write(tmp_path, layout))
    assert data_set.layout == FOUND[layout]
    assert set(FOUND) == set(writing.WRITERS)
    for number, split in enumerate(("train", "val", "test")):
        rows = of_split(data_set.samples, split)
        assert len(rows) == COUNTS[split]
        for film, row in enumerate(rows):
            drawn = make_samples(np.random.default_rng([5, number, film]), HW, 1)[0]
            assert row.text == drawn.prompt
            assert np.array_equal(read_mask(row.mask), drawn.mask)
            picture = np.asarray(Image.open(row.image), np.float32) / 255
            assert np.abs(picture - drawn.image).mean() < (0.02 if row.image.suffix == ".jpg" else 0.003)
    assert len({row.subject for row in data_set.samples}) == sum(COUNTS.values())
    assert data_set.repaired == ()


@pytest.mark.parametrize("layout", ["flat", "jsonl", "medvlsm"])
def test_several_prompts_an_image_are_several_rows(tmp_path: Path, layout: str) -> None:
    rows = read_data_set(write(tmp_path, layout, prompts_per_image=3)).samples
    images = [row.image for row in rows]
    assert 2 <= len(rows) / len(set(images)) <= 3
    assert len({(row.image, row.text) for row in rows}) == len(rows)


@pytest.mark.parametrize("layout", FOUND)
def test_typing_errors_are_repaired_and_reported_and_no_row_is_lost(tmp_path: Path, layout: str) -> None:
    right = read_data_set(write(tmp_path / "right", layout)).samples
    read = read_data_set(write(tmp_path / "wrong", layout, options=SyntheticOptions(typo_share=1.0)))
    assert [row.text for row in read.samples] == [row.text for row in right]
    assert [row for row, _ in read.repaired] == list(range(13))
    for row, prompt in read.repaired:
        assert prompt.written != prompt.text == read.samples[row].text
        assert len(prompt.repairs) >= 1


@pytest.mark.parametrize("layout", FOUND)
def test_the_same_seed_writes_the_same_bytes(tmp_path: Path, layout: str) -> None:
    one, same = (write(tmp_path / name, layout) for name in ("one", "same"))
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(same) for path in same.rglob("*") if path.is_file())
    assert all((one / file).read_bytes() == (same / file).read_bytes() for file in files)


def test_workbooks_do_not_hold_the_hour_of_writing(tmp_path: Path) -> None:
    with zipfile.ZipFile(write(tmp_path, "qata") / "Test_Folder/Test_text.xlsx") as book:
        assert {entry.date_time[0] for entry in book.infolist()} == {1980}
        assert b"dcterms" not in book.read("docProps/core.xml")


def test_published_names_are_those_of_the_data_sets(tmp_path: Path) -> None:
    qata, mosmed = write(tmp_path, "qata"), write(tmp_path, "mosmed")
    assert sorted(path.name for path in qata.rglob("*.xlsx")) == ["Test_text.xlsx", "Train_Val_text.xlsx"]
    masks = {path.name.startswith("mask_") for path in (qata / "Train_Folder/labelcol").iterdir()}
    assert masks == {True, False}, "some masks have the image's own name"
    tables = sorted(path.relative_to(mosmed).as_posix() for path in mosmed.rglob("*.xlsx"))
    assert tables == [f"{split}_Folder/{split}_text.xlsx" for split in ("Test", "Train", "Val")]
    assert {path.suffix for path in (mosmed / "Val_Folder/img").iterdir()} == {".jpg"}


@pytest.mark.parametrize("films", [5, 6, 11, 23, 500, 2729])
def test_images_are_split_as_languidemedseg_does(films: int) -> None:
    counts = split_counts(films)
    assert sum(counts.values()) == films
    assert min(counts.values()) >= 1
    assert counts["train"] == int(0.8 * (counts["train"] + counts["val"]))


@pytest.mark.parametrize("layout", FOUND)
def test_a_set_may_have_one_split_alone(tmp_path: Path, layout: str) -> None:
    write_dataset(tmp_path / "x", {"test": 2}, HW, 0, layout=layout)
    assert [row.split for row in read_data_set(tmp_path / "x").samples] == ["test", "test"]


def test_layouts_refuse_what_they_cannot_hold(tmp_path: Path) -> None:
    for layout in ("qata", "mosmed", "languidemedseg"):
        with pytest.raises(UsageError, match="one prompt per image"):
            write(tmp_path, layout, prompts_per_image=2)
    with pytest.raises(UsageError, match="leaves 5 for training, not 3"):
        write_dataset(tmp_path / "x", {"train": 3, "val": 4}, HW, 0, layout="languidemedseg")
    with pytest.raises(UsageError, match="Generate training images too"):
        write_dataset(tmp_path / "x", {"val": 4}, HW, 0, layout="qata")
    with pytest.raises(UsageError, match="Unknown layout 'coco'"):
        write(tmp_path, "coco")
    with pytest.raises(UsageError, match="too many"):
        write_dataset(tmp_path / "x", {"train": 30_001}, HW, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_no_or_of_two_layouts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the layouts.*anns/train\.json"):
        find_layout(tmp_path)
    with pytest.raises(DataError, match="no data-set folder"):
        read_data_set(tmp_path / "nowhere", DataSetOptions("flat"))
    folder = write(tmp_path, "flat")
    (folder / "Test_Folder").mkdir()
    with pytest.raises(DataError, match="several layouts: lvit, flat"):
        read_data_set(folder)
    assert len(read_data_set(folder, DataSetOptions("flat")).samples) == 13
    with pytest.raises(UsageError, match="Unknown layout 'coco'"):
        read_data_set(folder, DataSetOptions("coco"))
    with pytest.raises(DataError, match="no rows in the medvlsm layout"):
        read_data_set(folder, DataSetOptions("medvlsm"))


def test_writing_excel_tables_without_openpyxl_names_the_remedy_and_reading_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, "qata")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    assert read_data_set(folder).layout == "lvit"
    with pytest.raises(EnvironmentIssue, match=r"cclip-deploy\[evaluate\]"):
        write(tmp_path, "mosmed")
