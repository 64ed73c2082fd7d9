"""Data sets in the forms that people have: each is read, or refused with the option that reads it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openpyxl
import pytest
from PIL import Image, ImageDraw

from cclip_deploy.cli.options import DataSets
from cclip_deploy.datasets.reading import read_data_set
from cclip_deploy.errors import DataError

SIDE = 48
DISC = (12, 8, 35, 31)
ROWS = (
    ("images/a.png", "masks/a", "Größe, Lunge links", "train", "p1"),
    ("images/a.png", "masks/b", "übrig; Lunge rechts", "train", "p1"),
    ("images/b.png", "masks/c", "Thorax", "val", "p2"),
    ("images/c.png", "masks/d", "kein Befund", "test", "p3"),
)
Row = tuple[str, str, str, str, str]
COLUMNS = ("image", "mask", "text", "split", "subject")
Inside = np.ndarray


def disc(number: int) -> Inside:
    """A disc for each row, with hard edges."""
    shift = 3 * number
    drawn = Image.new("1", (SIDE, SIDE))
    ImageDraw.Draw(drawn).ellipse(tuple(place + shift for place in DISC), fill=1)
    return np.asarray(drawn)


def gray(inside: Inside, value: int = 255) -> Image.Image:
    return Image.fromarray(inside.astype(np.uint8) * np.uint8(value))


def colored(inside: Inside, color: tuple[int, ...], ground: tuple[int, ...]) -> Image.Image:
    return Image.fromarray(np.where(inside[..., None], color, ground).astype(np.uint8))


def palette(inside: Inside) -> Image.Image:
    image = Image.fromarray(inside.astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 0, 128, 0])
    return image


def white_first(inside: Inside) -> Image.Image:
    """A palette whose entry 0 is red, the inside, and whose entry 1 is black."""
    image = Image.fromarray((~inside).astype(np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 0, 0])
    return image


def soft(inside: Inside) -> Image.Image:
    """An anti-aliased mask: four times the size, reduced; the disc is the one of `disc` up to its edge."""
    large = gray(inside).resize((4 * SIDE, 4 * SIDE), Image.Resampling.BICUBIC)
    return large.resize((SIDE, SIDE), Image.Resampling.BOX)


def with_second(inside: Inside, first: object, second: object, ground: object) -> Image.Image:
    """Another structure in the corner, of another value or color."""
    corner = np.zeros_like(inside)
    corner[-6:, :6] = True
    shape = inside[..., None] if isinstance(first, tuple) else inside
    corner = corner[..., None] if isinstance(first, tuple) else corner
    return Image.fromarray(np.where(corner, second, np.where(shape, first, ground)).astype(np.uint8))


def ramp(inside: Inside) -> Image.Image:
    """A probability map: 250 to 128 inside, 127 to 0 outside, smooth everywhere."""
    steps = np.linspace(0, 1, SIDE)
    return Image.fromarray(np.where(inside, 128 + 122 * steps, 127 * steps).astype(np.uint8))


@dataclass(frozen=True)
class Form:
    """How a data set is written, and the option without which it is refused."""

    columns: Sequence[str] = COLUMNS
    delimiter: str = ","
    encoding: str = "utf-8"
    table: str = "table.csv"
    first_line: str = ""
    mask: Callable[[Inside], Image.Image] = gray
    mask_suffix: str = ".png"
    prompt: str = ""
    change: Callable[[Row], tuple[str, ...]] = lambda row: row
    more: str = ""
    option: str = ""
    says: str = ""
    """What the refusal says: the option itself, unless it cannot know the value or more of it is worth a check."""


def renamed(**names: str) -> tuple[str, ...]:
    return tuple(names.get(column, column) for column in COLUMNS)


def splits(train: str, val: str, test: str) -> Callable[[Row], Row]:
    names = {"train": train, "val": val, "test": test}
    return lambda row: (*row[:3], names[row[3]], row[4])


def windows_paths(row: Row) -> Row:
    return (row[0].replace("/", "\\"), row[1].replace("/", "\\"), *row[2:])


RED, GREEN, BLACK, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 0), (255, 255, 255)
FORMS: dict[str, Form] = {
    # Encodings and delimiters
    "as documented": Form(),
    "utf-8 with a mark": Form(encoding="utf-8-sig"),
    "utf-16 of Excel's Unicode text": Form(encoding="utf-16", delimiter="\t", table="table.txt"),
    "utf-16 big endian": Form(encoding="utf-16-be", first_line="\ufeff"),
    "utf-16 without a mark": Form(encoding="utf-16-le"),
    "latin-1": Form(encoding="latin-1"),
    "latin-1 with semicolons": Form(encoding="latin-1", delimiter=";"),
    "windows-1252 with its own quotes": Form(encoding="cp1252", prompt="l’œuf – naïf"),
    "czech in windows-1250": Form(
        encoding="cp1250", prompt="ľavá plíce", option="--encoding cp1250", says="--encoding, such as cp1250"
    ),
    "russian in windows-1251": Form(
        encoding="cp1251", prompt="левое лёгкое", option="--encoding cp1251", says="--encoding, such as cp1250, cp1251"
    ),
    "mac roman": Form(
        encoding="mac-roman", prompt="détaché", option="--encoding mac-roman", says=", mac-roman, "
    ),
    "japanese in shift-jis": Form(
        encoding="shift-jis", prompt="左肺の影", option="--encoding shift-jis", says=", shift-jis "
    ),
    "semicolons": Form(delimiter=";"),
    "tabs": Form(delimiter="\t"),
    "tsv": Form(delimiter="\t", table="table.tsv"),
    "txt with pipes": Form(delimiter="|", table="rows.txt"),
    "Excel's sep=;": Form(delimiter=";", first_line="sep=;\n", encoding="cp1252"),
    "Excel's sep=tab": Form(delimiter="\t", first_line="sep=\t\n"),
    "xlsx": Form(table="table.xlsx"),
    "JSON Lines": Form(table="table.jsonl"),
    "a header that two delimiters divide": Form(columns=(*COLUMNS, "a;b"), change=lambda row: (*row, "")),
    "a table that two delimiters divide": Form(
        columns=(*COLUMNS, "a|b|c"), change=lambda row: (*row, "1|2|3"), delimiter=";", option="--delimiter semicolon"
    ),
    "a delimiter of its own": Form(delimiter="~", option="--delimiter '~'"),
    "empty rows and an empty column": Form(columns=(*COLUMNS, ""), more=",,,,,\n\n"),
    # Columns
    "Excel's capitals": Form(columns=("Image", "Mask", "Description", "Split", "Patient")),
    "paths": Form(columns=("image_path", "mask_path", "caption", "subset", "patient_id")),
    "filename and label": Form(columns=("filename", "label", "sentence", "set", "subject_id")),
    "words and spaces": Form(columns=("Image File", "Ground-Truth", "Report", "Phase", "Participant ID")),
    "columns of no use": Form(columns=("id", *COLUMNS, "age"), change=lambda row: ("7", *row, "80")),
    "two masks": Form(
        columns=("image", "label", "mask_path", "text", "split"), option="--column mask=mask_path",
        change=lambda row: (row[0], "lesion", row[1], row[2], row[3]),
    ),
    "two prompts": Form(
        columns=("image", "mask", "caption", "report", "split"), option="--column prompt=caption",
        change=lambda row: (*row[:3], "nothing", row[3]),
    ),
    "unknown names": Form(columns=renamed(image="xray"), option="--column image=xray", says="--column image=NAME"),
    "names with spaces": Form(
        columns=("image", "Mask file", "Label file", "text", "split"), option="--column 'mask=Mask file'",
        change=lambda row: (*row[:2], "x", *row[2:4]),
    ),
    "a misspelled split": Form(columns=renamed(split="splt"), option="--column split=splt"),
    # Splits and paths
    "Train, valid, Test": Form(change=splits("Train", "valid", "Test")),
    "training, validation, testing": Form(change=splits("training", "Validation", "testing")),
    "dev": Form(change=splits("TRAIN", "dev", "TEST")),
    "Windows paths": Form(change=windows_paths, delimiter=";", encoding="cp1252"),
    "several tables": Form(
        more="@other.csv", option="--table table.csv", says="--table other.csv or --table table.csv"
    ),
    # Masks
    "masks of 1": Form(mask=lambda inside: gray(inside, 1)),
    "bilevel masks": Form(mask=Image.fromarray),
    "16-bit masks": Form(mask=lambda inside: Image.fromarray(inside.astype(np.uint16) * np.uint16(65535))),
    "palette masks": Form(mask=palette),
    "palette masks that begin with the inside": Form(mask=white_first),
    "gray masks as RGB": Form(mask=lambda inside: gray(inside).convert("RGB")),
    "red on black": Form(mask=lambda inside: colored(inside, RED, BLACK)),
    "red on transparent": Form(mask=lambda inside: colored(inside, (*RED, 255), (0, 0, 0, 0))),
    "soft edges": Form(mask=soft),
    "JPEG masks": Form(mask=gray, mask_suffix=".jpg"),
    "label maps": Form(
        mask=lambda inside: with_second(inside, 1, 2, 0), option="--mask-value 1",
        says="2 values besides 0: 0 (79 %), 1 (19.4 %), 2 (1.56 %). A mask must be 0 outside and one other value "
        "inside. Say what is inside: --mask-value 1 or --mask-value 2 or --mask-value nonzero for all but 0;",
    ),
    "two colors": Form(
        mask=lambda inside: with_second(inside, RED, GREEN, BLACK), option="--mask-value '#ff0000'",
        says="3 colors: #000000 (79 %), #ff0000 (19.4 %), #00ff00 (1.56 %)",
    ),
    "red on white": Form(mask=lambda inside: colored(inside, RED, WHITE), option="--mask-value '#ff0000'"),
    "inside and outside 1 and 2": Form(
        mask=lambda inside: Image.fromarray(np.where(inside, 2, 1).astype(np.uint8)), option="--mask-value 2"
    ),
    "probability maps": Form(mask=ramp, option="--mask-value 128-255"),
}  # fmt: skip


def write_set(folder: Path, form: Form) -> list[tuple[Row, Inside]]:
    """Write a data set; return its rows as documented, with the masks that they mean."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    rows: list[tuple[Row, Inside]] = []
    for number, row in enumerate(ROWS):
        Image.fromarray(np.full((SIDE, SIDE), number, np.uint8)).save(folder / row[0])
        form.mask(disc(number)).save(folder / f"{row[1]}{form.mask_suffix}", quality=95)
        prompt = f"{form.prompt} {number}" if form.prompt else row[2]
        rows.append(((row[0], row[1] + form.mask_suffix, prompt, *row[3:]), disc(number)))
    lines = [form.columns, *(form.change(row) for row, _ in rows)]
    write_table(folder / form.table, form, lines)
    return rows


