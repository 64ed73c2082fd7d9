"""The index lists what a run wrote, also after failures and when it was stopped."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import EnvironmentIssue, ImageError, UsageError
from cclip_deploy.inference import predict as pipeline
from cclip_deploy.inference.index import FORMATS
from cclip_deploy.inference.predict import PredictOptions, predict
from cclip_deploy.inference.prediction import refuse_failures
from cclip_deploy.inference.segmenter import Segmenter
from tests.imaging.test_dicom import write_dicom
from tests.inference.test_predict import Brightness

INDEXED = PredictOptions(index=("json", "csv"))
PROMPTS = ["left lung", "=SUM(1)"]


@pytest.fixture
def segmenter(tiny_bundle: Bundle) -> Segmenter:
    return Segmenter.of_bundle(tiny_bundle, Brightness())


@pytest.fixture
def films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder "films" in the working directory, with a DICOM film, a bright image, a dark one and a torn one."""
    monkeypatch.chdir(tmp_path)
    folder = Path("films")
    folder.mkdir()
    rng = np.random.default_rng(0)
    write_dicom(folder / "a.dcm", rng.integers(0, 255, (20, 30)).astype(np.uint8), PixelSpacing=[0.5, 2.0])
    Image.fromarray(rng.integers(100, 255, (20, 30)).astype(np.uint8)).save(folder / "b.png")
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(folder / "c.png")
    (folder / "d.png").write_bytes(b"torn")
    return folder


def read_json(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "predictions.json").read_text()))


