"""Malicious tables, annotations and configs are refused with one error before they take time or memory.

Before: 42 kB of xlsx took 2.1 GB, a cell in row 2·10⁹ all of 4 GB; 60,000 columns took 25 s, as names were counted by
comparing each with all; a pipe named train.json or recipe.toml was waited for without an end; a path of 5,000 letters
and deeply nested TOML gave a traceback; a table named /etc/passwd or ../../other as an image, which was then opened;
evaluate's CSV held `=HYPERLINK(…)` as a formula.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openpyxl
import pytest
from PIL import Image

from cclip_deploy.ablation.plan import read_plan
from cclip_deploy.common.csv_text import csv_text
from cclip_deploy.common.json_file import parse_json, read_json
from cclip_deploy.common.limits import LONGEST_CELL, MOST_CELLS, MOST_ROWS
from cclip_deploy.common.toml_file import read_document
from cclip_deploy.datasets import tables
from cclip_deploy.datasets import workbook as workbook_module
from cclip_deploy.datasets.lvit import read_described
from cclip_deploy.datasets.options import DataSetOptions
from cclip_deploy.datasets.reading import read_data_set
from cclip_deploy.datasets.tables import read_table
from cclip_deploy.engines.profile import read_profile
from cclip_deploy.errors import CclipError, DataError, UsageError
from cclip_deploy.train.config import TrainConfig
from tests.attacks.memory import within
from tests.attacks.steps import counted_lines
from tests.cli.run import invoke

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
RELATION = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006/relationships"


def workbook(path: Path, rows: str, shared: str = "", **parts: str) -> Path:
    """A workbook of one sheet, whose rows are XML, as compressed as it gets."""
    relations = {
        "_rels/.rels": [("officeDocument", "xl/workbook.xml")],
        "xl/_rels/workbook.xml.rels": [("worksheet", "worksheets/sheet1.xml"), ("sharedStrings", "sharedStrings.xml")],
    }
    types = "http://schemas.openxmlformats.org/package/2006/content-types"
    kinds = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    contents = {
        name: f'<Relationships xmlns="{PACKAGE}">'
        + "".join(f'<Relationship Id="r{n}" Type="{RELATION}/{t}" Target="{p}"/>' for n, (t, p) in enumerate(held))
        + "</Relationships>"
        for name, held in relations.items()
    } | {
        "[Content_Types].xml": f'<Types xmlns="{types}"><Default Extension="xml" ContentType="application/xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{kinds}.sheet.main+xml"/>'
        f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{kinds}.worksheet+xml"/>'
        f'<Override PartName="/xl/sharedStrings.xml" ContentType="{kinds}.sharedStrings+xml"/></Types>',
        "xl/workbook.xml": f'<workbook xmlns="{MAIN}" xmlns:r="{RELATION}"><sheets>'
        '<sheet name="a" sheetId="1" r:id="r0"/></sheets></workbook>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{MAIN}"><sheetData>{rows}</sheetData></worksheet>',
        "xl/sharedStrings.xml": f'<sst xmlns="{MAIN}">{shared}</sst>',
    } | parts  # fmt: skip
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


HEADER = '<row r="1"><c r="A1" t="str"><v>Image</v></c><c r="B1" t="str"><v>Description</v></c></row>'
ROW = '<row r="2"><c r="A2" t="s"><v>0</v></c><c r="B2" t="s"><v>1</v></c></row>'
SHARED = "<si><t>a.png</t></si><si><r><t xml:space='preserve'>left </t></r><r><t>lung</t></r></si>"

ENTITIES = (
    f"<!DOCTYPE a [<!ENTITY a '{'x' * 10_000}'>]><worksheet><sheetData><row><c t='str'><v>{'&a;' * 10_000}"
    "</v></c></row></sheetData></worksheet>"
)
BOMBS: dict[str, Callable[[Path], Path]] = {
    "a cell in row 2e9": lambda path: workbook(path, f'{HEADER}<row r="2000000000"><c t="str"><v>x</v></c></row>'),
    "wide rows": lambda path: workbook(
        path, HEADER + "".join(f'<row r="{n}"><c r="XFD{n}"><v>1</v></c></row>' for n in range(2, 40_000))
    ),
    "a wide row above many": lambda path: workbook(
        path, '<row><c r="XFD1"><v>1</v></c></row>' + "<row><c><v>1</v></c></row>" * 20_000
    ),
    "empty shared strings": lambda path: workbook(path, HEADER, "<si/>" * 4_000_000),
    "many cells in a row": lambda path: workbook(path, "<row>" + "<c/>" * 6_000_000 + "</row>"),
    "many rows": lambda path: workbook(path, "<row/>" * (MOST_ROWS + 1)),
    "a long cell": lambda path: workbook(path, f"{HEADER}<row><c t='str'><v>{'x' * 40_000_000}</v></c></row>"),
    "a part of 200 MB": lambda path: workbook(path, HEADER, " " * 200_000_000),
    "entities": lambda path: workbook(path, "", **{"xl/worksheets/sheet1.xml": ENTITIES}),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_workbook_that_is_a_bomb_is_refused_in_150_mib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bomb: str
) -> None:
    monkeypatch.setattr(workbook_module, "MOST_ELEMENTS", 100_000)  # a tenth, for the time of this test alone
    table = BOMBS[bomb](tmp_path / "Train_text.xlsx")
    assert table.stat().st_size < 500_000
    said = within(150, lambda: read_described(table))
    assert said.startswith("DataError: ")
    assert "Train_text.xlsx" in said
    assert "MemoryError" not in said


def test_a_workbook_reads_as_openpyxl_reads_it(tmp_path: Path) -> None:
    """Strings, numbers, truths, formulas, gaps and rich texts; openpyxl is the oracle."""
    book = openpyxl.Workbook()
    for row in [["Image", "Description", "n"], ["a.png", " left <lung> & ", 3], [None, None, 1.5], [None, "x", None]]:
        book.active.append(row)
    book.active["E6"] = "far"
    book.create_sheet("second").append(["not", "this"])
    book.save(tmp_path / "a.xlsx")
    expected = [
        ["" if cell is None else str(cell).strip() for cell in row]
        for row in openpyxl.load_workbook(tmp_path / "a.xlsx").worksheets[0].iter_rows(values_only=True)
    ]
    rows, width = workbook_module.read_sheet(tmp_path / "a.xlsx"), len(expected[0])
    assert [row + [""] * (width - len(row)) for row in rows] == expected
    hand_made = workbook(tmp_path / "b.xlsx", HEADER + ROW, SHARED)
    ((_, name, text),) = read_described(hand_made)
    assert (name, text) == ("a.png", "left lung")
    assert list(openpyxl.load_workbook(hand_made).active.iter_rows(values_only=True))[1] == ("a.png", "left lung")


CSV_BOMBS = {
    "commas": lambda: "Image,Description\n" + "," * (MOST_CELLS + 1),
    "a line": lambda: "Image,Description\n" + "x" * 3_000_000,
    "quoted lines": lambda: 'Image,Description\n"' + "x\n" * 300_000,
    "rows": lambda: "Image,Description\n" + "a,b\n" * (MOST_ROWS + 1),
    "an unfinished row over many lines": lambda: "Image,Description\n" + '"a\n",' * (MOST_CELLS // 2),
}


@pytest.mark.parametrize("bomb", CSV_BOMBS)
def test_a_csv_table_that_is_too_large_is_refused_in_400_mib(tmp_path: Path, bomb: str) -> None:
    table = tmp_path / "a.csv"
    table.write_text(CSV_BOMBS[bomb]())
    assert within(400, lambda: read_described(table)).startswith("DataError: ")


def test_a_sparse_table_of_gigabytes_is_refused_by_its_size(tmp_path: Path) -> None:
    for name in ("a.csv", "a.jsonl", "a.xlsx", "a.json", "a.toml"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**33)
        read = {"a.json": read_json, "a.toml": read_document}.get(name, read_table)
        with pytest.raises(DataError, match="8,589,934,592 bytes"):
            read(tmp_path / name)


class CountedName(str):
    """A text that counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        CountedName.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__

    def strip(self, *letters: str) -> CountedName:  # type: ignore[override]
        return self