def write_table(path: Path, form: Form, lines: Sequence[Sequence[str]]) -> None:
    if path.suffix == ".xlsx":
        book = openpyxl.Workbook()
        for line in lines:
            book.active.append(list(line))
        book.save(path)
        return
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(dict(zip(lines[0], line, strict=True))) + "\n" for line in lines[1:])
    else:
        mark = form.delimiter
        fields = [[f'"{field}"' if mark in field or '"' in field else field for field in line] for line in lines]
        width = len(form.columns)
        text = "".join(mark.join([*line, *[""] * (width - len(line))]) + "\r\n" for line in fields)
    if form.more.startswith("@"):
        (path.parent / form.more[1:]).write_text("a,b\n1,2\n")
    else:
        text += form.more
    path.write_bytes((form.first_line + text).encode(form.encoding))


def options_of(option: str) -> DataSets:
    """Return the option group as the command line would make it of one option."""
    if not option:
        return DataSets()
    name, value = shlex.split(option)
    field = name.removeprefix("--").replace("-", "_")
    return DataSets(**{field: [value] if field in ("column", "mask_value") else value})


@pytest.mark.parametrize("name", FORMS)
def test_a_set_is_read_as_it_is_meant_or_refused_with_the_option_that_reads_it(tmp_path: Path, name: str) -> None:
    form = FORMS[name]
    expected = write_set(tmp_path / "set", form)
    if form.option:
        with pytest.raises(DataError) as refused:
            read_and_decode(tmp_path / "set", DataSets())
        assert (form.says or form.option) in str(refused.value)
    samples = read_and_decode(tmp_path / "set", options_of(form.option))
    assert len(samples) == len(expected)
    tolerated = 0.01 if name in ("soft edges", "JPEG masks") else 0
    patients = len(form.columns) != 5 or form.columns[-1] != "split"
    for (*read, inside), (row, drawn) in zip(samples, expected, strict=True):
        assert read == [row[0], *row[2:4], row[4] if patients else row[0]]
        assert np.mean(inside != drawn) <= tolerated


def read_and_decode(folder: Path, group: DataSets) -> list[tuple[str, str, str, str, Inside]]:
    samples = read_data_set(folder, group.options()).samples
    return [
        (s.image.relative_to(folder).as_posix(), s.text, s.split, s.subject, s.read_mask()) for s in samples
    ]  # fmt: skip
