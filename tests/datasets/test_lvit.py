"""LViT's and LanGuideMedSeg's layouts, as published and with every mistake that was thought of."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import openpyxl
import pytest
from PIL import Image

from cclip_deploy.datasets import workbook
from cclip_deploy.datasets.lvit import read_languidemedseg, read_lvit
from cclip_deploy.datasets.reading import find_layout
from cclip_deploy.errors import DataError

Rows = Sequence[Sequence[object]]
HEADER = ("Image", "Description")


def draw(path: Path, width: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((6, width), np.uint8)).save(path)


def write_xlsx(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(list(row))
    book.save(path)


@pytest.fixture
def lvit(tmp_path: Path) -> Callable[[Rows], Path]:
    """A training folder of two films, and the table given."""
    for name in ("a", "b"):
        draw(tmp_path / f"Train_Folder/img/{name}.png")
        draw(tmp_path / f"Train_Folder/labelcol/mask_{name}.png")

    def write(rows: Rows) -> Path:
        write_xlsx(tmp_path / "Train_Folder/Train_text.xlsx", rows)
        return tmp_path

    return write


def test_qata_with_one_table_for_training_and_validation(tmp_path: Path) -> None:
    """Masks are mask_<image> or of the image's own name, which says the patient; a row goes where its mask is."""
    for split, name, mask in (
        ("Train", "sub-S01_ses-E1.png", "mask_sub-S01_ses-E1.png"),
        ("Val", "sub-S02_ses-E1.png", "sub-S02_ses-E1.png"),
        ("Test", "sub-S01_ses-E9.png", "mask_sub-S01_ses-E9.png"),
    ):
        draw(tmp_path / f"{split}_Folder/img/{name}")
        draw(tmp_path / f"{split}_Folder/labelcol/{mask}")
    both = [HEADER, ("sub-S02_ses-E1.png", "second"), ("mask_sub-S01_ses-E1.png", "first")]
    write_xlsx(tmp_path / "Train_Folder/Train_Val_text.xlsx", both)
    write_xlsx(tmp_path / "Test_Folder/Test_text.xlsx", [HEADER, ("mask_sub-S01_ses-E9.png", "third"), (None, None)])
    read = read_lvit(tmp_path)
    assert [(r.image.name, r.mask.name, r.text, r.split, r.subject) for r in read] == [
        ("sub-S02_ses-E1.png", "sub-S02_ses-E1.png", "second", "val", "sub-S02"),
        ("sub-S01_ses-E1.png", "mask_sub-S01_ses-E1.png", "first", "train", "sub-S01"),
        ("sub-S01_ses-E9.png", "mask_sub-S01_ses-E9.png", "third", "test", "sub-S01"),
    ]
    assert read[0].image.parent == tmp_path / "Val_Folder/img"


def test_mosmed_with_a_table_for_each_split_as_they_are_named_there(tmp_path: Path) -> None:
    for split, name in (("Train", "Morozov_study_0255_30"), ("Val", "Jun_radiopaedia_40_86625_0_case19_56")):
        draw(tmp_path / f"{split}_Folder/img/{name}.jpg")
        draw(tmp_path / f"{split}_Folder/labelcol/{name}.png")
        table = [("", "description ", "Image"), (0, "text of " + split, f"{name}.png")]
        write_xlsx(tmp_path / f"{split}_Folder/{split}_text_MosMedData+ 1.xlsx", table)
    assert [(r.image.name, r.text, r.split, r.subject) for r in read_lvit(tmp_path)] == [
        ("Morozov_study_0255_30.jpg", "text of Train", "train", "Morozov_study_0255"),
        ("Jun_radiopaedia_40_86625_0_case19_56.jpg", "text of Val", "val", "Jun_radiopaedia_40_86625_0_case19"),
    ]