def test_names_of_columns_are_compared_about_once_each(tmp_path: Path) -> None:
    """60,000 columns meant 3.6·10⁹ comparisons."""
    names = [CountedName(f"column {n}") for n in range(3000)]
    CountedName.compared = 0
    tables._make_rows(tmp_path / "a.csv", [names, ["x"] * 3000], "")
    assert CountedName.compared < 4 * 3000


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, "[" + "[]," * 3_000_000 + "0]", "1" * 10_000, "\ud800{"])
def test_json_that_is_a_bomb_is_refused(text: str) -> None:
    assert within(300, lambda: parse_json(text, "here")).startswith("DataError: here ")


TOML_BOMBS = [
    f"a = {DEEP}",
    "a" + ".a" * 20_000 + " = 1",
    "[" + ".".join(["'a'"] * 20_000) + "]",
    "a = '",
    "\0",
    "=" * 99,
]


@pytest.mark.parametrize("text", TOML_BOMBS, ids=range(len(TOML_BOMBS)))
@pytest.mark.parametrize("read", [TrainConfig.from_toml, read_plan, read_profile])
def test_toml_that_is_a_bomb_is_a_usage_error(tmp_path: Path, read: Callable[[Path], object], text: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    with counted_lines() as steps, pytest.raises(UsageError, match=r"a\.toml"):
        read(tmp_path / "a.toml")
    assert steps[0] < 500_000


def test_a_long_word_in_toml_is_searched_for_long_keys_in_linear_time(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("a = '" + "b" * 200_000 + "'\n# " + "c.c " * 5000)
    assert read_document(tmp_path / "a.toml") == {"a": "b" * 200_000}


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_regular_file_is_never_waited_for(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as bound:
                monkeypatch.chdir(path.parent)
                bound.bind(path.name)  # the whole path is too long for a socket
        else:
            path.symlink_to("/dev/zero")
        return path

    for name in ("a.csv", "a.xlsx", "a.jsonl"):
        with pytest.raises(DataError, match="not a regular file"):
            read_table(put(tmp_path / name))
    with pytest.raises(DataError, match="not a regular file"):
        read_json(put(tmp_path / "a.json"))
    for read in (TrainConfig.from_toml, read_plan, read_profile):
        with pytest.raises(UsageError, match="not a regular file"):
            read(put(tmp_path / f"{read.__name__}.toml"))
    (tmp_path / "set" / "Train_Folder" / "img").mkdir(parents=True)
    put(tmp_path / "set" / "Train_Folder" / "Train_text.csv")
    with pytest.raises(DataError, match="not a regular file"):
        read_data_set(tmp_path / "set")


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(path)
    return path


def flat(folder: Path, image: str, mask: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.jsonl").write_text(json.dumps({"image": image, "mask": mask, "text": "left lung"}))
    return folder


def medvlsm(folder: Path, image: str, mask: str) -> Path:
    (folder / "anns").mkdir(parents=True, exist_ok=True)
    for name in ("images", "masks"):
        (folder / name).mkdir(exist_ok=True)
    entry = {"img_name": image, "mask_name": mask, "prompts": {"p1": "left lung"}}
    (folder / "anns" / "test.json").write_text(json.dumps([entry]))
    return folder


@pytest.mark.parametrize("write", [flat, medvlsm])
@pytest.mark.parametrize("bad", ["image", "mask"])
@pytest.mark.parametrize("absolute", [True, False])
def test_a_table_that_names_a_file_outside_its_folder_is_refused_unless_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, str, str], Path], bad: str, absolute: bool
) -> None:
    secret = picture(tmp_path / "secret.png")
    folder = tmp_path / "set"
    up = "../secret.png" if write is flat else "../../secret.png"
    names = {"image": "a.png", "mask": "a.png", bad: str(secret) if absolute else up}
    write(folder, names["image"], names["mask"])
    for place in ("", "images", "masks"):
        picture(folder / place / "a.png")
    assert len(read_data_set(folder, DataSetOptions(allow_outside=True)).samples) == 1

    def never(path: Path, mode: str = "r", *rest: object, **more: object) -> object:
        assert path.resolve() != secret.resolve(), "the file was opened"
        return real(path, mode, *rest, **more)  # type: ignore[arg-type]

    real = Path.open
    monkeypatch.setattr(Path, "open", never)
    with pytest.raises(DataError, match=r"is outside the data set's folder .* --allow-outside"):
        read_data_set(folder)


@pytest.mark.parametrize("write", [flat, medvlsm])
@pytest.mark.parametrize("name", ["x" * 5000, "x/" * 2500, "a\0b.png", "\ud800.png", ".", "a.png/b.png"])
def test_a_name_that_no_file_can_have_is_one_error(
    tmp_path: Path, write: Callable[[Path, str, str], Path], name: str
) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(DataError) as caught:
        read_data_set(write(tmp_path, name, "a.png"))
    assert len(str(caught.value)) < 2000


def test_each_command_that_reads_a_data_set_has_the_option(tiny_bundle_path: Path, tmp_path: Path) -> None:
    """The table's one row names files outside; with the option what is missed is something else."""
    pytest.importorskip("lightning")
    folder = flat(tmp_path / "set", str(picture(tmp_path / "a.png")), "../a.png")
    (tmp_path / "a.toml").write_text('model = "tiny"\nimage_size = 64\n')
    few = ("--calibration", folder, "--int8", "--graph", "image_encoder")
    tuning = ("--evaluation-set", folder, "--precision", "fp16")
    for command in (
        ("data", folder, "--bundle", tiny_bundle_path),
        ("evaluate", tiny_bundle_path, folder, "--split", "test", "--threads", "1"),
        ("train", tmp_path / "a.toml", "--data", folder, "-o", tmp_path / "run", "--dry-run"),
        ("build-engine", tiny_bundle_path, *few),
        ("tune-precision", tiny_bundle_path, *tuning, "-o", tmp_path / "tuned.toml"),
    ):
        refused, allowed = invoke(*command), invoke(*command, "--allow-outside")
        assert refused.exit_code == 6, command
        assert "is outside the data set's folder" in refused.stderr
        assert "is outside the data set's folder" not in allowed.stderr


FORMULAS = ['=HYPERLINK("http://x","y")', "+1", "-2+3", "@SUM(A1)", "\t=1", "|cmd", "＝1"]


@pytest.mark.parametrize("cell", FORMULAS)
def test_a_text_that_a_spreadsheet_would_run_is_quoted(cell: str) -> None:
    ((shown, number, text),) = csv.reader(io.StringIO(csv_text([(cell, -0.5, "left lung")])))
    assert shown == (f"'{cell}" if cell not in ("|cmd",) else cell)
    assert (number, text) == ("-0.5", "left lung")


def test_csv_is_written_in_one_place() -> None:
    root = Path(__file__).parents[2]
    sources = [p for name in ("cclip_deploy", "benchmarks", "engines", "training") for p in (root / name).rglob("*.py")]
    writers = [path.name for path in sources if re.search(r"csv\.(writer|DictWriter)", path.read_text())]
    assert writers == ["csv_text.py"]


def test_the_commands_say_it_in_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.toml")
    for command in (("train", tmp_path / "a.toml"), ("ablate", tmp_path / "a.toml"), ("data", tmp_path / ("x" * 5000))):
        done = invoke(*command)
        assert done.exit_code in (2, 6)
        assert isinstance(done.exception, SystemExit)
        assert done.stderr.splitlines()[-1].startswith("Error: ")
        assert isinstance(done.exception.__cause__, CclipError)
        assert len(done.stderr.splitlines()[-1]) < 2000
    assert LONGEST_CELL < 10**6


@pytest.mark.parametrize("name", ["..\\secret.png", "C:\\secret.png", "\\\\server\\share\\a.png", "a\\..\\..\\b.png"])
@pytest.mark.parametrize("write", [flat, medvlsm])
def test_a_windows_path_that_leaves_the_folder_is_refused(
    tmp_path: Path, write: Callable[[Path, str, str], Path], name: str
) -> None:
    picture(tmp_path / "secret.png")
    folder = write(tmp_path / "set", name, "a.png")
    with pytest.raises(DataError, match=r"is outside the data set's folder .* --allow-outside"):
        read_data_set(folder)
