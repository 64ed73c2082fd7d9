"""Encodings and delimiters that are detected, and those that are not guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from cclip_deploy.common.limits import MOST_CELLS
from cclip_deploy.datasets import tables
from cclip_deploy.datasets.encoding import find_encoding
from cclip_deploy.datasets.options import DataSetOptions
from cclip_deploy.datasets.tables import read_table
from cclip_deploy.errors import DataError

WESTERN = {
    "french": "opacité à gauche, l’œdème – « naïf »",
    "german": "Größe übrig, ÖDEM ß: Fläche 3 cm²",
    "spanish": "¿Lesión pulmonar? año, índice ±2 µm, 38 °C",
    "portuguese": "PULMÃO direito, lesões, coração",
    "nordic": "Åben læsion, høyre lunge, blåsa",
}
OTHERS = {
    "cp1250": ("ľavá pľúca", "płuco"), "cp1251": ("левое лёгкое",), "cp1253": ("πνεύμονας",),
    "mac-roman": ("détaché", "Größe"), "cp850": ("détaché", "Größe"), "shift-jis": ("左肺の影",), "gbk": ("左肺阴影",),
}  # fmt: skip


@pytest.mark.parametrize("language", WESTERN)
def test_western_text_in_windows_1252_is_recognized(tmp_path: Path, language: str) -> None:
    table = tmp_path / "a.csv"
    table.write_bytes((f"image;text\r\na;{WESTERN[language]}\r\n").encode("cp1252"))
    assert find_encoding(table) == "cp1252"
    (row,) = read_table(table, DataSetOptions(delimiter="semicolon"))[:1]
    assert row.values["text"] in WESTERN[language]


@pytest.mark.parametrize(("encoding", "text"), [(name, text) for name, texts in OTHERS.items() for text in texts])
def test_other_8_bit_encodings_are_refused_and_read_by_name(tmp_path: Path, encoding: str, text: str) -> None:
    table = tmp_path / "a.csv"
    table.write_bytes(f"image,text\na,{text}\n".encode(encoding))
    with pytest.raises(DataError, match=r"not clearly Western European .* --encoding"):
        read_table(table)
    (row,) = read_table(table, DataSetOptions(encoding=encoding))
    assert row.values["text"] == text


def test_utf_8_that_was_saved_as_windows_1252_in_one_place_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_bytes("image,text\na,é\n".encode() + "b,é\n".encode("cp1252"))
    with pytest.raises(DataError, match="not clearly Western"):
        read_table(table)


def test_doubt_is_found_across_blocks_and_far_from_the_start(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    for at in (65_530, 65_535, 65_536, 300_000):
        text = "image,text\n" + "x" * (at - 13) + ",\n"
        table.write_bytes(text.encode() + "лёгкое".encode("cp1251"))
        with pytest.raises(DataError, match="not clearly Western"):
            find_encoding(table)


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"image,text\na,b\x00\n", {}, "line 2 has a zero character"),
        (b"\xff\xfei\x00m\x00a", {}, "cannot be read in the encoding utf-16"),
        (b"\xef\xbb\xbfimage,text\na,\xe9\n", {}, "cannot be read in the encoding utf-8-sig"),
        ("image,text\na,é\n".encode(), {"encoding": "ascii"}, "cannot be read in the encoding ascii"),
        (b"image~text\na~b\n", {}, "has one column, 'image~text'. Give the delimiter with --delimiter"),
        (b"image;a|b\nx;y|z\n", {}, "may be separated in several ways. .* --delimiter semicolon"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, content: bytes, options: dict[str, str], words: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_table(tmp_path / "a.csv", DataSetOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_limit_on_cells_holds_for_every_delimiter(
    tmp_path: Path, separator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MOST_CELLS", 100)
    (tmp_path / "a.csv").write_text(f"a{separator}b\n" + f"1{separator}2\n" * 99)
    assert len(read_table(tmp_path / "a.csv")) == 99
    (tmp_path / "a.csv").write_text(f"a{separator}b\n" + f"1{separator}2\n" * 100)
    with pytest.raises(DataError, match="or 100 delimiters"):
        read_table(tmp_path / "a.csv")
    assert MOST_CELLS > 100