def test_a_csv_beside_the_folders_does_as_well(lvit: Callable[[Rows], Path]) -> None:
    folder = lvit([HEADER])
    (folder / "Train_Folder/Train_text.xlsx").unlink()
    (folder / "Train_text.csv").write_text('Image,Description\nmask_a.png,"one, two"\n')
    assert [r.text for r in read_lvit(folder)] == ["one, two"]
    assert find_layout(folder) == "lvit"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "is empty"),
        ([HEADER], "is empty"),
        ([("Image", "Words"), ("mask_a.png", "x")], "column 'text' is missing; its columns are Image, Words"),
        ([HEADER, ("mask_a.png", None)], "row 2: Description is empty"),
        ([HEADER, ("mask_a.png", "x"), ("mask_a.png", "y")], r"row 3: mask_a\.png is in .*row 2 too"),
        ([HEADER, *((f"c{n}.png", "x") for n in range(9)), ("mask_a.png", "y")],
         r"9 of 10 rows name masks that are not in .*labelcol: c0\.png, c1\.png, c2\.png and 6 more"),
        ([HEADER, ("../../mask_a.png", "x")], "not in"),
        ([("Image", "Image", "Description"), ("a", "b", "c")], "'Image' is repeated"),
    ],
    ids=range(8),
)  # fmt: skip
def test_a_mistake_in_the_table_is_named(lvit: Callable[[Rows], Path], rows: Rows, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_lvit(lvit(rows))


def test_missing_and_ambiguous_images_and_masks_of_another_size_are_named(lvit: Callable[[Rows], Path]) -> None:
    folder = lvit([HEADER, ("mask_a.png", "x")])
    draw(folder / "Train_Folder/labelcol/mask_a.png", width=9)
    with pytest.raises(DataError, match=r"row 2: mask .* is 9x6 pixels, its image 8x6"):
        read_lvit(folder)
    (folder / "Train_Folder/img/a.png").unlink()
    with pytest.raises(DataError, match=r"row 2: mask mask_a\.png has no image; expected a\.png"):
        read_lvit(folder)
    for suffix in ("jpg", "bmp"):
        draw(folder / f"Train_Folder/img/a.{suffix}")
    with pytest.raises(DataError, match=r"may belong to a\.bmp, a\.jpg"):
        read_lvit(folder)
    (folder / "Train_Folder/labelcol/mask_a.png").unlink()
    with pytest.raises(DataError, match=r"1 of 1 rows name masks that are not in"):
        read_lvit(folder)


def test_missing_folders_and_missing_or_several_tables_are_named(lvit: Callable[[Rows], Path]) -> None:
    folder = lvit([HEADER, ("mask_a.png", "x")])
    draw(folder / "Test_Folder/img/c.png")
    with pytest.raises(DataError, match=r"Test_Folder has no table\. Put Test_text\.xlsx"):
        read_lvit(folder)
    write_xlsx(folder / "Test_Folder/Test_text.xlsx", [HEADER, ("c.png", "x")])
    with pytest.raises(DataError, match=r"no folder .*labelcol"):
        read_lvit(folder)
    write_xlsx(folder / "Train_Folder/Train_Val_text.xlsx", [HEADER, ("mask_a.png", "x")])
    with pytest.raises(DataError, match="'train' has several tables"):
        read_lvit(folder)


def test_a_workbook_with_a_wrong_extent_is_read_to_its_end(lvit: Callable[[Rows], Path]) -> None:
    folder = lvit([HEADER, ("mask_a.png", "x"), ("mask_b.png", "y")])
    table = folder / "Train_Folder/Train_text.xlsx"
    with zipfile.ZipFile(table) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    sheet = parts["xl/worksheets/sheet1.xml"]
    assert b'<dimension ref="A1:B3"' in sheet
    parts["xl/worksheets/sheet1.xml"] = sheet.replace(b'"A1:B3"', b'"A1"')
    with zipfile.ZipFile(table, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    assert [r.text for r in read_lvit(folder)] == ["x", "y"]


def test_hidden_files_of_macos_are_no_images(lvit: Callable[[Rows], Path]) -> None:
    folder = lvit([HEADER, ("mask_a.png", "x")])
    (folder / "Train_Folder/img/._a.png").write_bytes(b"Mac OS X")
    (folder / "Train_Folder/labelcol/._mask_a.png").write_bytes(b"Mac OS X")
    assert [r.image.name for r in read_lvit(folder)] == ["a.png"]


def test_a_workbook_that_cannot_be_read_is_named(lvit: Callable[[Rows], Path]) -> None:
    folder = lvit([HEADER, ("mask_a.png", "x")])
    table = folder / "Train_Folder/Train_text.xlsx"
    whole = table.read_bytes()
    table.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read as an Excel workbook"):
        read_lvit(folder)
    table.write_text("Image,Description\n")
    with pytest.raises(DataError, match="cannot be read as an Excel workbook"):
        read_lvit(folder)
    with zipfile.ZipFile(table, "w") as archive:
        archive.writestr("hello.txt", "no workbook")
    with pytest.raises(DataError, match="cannot be read as an Excel workbook"):
        read_lvit(folder)


def test_a_workbook_that_unpacks_to_too_much_is_refused(
    lvit: Callable[[Rows], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lvit([HEADER, ("mask_a.png", "x")])
    assert len(read_lvit(folder)) == 1
    monkeypatch.setattr(workbook, "LARGEST_TABLE", 1000)
    with pytest.raises(DataError, match=r"unpacks to .* limits are 1,000 bytes"):
        read_lvit(folder)


def test_languidemedseg_validates_on_the_last_fifth_in_file_order(tmp_path: Path) -> None:
    names = [f"sub-S{n}_x.png" for n in (5, 3, 9, 1, 7, 2)]
    for name in names:
        draw(tmp_path / f"Train/Images/{name}")
        draw(tmp_path / f"Train/GTs/mask_{name}")
    draw(tmp_path / "Test/Images/sub-S8_x.png")
    draw(tmp_path / "Test/GTs/sub-S8_x.png")
    (tmp_path / "prompt").mkdir()
    rows = "".join(f"mask_{name},text {n}\n" for n, name in enumerate(names))
    (tmp_path / "prompt/train.csv").write_text("Image,Description\n" + rows)
    (tmp_path / "prompt/test.csv").write_text("Image,Description\nsub-S8_x.png,held out\n")
    read = read_languidemedseg(tmp_path)
    assert [(r.image.name, r.split) for r in read] == [
        *((name, "train") for name in names[:4]), *((name, "val") for name in names[4:]), ("sub-S8_x.png", "test"),
    ]  # fmt: skip
    assert (read[0].mask.name, read[0].text, read[0].subject) == ("mask_sub-S5_x.png", "text 0", "sub-S5")
    (tmp_path / "Train/GTs" / f"mask_{names[5]}").unlink()
    with pytest.raises(DataError, match=r"1 of 2 rows name masks that are not in .*GTs"):
        read_languidemedseg(tmp_path)
