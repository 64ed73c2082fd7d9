"""Reading the flat layout, and its error messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.datasets.flat import read_flat
from cclip_deploy.datasets.options import DataSetOptions
from cclip_deploy.datasets.sample import Sample, of_split
from cclip_deploy.errors import DataError, UsageError


@pytest.fixture
def write_table(tmp_path: Path) -> Callable[[str], Path]:
    """Two pictures a.png and b.png of 8x6 (width x height), their masks ma.png and mb.png, and the table given."""
    for name in ("a.png", "b.png", "ma.png", "mb.png"):
        Image.fromarray(np.zeros((6, 8), np.uint8)).save(tmp_path / name)
    Image.fromarray(np.zeros((8, 6), np.uint8)).save(tmp_path / "turned.png")

    def write(text: str) -> Path:
        (tmp_path / "table.csv").write_text(text, encoding="utf-8")
        return tmp_path

    return write


def test_all_columns_in_any_order_with_quotes_and_byte_order_mark(write_table: Callable[[str], Path]) -> None:
    folder = write_table(
        '\ufeffsubject,text,mask,image,split\np1,"left, lower",ma.png,a.png,val\np2,right,mb.png,b.png,test\n'
    )
    assert read_flat(folder) == [
        Sample(folder / "a.png", folder / "ma.png", "left, lower", "val", "p1"),
        Sample(folder / "b.png", folder / "mb.png", "right", "test", "p2"),
    ]


def test_without_split_and_subject_rows_train_and_images_are_subjects(write_table: Callable[[str], Path]) -> None:
    folder = write_table("image,mask,text\na.png,ma.png,left\na.png,mb.png,right\n\n")
    assert [(r.text, r.split, r.subject) for r in read_flat(folder)] == [
        ("left", "train", "a.png"),
        ("right", "train", "a.png"),
    ]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("", "is empty"),
        ("image,mask,text\n", "is empty"),
        ("image,mask,text,splt\na.png,ma.png,left,val\n", "row 1: column 'splt' looks like the split. Give --column"),
        ("image,mask\na.png,ma.png\n", "row 1: column 'text' is missing"),
        ("image,mask,text,text\na.png,ma.png,x,y\n", "row 1: column 'text' is repeated"),
        ("image,mask,text\na.png,ma.png,left\nc.png,ma.png,left\n", r"row 3: image .*c\.png does not exist"),
        ("image,mask,text\na.png,ma.png,left\nb.png,none.png,left\n", r"row 3: mask .*none\.png does not exist"),
        ("image,mask,text\na.png,turned.png,left\n", "row 2: mask .* is 6x8 pixels, its image 8x6"),
        ("image,mask,text\na.png,ma.png,\n", "row 2: text is empty"),
        ("image,mask,text\na.png,ma.png,lower, left\n", "row 2 has 4 fields, the header 3"),
        ("image,mask,text,split\na.png,ma.png,left,holdout\n", "row 2: unknown split 'holdout'"),
        ("image,mask,text\na.png,ma.png,left\na.png,mb.png,left\n", r"row 3: a\.png has the text 'left' in row 2 too"),
        ('image,mask,text\na.png,ma.png,"left\n', "cannot be read as a CSV table"),
        ("image,mask,text\ntable.csv,ma.png,left\n", r"row 2: image: .*table\.csv is not a complete PNG"),
    ],
)
def test_a_mistake_is_named_with_its_row(write_table: Callable[[str], Path], table: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_flat(write_table(table))


def test_a_folder_must_hold_one_table(tmp_path: Path, write_table: Callable[[str], Path]) -> None:
    with pytest.raises(DataError, match="no data-set folder"):
        read_flat(tmp_path / "nowhere")
    with pytest.raises(DataError, match="found: none"):
        read_flat(tmp_path)
    (write_table("image,mask,text\na.png,ma.png,left\n") / "other.csv").touch()
    with pytest.raises(DataError, match=r"found: other\.csv, table\.csv\. Choose one with --table other\.csv or"):
        read_flat(tmp_path)
    assert len(read_flat(tmp_path, DataSetOptions(table="table.csv"))) == 1


def test_of_split_refuses_a_split_without_rows() -> None:
    row = Sample(Path("a"), Path("b"), "left", "train", "s")
    assert of_split([row], "train") == [row]
    with pytest.raises(DataError, match="its splits: train"):
        of_split([row], "val")


def test_json_lines_read_as_the_table_does(write_table: Callable[[str], Path]) -> None:
    folder = write_table("image,mask,text\na.png,ma.png,left\n")
    (folder / "table.csv").unlink()
    (folder / "rows.jsonl").write_text(
        '{"image": "a.png", "mask": "ma.png", "text": "left, lower", "split": "val", "subject": "p1"}\n\n'
        '{"text": "right", "image": "b.png", "mask": "mb.png"}\n',
        encoding="utf-8",
    )
    assert read_flat(folder) == [
        Sample(folder / "a.png", folder / "ma.png", "left, lower", "val", "p1"),
        Sample(folder / "b.png", folder / "mb.png", "right", "train", "b.png"),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "is empty"),
        ("{", "row 2 cannot be read as JSON"),
        ("[" * 100_000, "row 2 cannot be read as JSON"),
        ("[1]", "row 2 is a list"),
        ('{"image": "a.png", "mask": "ma.png", "text": 3}', "row 2: text is 3"),
        ('{"image": "a.png", "mask": "ma.png", "text": "x", "text": "y"}', "row 2: 'text' is repeated"),
        ('{"image": "a.png", "mask": "ma.png"}', "row 2: column 'text' is missing"),
        ('{"image": "a.png", "mask": "ma.png", "text": "x", "splt": "3"}', "row 2: column 'splt' looks like the split"),
    ],
    ids=range(8),
)
def test_a_mistake_in_json_lines_is_named_with_its_line(
    write_table: Callable[[str], Path], line: str, words: str
) -> None:
    folder = write_table("")
    (folder / "table.csv").unlink()
    (folder / "rows.jsonl").write_text("\n" + line, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        read_flat(folder)


def test_the_subject_comes_from_the_column_or_from_the_name(write_table: Callable[[str], Path]) -> None:
    folder = write_table("image,mask,text\na.png,ma.png,left\n")
    (folder / "a.png").rename(folder / "case-12_slice-3.png")
    (folder / "table.csv").write_text("image,mask,text\ncase-12_slice-3.png,ma.png,left\n")
    assert read_flat(folder)[0].subject == "case-12_slice-3.png"
    assert read_flat(folder, DataSetOptions(subject_pattern=r"case-\d+"))[0].subject == "case-12"
    assert read_flat(folder, DataSetOptions(subject_pattern=r"case-(\d+)"))[0].subject == "12"
    with pytest.raises(UsageError, match="not a regular expression"):
        read_flat(folder, DataSetOptions(subject_pattern="case-("))