def read_csv(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_mask_and_every_failure_is_listed(segmenter: Segmenter, films: Path, tmp_path: Path) -> None:
    found = predict(segmenter, [films], PROMPTS, Path("out"), INDEXED)
    told = read_json(Path("out"))
    assert (told["schema"], told["complete"]) == ("cclip-deploy/predictions/1", True)
    assert (told["images"], told["masks"], len(told["failed"])) == (3, 6, 1)
    assert told["seconds"] > 0
    assert (told["ran"]["ran"], told["ran"]["precision"]) == ("brightness", "fp32")
    assert told["ran"]["graphs"] == {"image_encoder": "fp32", "prompt_encoder": "fp32", "mask_decoder": "fp32"}
    files = [name for row in told["predictions"] for name in row["files"].values()]
    assert sorted([*files, "predictions.csv", "predictions.json"]) == sorted(os.listdir("out"))
    for row, prediction in zip(told["predictions"], found.done, strict=True):
        assert row["image"] == str(tmp_path / prediction.image)
        with Image.open(Path("out") / row["files"]["mask"]) as mask:
            inside = np.asarray(mask) == 255
        assert (row["prompt"], row["area_px"], row["area_share"]) == (prediction.prompt, inside.sum(), inside.mean())
        box = Image.fromarray(inside.astype(np.uint8)).getbbox()
        assert row["box"] == (None if box is None else list(box))
        assert row["area_mm2"] == (row["area_px"] if row["image"].endswith("dcm") else None)
    (failed,) = told["failed"]
    assert failed["image"] == str(tmp_path / "films" / "d.png")
    assert "is not a complete PNG" in failed["error"]
    with pytest.raises(ImageError, match="1 of 4 images"):
        refuse_failures(found)


def test_csv_has_the_rows_of_json_without_formulas(segmenter: Segmenter, films: Path) -> None:
    predict(segmenter, [films], PROMPTS, Path("out"), INDEXED)
    told, rows = read_json(Path("out")), read_csv(Path("out"))
    assert len(rows) == 7
    for row, expected in zip(rows, told["predictions"], strict=False):
        assert row["image"] == expected["image"]
        assert row["prompt"] == expected["prompt"].replace("=", "'=")
        assert {name: row[name] for name in expected["files"]} == expected["files"]
        assert int(row["area_px"]) == expected["area_px"]
        box = [row[side] for side in ("left", "top", "right", "bottom")]
        assert box == (["", "", "", ""] if expected["box"] is None else list(map(str, expected["box"])))
        assert row["error"] == ""
    assert (rows[-1]["image"], rows[-1]["error"]) == tuple(told["failed"][0].values())
    assert {rows[-1][column] for column in rows[-1]} == {"", rows[-1]["image"], rows[-1]["error"]}


def test_parquet_has_the_rows_of_csv_with_types(segmenter: Segmenter, films: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet is an extra: pip install 'cclip-deploy[parquet]'")
    predict(segmenter, [films], PROMPTS, Path("out"), PredictOptions(index=FORMATS))
    table, rows = parquet.read_table("out/predictions.parquet"), read_csv(Path("out"))
    assert table.column_names == list(rows[0])
    types = {name: str(table.schema.field(name).type) for name in ("image", "area_px", "area_mm2", "left")}
    assert types == {"image": "string", "area_px": "int64", "area_mm2": "double", "left": "int64"}
    for row, text in zip(table.to_pylist(), rows, strict=True):
        shown = {name: "" if value is None else str(value) for name, value in row.items()}
        assert shown == {**text, "prompt": text["prompt"].removeprefix("'")}


def test_a_run_of_unusable_images_has_an_index(segmenter: Segmenter, films: Path) -> None:
    predict(segmenter, [films / "d.png"], PROMPTS, Path("out"), INDEXED)
    told = read_json(Path("out"))
    assert (told["predictions"], len(told["failed"]), told["masks"]) == ([], 1, 0)
    assert len(read_csv(Path("out"))) == 1


@pytest.mark.parametrize("error", [EnvironmentIssue("No room for masks"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_a_stopped_run_lists_what_it_wrote(
    segmenter: Segmenter, films: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    real: Callable[..., Any] = pipeline.write_segmentation
    calls: list[object] = []

    def fails_at_the_third(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise error
        return real(*arguments)

    monkeypatch.setattr(pipeline, "write_segmentation", fails_at_the_third)
    with pytest.raises(type(error)):
        predict(segmenter, [films], PROMPTS, Path("out"), INDEXED)
    told = read_json(Path("out"))
    assert told["complete"] is False
    listed = {name for row in told["predictions"] for name in row["files"].values()}
    assert {*listed, "predictions.csv", "predictions.json"} == set(os.listdir("out"))
    assert told["masks"] >= 2


def test_a_run_that_writes_no_mask_leaves_the_index_of_another(
    segmenter: Segmenter, films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(segmenter, [films / "b.png"], PROMPTS, Path("out"), INDEXED)
    before = read_json(Path("out"))

    def interrupted(path: Path, number: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(segmenter, [films / "c.png"], PROMPTS, Path("out"), INDEXED, interrupted)
    assert read_json(Path("out")) == before


def test_an_index_that_cannot_be_written_is_an_error_and_leaves_the_old_one(segmenter: Segmenter, films: Path) -> None:
    predict(segmenter, [films / "b.png"], PROMPTS, Path("out"), INDEXED)
    before = read_json(Path("out"))
    (Path("out") / "predictions.csv").unlink()
    (Path("out") / "predictions.csv").mkdir()
    with pytest.raises(EnvironmentIssue, match="predictions"):
        predict(segmenter, [films / "c.png"], PROMPTS, Path("out"), INDEXED)
    assert read_json(Path("out")) == before


def test_without_formats_there_is_no_index(segmenter: Segmenter, films: Path) -> None:
    predict(segmenter, [films / "b.png"], PROMPTS, Path("out"))
    assert all(name.endswith(".png") for name in os.listdir("out"))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            PredictOptions(index=("xml",)),
            UsageError,
            "'xml' is not a format of the index. Name some of json,csv",
        ),
        (PredictOptions(outputs=("msk",)), UsageError, "'msk' is not an output. Name some of mask,probability,overlay"),
        (PredictOptions(outputs=()), UsageError, "No output is named"),
    ],
)
def test_unknown_formats_and_outputs_are_refused_first(
    segmenter: Segmenter, films: Path, options: PredictOptions, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words.replace(".", r"\.")):
        predict(segmenter, [films], PROMPTS, Path("out"), options)
    assert not Path("out").exists()


def test_parquet_without_pyarrow_names_the_extra(
    segmenter: Segmenter, films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentIssue, match=r"needs pyarrow\. Install: pip install 'cclip-deploy\[parquet\]'"):
        predict(segmenter, [films], PROMPTS, Path("out"), PredictOptions(index=("parquet",)))
    assert not Path("out").exists()


@pytest.mark.parametrize("outputs", [("mask",), ("overlay", "probability"), ("probability",)])
def test_only_the_chosen_outputs_are_written(segmenter: Segmenter, films: Path, outputs: tuple[str, ...]) -> None:
    found = predict(segmenter, [films / "b.png"], "left lung", Path("out"), PredictOptions(outputs=outputs))
    assert sorted(os.listdir("out")) == sorted(f"b-left-lung-{name}.png" for name in outputs)
    assert set(found.done[0].to_dict()["files"]) == set(outputs)


@pytest.mark.parametrize("outputs", [("mask",), ("probability",), ("overlay",)])
def test_outputs_of_another_image_are_not_replaced_whichever_there_are(
    segmenter: Segmenter, films: Path, outputs: tuple[str, ...]
) -> None:
    options = PredictOptions(outputs=outputs)
    predict(segmenter, [films / "b.png"], "left lung", Path("out"), options)
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    predict(segmenter, [films / "b.png"], "left lung", Path("out"), options)
    Path("other").mkdir()
    (films / "c.png").rename("other/b.png")
    with pytest.raises(UsageError, match=r"exists and is of another image; .* --force"):
        predict(segmenter, [Path("other/b.png")], "left lung", Path("out"), options)
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    predict(segmenter, [Path("other/b.png")], "left lung", Path("out"), PredictOptions(outputs=outputs, replace=True))
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} != before


def test_images_of_one_name_are_named_after_their_folders(segmenter: Segmenter, films: Path) -> None:
    for folder in ("x", "y"):
        Path(folder).mkdir()
        (Path(folder) / "a.png").write_bytes((films / "b.png").read_bytes())
    predict(segmenter, [Path("x"), Path("y"), films / "b.png"], "lung", Path("out"), PredictOptions(outputs=("mask",)))
    assert sorted(os.listdir("out")) == ["b-lung-mask.png", "x-a-lung-mask.png", "y-a-lung-mask.png"]
