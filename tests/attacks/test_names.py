r"""File names that are not UTF-8, as in old archives, do not prevent reports from being written.

Before: `evaluate` worked to its end and then raised UnicodeEncodeError while it wrote rows.csv, so that the report was
lost; `export`, `build-engine` and a calibration ended with pydantic's error on the name of a checkpoint or picture;
and JSON held a lone surrogate, for which a strict parser refuses the whole document.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.cli.console import command_line, print_json
from cclip_deploy.common.json_file import json_text, write_json
from cclip_deploy.common.names import printable
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.quantization.calibrate import CalibrationOptions, choose_pictures
from tests.cli.run import invoke

ODD = os.fsdecode(b"\xff\xfe")
SHOWN = r"\udcff\udcfe"
"""What Python writes of such bytes on standard error."""


def strict_json(content: bytes) -> Any:
    """A document as a strict parser takes it: UTF-8, and no text in it that UTF-8 cannot hold."""
    found = json.loads(content.decode())
    json.dumps(found, ensure_ascii=False).encode()
    return found


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / f"set{ODD}"
    write_dataset(folder, {"test": 2}, (64, 64), 0, prompts_per_image=1)
    return folder


def test_a_data_set_of_such_a_name_has_its_whole_report(tiny_bundle_path: Path, films: Path, tmp_path: Path) -> None:
    report = tmp_path / f"report{ODD}"
    done = invoke("evaluate", tiny_bundle_path, films, "-o", report, "--json", "--threads", "1", "--worst", "1")
    assert done.exit_code == 0, done.output
    document = strict_json(done.stdout_bytes)
    assert document["data"]["folder"].endswith(f"set{SHOWN}")
    assert strict_json((report / "evaluation.json").read_bytes())["data"] == document["data"]
    with (report / "rows.csv").open(encoding="utf-8", newline="") as file:
        assert all(f"set{SHOWN}" in row["image"] for row in csv.DictReader(file))
    assert f"set{SHOWN}" in (report / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_an_image_of_such_a_name_is_segmented(form: list[str], tiny_bundle_path: Path, tmp_path: Path) -> None:
    picture = tmp_path / f"{ODD}.png"
    Image.new("L", (40, 40), 90).save(picture)
    done = invoke(
        "predict", tiny_bundle_path, tmp_path, "--prompt", "lung", "-o", tmp_path / "out", "--threads", "1", *form
    )
    assert done.exit_code == 0, done.output
    if form:
        assert strict_json(done.stdout_bytes)["predictions"][0]["image"].endswith(f"{SHOWN}.png")
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


def test_an_image_of_such_a_name_can_calibrate(tmp_path: Path) -> None:
    Image.fromarray(np.eye(40, dtype=np.uint8) * 200).save(tmp_path / f"{ODD}.png")
    chosen = choose_pictures(CalibrationOptions((tmp_path,), allow_few=True))
    assert [picture.name for picture in chosen.pictures] == [f"{SHOWN}.png"]
    assert strict_json(chosen.pictures[0].model_dump_json().encode())


def test_the_command_of_such_a_name_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes into the manifest, which pydantic writes and checks."""
    monkeypatch.setattr(sys, "argv", ["cclip-deploy", "export", f"{ODD}.safetensors"])
    assert command_line() == f"cclip-deploy export '{SHOWN}.safetensors'"


def test_json_is_one_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = {f"key{ODD}": [Path("a").name, f"{ODD}.png", {"deep": (f"x{ODD}", 1.5, None, True)}], "é🫁": "\\udcff"}
    print_json(value, "test")
    value = {"schema": "cclip-deploy/test/1", **value}
    write_json(tmp_path / "a.json", value)
    text = capsys.readouterr().out
    assert text == json_text(value) == (tmp_path / "a.json").read_text(encoding="utf-8")
    assert strict_json(text.encode("ascii")) == {
        "schema": "cclip-deploy/test/1",
        f"key{SHOWN}": ["a", f"{SHOWN}.png", {"deep": [f"x{SHOWN}", 1.5, None, True]}], "é🫁": "\\udcff",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "plain.png", "é🫁", "\\udcff", "a\nb"])
def test_valid_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text
