"""Options that say how a data set is read, on every command that reads one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.run import invoke


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A set with two columns that may be the mask; the mask is a label map of 0, 1 and 2."""
    (tmp_path / "set").mkdir()
    Image.new("L", (32, 32)).save(tmp_path / "set" / "a.png")
    Image.fromarray((np.arange(32 * 32) % 3).reshape(32, 32).astype(np.uint8)).save(tmp_path / "set" / "m.png")
    (tmp_path / "set" / "t.csv").write_text("Image,label,gt,Caption\na.png,m.png,lung,left lung\n")
    return tmp_path / "set"


def test_each_command_names_the_column_option_and_takes_it(
    folder: Path, tiny_bundle_path: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lightning")
    recipe = tmp_path / "a.toml"
    recipe.write_text('model = "tiny"\nimage_size = 64\n')
    train = ("train", recipe, "--data", folder, "-o", tmp_path / "run", "--dry-run")
    few = ("--calibration", folder, "--int8", "--graph", "image_encoder")
    for command in (
        ("data", folder, "--bundle", tiny_bundle_path),
        ("evaluate", tiny_bundle_path, folder, "--split", "test", "--threads", "1"),
        ("build-engine", tiny_bundle_path, *few),
        ("tune-precision", tiny_bundle_path, "--evaluation-set", folder, "--precision", "fp16", "-o", tmp_path / "t"),
        train,
    ):
        refused = invoke(*command)
        assert refused.exit_code == 6, command
        assert "label, gt may all be the mask. Give --column mask=label or --column mask=gt" in refused.stderr
        if command is not train:
            assert "may all be" not in invoke(*command, "--column", "mask=label").stderr
    recipe.write_text('model = "tiny"\nimage_size = 64\n[data]\ncolumns = { mask = "label" }\n')
    assert "may all be" not in invoke(*train).stderr
    recipe.write_text('model = "tiny"\nimage_size = 64\n[data]\ncolumns = { age = "label" }\n')
    assert (invoke(*train).exit_code, list(tmp_path.glob("run*"))) == (2, [])


def test_data_says_how_the_table_was_read_and_counts_masks_by_form(folder: Path) -> None:
    for number, mask in enumerate(("RGB", "soft")):
        inside = np.zeros((64, 64), np.uint8)
        inside[11:41, 11:41] = 255
        hard = Image.fromarray(inside)
        Image.new("L", (32, 32), number).save(folder / f"{mask}.png")
        made = hard.resize((32, 32)) if mask == "soft" else Image.merge("RGB", [hard.resize((32, 32), 0), *[
            Image.new("L", (32, 32))] * 2])  # fmt: skip
        made.save(folder / f"m{mask}.png")
    (folder / "t.csv").write_bytes(
        "Image;mask;Caption;side\r\nRGB.png;mRGB.png;Größe;l\r\nsoft.png;msoft.png;left lung;r\r\n".encode("cp1252")
    )
    shown = invoke("data", folder)
    assert shown.exit_code == 0, shown.stderr
    assert "Read t.csv: Windows-1252, semicolon; image from 'Image', mask from 'mask'" in shown.stdout
    assert "not used: side" in shown.stdout
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in shown.stdout.splitlines() if "│" in line}
    assert (rows["soft masks"], rows["colored masks"], rows["lossy masks"]) == ("1", "1", "0")


def test_masks_of_several_values_are_read_with_the_option(folder: Path) -> None:
    arguments = ("data", folder, "--column", "mask=label", "--json")
    refused = invoke(*arguments)
    assert refused.exit_code == 6
    assert "0 (33.4 %), 1 (33.3 %), 2 (33.3 %)" in refused.stderr
    assert "--mask-value 1 or --mask-value 2 or --mask-value nonzero" in refused.stderr
    assert invoke(*arguments, "--mask-value", "2").exit_code == 0
    assert invoke(*arguments, "--mask-value", "two").exit_code == 2


def test_evaluate_uses_the_chosen_mask_values(folder: Path, tiny_bundle_path: Path) -> None:
    chosen = ("--column", "mask=label", "--split", "train", "--threads", "1", "--json", "--mask-value")
    for value, empty in (("2", 0), ("7", 1)):
        done = invoke("evaluate", tiny_bundle_path, folder, *chosen, value)
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["data"]["empty_masks"] == empty
