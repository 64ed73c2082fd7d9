"""Tests of `cclip-deploy predict`: files, table, JSON, and exit codes for bad images and prompts."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.bundles import copy_of, flip_byte
from tests.cli.run import interrupt_at, invoke, run
from tests.imaging.test_dicom import write_dicom


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """A folder with a 16-bit gray PNG, a color JPEG and a DICOM radiograph."""
    folder = tmp_path / "films"
    folder.mkdir()
    rng = np.random.default_rng(2)
    Image.fromarray(rng.integers(0, 65536, (50, 40)).astype(np.uint16)).save(folder / "deep.png")
    Image.fromarray(rng.integers(0, 256, (30, 44, 3)).astype(np.uint8)).save(folder / "photo.jpg")
    write_dicom(folder / "film", rng.integers(0, 4096, (48, 36)).astype(np.uint16), bits=12)
    return folder


def test_a_folder_with_two_prompts_prints_json(tiny_bundle_path: Path, films: Path, tmp_path: Path) -> None:
    done = run(
        "predict", tiny_bundle_path, films, "--prompt", "left lung", "--prompt", "heart", "-o", tmp_path / "out",
        "--threads", "1", "--json",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told.keys() == {
        "schema", "images", "masks", "seconds", "complete", "predictions", "failed", "repaired_prompts",
        "prompt_kernels", "index", "ran",
    }  # fmt: skip
    assert told["schema"] == "cclip-deploy/predict/1"
    assert (told["images"], told["masks"], told["complete"]) == (3, 6, True)
    assert told["failed"] == told["repaired_prompts"] == []
    assert [(Path(row["image"]).name, row["prompt"]) for row in told["predictions"]] == [
        (name, prompt) for name in ("deep.png", "film", "photo.jpg") for prompt in ("left lung", "heart")
    ]
    for row in told["predictions"]:
        assert row.keys() == {
            "image", "prompt", "files", "area_share", "area_px", "area_mm2", "mean_probability",
            "mean_probability_inside", "box", "region_count", "warnings",
        }  # fmt: skip
        assert 0 <= row["area_share"] <= 1
        assert 0 < row["mean_probability"] < 1
        with (
            Image.open(row["image"]) if "." in row["image"] else Image.new("L", (36, 48)) as source,
            Image.open(row["files"]["mask"]) as mask,
        ):
            assert mask.size == source.size
    assert len(list((tmp_path / "out").glob("*.png"))) == 18


def test_typing_errors_are_corrected_as_in_evaluation_and_reported(
    tiny_bundle_path: Path, films: Path, tmp_path: Path
) -> None:
    """`evaluate` uses the prompts that `read_data_set` corrected, and `predict` must use the same."""

    def predicted(prompt: str, *more: str) -> tuple[dict[str, Any], np.ndarray]:
        out = tmp_path / f"{prompt}{len(more)}"
        done = invoke("predict", tiny_bundle_path, films / "photo.jpg", "--prompt", prompt, "-o", out, "--json", *more)
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        return told, np.asarray(Image.open(told["predictions"][0]["files"]["probability"]))

    (right, meant), (typed, repaired) = predicted("upper left lung"), predicted("uppper lefft lung")
    assert right["repaired_prompts"] == []
    (said,) = typed["repaired_prompts"]
    assert (said["written"], said["text"]) == ("uppper lefft lung", "upper left lung")
    assert typed["predictions"][0]["prompt"] == "upper left lung"
    assert np.array_equal(meant, repaired)
    left_alone, other = predicted("uppper lefft lung", "--no-repair")
    assert left_alone["repaired_prompts"] == []
    assert left_alone["predictions"][0]["prompt"] == "uppper lefft lung"
    assert not np.array_equal(meant, other)
    shown = invoke("predict", tiny_bundle_path, films / "photo.jpg", "--prompt", "uppper lung", "-o", tmp_path / "o")
    assert "Repaired prompt 'uppper lung': 'uppper' to 'upper'" in shown.stdout


def test_the_table_prints_prompts_literally(tiny_bundle_path: Path, films: Path, tmp_path: Path) -> None:
    prompts = ("left [/b] lung", ":lung: [red]mass")
    asked = [part for prompt in prompts for part in ("--prompt", prompt)]
    done = invoke(
        "predict", tiny_bundle_path, films / "photo.jpg", *asked, "-o", tmp_path / "o", "--threads", "1", "-v"
    )
    assert done.exit_code == 0, done.output
    assert all(prompt in done.stdout for prompt in prompts)
    assert "1 of 1: " in done.stderr


def test_an_unreadable_image_ends_with_6_after_the_others_are_done(
    tiny_bundle_path: Path, films: Path, tmp_path: Path
) -> None:
    (films / "broken.png").write_bytes((films / "deep.png").read_bytes()[:100])
    done = invoke(
        "predict", tiny_bundle_path, films, "--prompt", "lung", "-o", tmp_path / "out", "--threads", "1", "--json"
    )
    assert done.exit_code == 6
    told = json.loads(done.stdout)
    assert len(told["predictions"]) == 3
    assert [row.keys() for row in told["failed"]] == [{"image", "error"}]
    assert told["failed"][0]["image"] == str(films / "broken.png")
    assert done.stderr.startswith("Error: 1 of 4 images could not be used (the others are done); first: ")
    assert len(list((tmp_path / "out").glob("*.png"))) == 9


@pytest.mark.parametrize(
    ("prompt", "said"), [("", "The prompt is empty"), (" \t", "The prompt is empty"), ("heart " * 30, "room for 24")]
)
def test_an_invalid_prompt_ends_with_2(
    prompt: str, said: str, tiny_bundle_path: Path, films: Path, tmp_path: Path
) -> None:
    done = invoke("predict", tiny_bundle_path, films, "--prompt", prompt, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_other_bad_input_has_its_exit_code(tiny_bundle_path: Path, films: Path, tmp_path: Path) -> None:
    def exit_code(*arguments: str | Path) -> int:
        return invoke("predict", *arguments, "-o", tmp_path / "out", "--threads", "1").exit_code

    assert exit_code(tmp_path / "none.cclip", films, "--prompt", "lung") == 6
    assert exit_code(tiny_bundle_path, tmp_path / "none.png", "--prompt", "lung") == 6
    assert exit_code(tiny_bundle_path, films, "--prompt", "lung", "--threshold", "2") == 2
    assert exit_code(tiny_bundle_path, films) == 2
    empty = tmp_path / "empty"
    empty.mkdir()
    assert exit_code(tiny_bundle_path, empty, "--prompt", "lung") == 6
    altered = copy_of(tiny_bundle_path, tmp_path)
    flip_byte(altered / "tokenizer.json")
    assert exit_code(altered, films, "--prompt", "lung") == 6
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("mine")
    assert exit_code(tiny_bundle_path, films, "--prompt", "lung") == 2
    assert (tmp_path / "out").read_text() == "mine"


def test_a_prompt_cache_is_used_repaired_and_reported(tiny_bundle_path: Path, films: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    asked = (
        "predict", tiny_bundle_path, films, "--prompt", "left lung", "--prompt", "heart", "-o", tmp_path / "out",
        "--threads", "1", "--prompt-cache", cache,
    )  # fmt: skip

    def counts() -> dict[str, int]:
        done = invoke(*asked, "--json")
        assert done.exit_code == 0, done.output
        return dict(json.loads(done.stdout)["prompt_kernels"])

    assert counts() == {"memory_hits": 6, "disk_hits": 0, "misses": 2, "rebuilt": 0}
    masks = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    assert counts() == {"memory_hits": 6, "disk_hits": 2, "misses": 0, "rebuilt": 0}
    flip_byte(next(cache.iterdir()))
    assert counts() == {"memory_hits": 6, "disk_hits": 1, "misses": 0, "rebuilt": 1}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.png")} == masks
    said = invoke(*asked).stdout
    assert "Prompt kernels: 0 computed, 6 from memory, 2 from disk" in said


def test_an_unusable_prompt_cache_fails_before_any_work(tiny_bundle_path: Path, films: Path, tmp_path: Path) -> None:
    for place, code in ((films / "photo.jpg", 2), (Path("/proc/cache"), 3)):
        done = invoke(
            "predict", tiny_bundle_path, films, "--prompt", "lung", "-o", tmp_path / "out", "--prompt-cache", place
        )
        assert done.exit_code == code
        assert str(place) in done.stderr
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_only_complete_files(tiny_bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "films").mkdir()
    rng = np.random.default_rng(1)
    for n in range(150):
        Image.fromarray(rng.integers(0, 256, (300, 300)).astype(np.uint8)).save(tmp_path / "films" / f"{n:03}.png")
    done = interrupt_at(
        "12 of 150", "predict", tiny_bundle_path, tmp_path / "films", "--prompt", "lung", "-o", tmp_path / "out",
        "--threads", "1", "-v",
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert done.stderr.rstrip().endswith("nothing was left half-written.")
    assert "images/s, " in done.stderr
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert 0 < len(names) < 300
    assert len(names) % 3 == 0
    index = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert index["complete"] is False
    assert sorted(file for row in index["predictions"] for file in row["files"].values()) == names
    assert sorted(os.listdir(tmp_path / "out")) == [*names, "predictions.csv", "predictions.json"]
    for name in names:
        with Image.open(tmp_path / "out" / name) as image:
            image.load()


def test_both_backends_give_the_same_masks(tiny_bundle_path: Path, films: Path, tmp_path: Path) -> None:
    shares = {}
    for backend in ("onnxruntime", "openvino"):
        done = invoke(
            "predict", tiny_bundle_path, films / "deep.png", "--prompt", "left lung", "--backend", backend,
            "-o", tmp_path / backend, "--threads", "1", "--json",
        )  # fmt: skip
        assert done.exit_code == 0, done.stderr
        (row,) = json.loads(done.stdout)["predictions"]
        shares[backend] = row["mean_probability"]
    assert shares["openvino"] == pytest.approx(shares["onnxruntime"], abs=1e-4)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("precision", "flags"),
    [
        ("int8", "--int8 --calibration DATA"), ("fp8", "--fp8 --calibration DATA"), ("fp16", "--fp16"),
        ("fp8-fp16", "--fp8 --fp16 --calibration DATA"),
    ],
)  # fmt: skip
def test_a_missing_precision_is_an_error_without_a_fallback(
    precision: str, flags: str, backend: str, tiny_bundle_path: Path, films: Path, tmp_path: Path
) -> None:
    done = invoke(
        "predict", tiny_bundle_path, films, "--prompt", "lung", "--precision", precision, "--backend", backend,
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 2
    assert f"Build it: cclip-deploy build-engine BUNDLE {flags}\n" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_predict_reports_the_backend_that_ran(
    backend: str, tiny_bundle_path: Path, films: Path, tmp_path: Path
) -> None:
    arguments = (
        "predict", tiny_bundle_path, films / "deep.png", "--prompt", "lung", "--backend", backend, "-o",
        tmp_path / "out", "--threads", "1",
    )  # fmt: skip
    ran = json.loads(invoke(*arguments, "--json").stdout)["ran"]
    assert (ran["backend"], ran["device"], ran["precision"]) == (backend, "cpu", "fp32")
    assert ran["graphs"] == {"image_encoder": "fp32", "prompt_encoder": "fp32", "mask_decoder": "fp32"}
    assert (ran["engines_not_used"], ran["notes"]) == ([], [])
    said = invoke(*arguments).stdout
    assert f"Ran: {backend} on cpu; image_encoder fp32, prompt_encoder fp32, mask_decoder fp32." in said
    assert "engines" not in said


def test_a_run_ends_with_a_summary_and_shows_images_only_if_asked(
    tiny_bundle_path: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("predict", tiny_bundle_path, "films", "--prompt", "lung", "-o", "out", "--threads", "1")
    quiet, verbose = invoke(*arguments), invoke(*arguments, "-v")
    assert quiet.stderr == ""
    assert [line.split(" (")[0] for line in verbose.stderr.splitlines()] == [
        f"{n} of 3: films/{name}" for n, name in enumerate(("deep.png", "film", "photo.jpg"), start=1)
    ]
    for done in (quiet, verbose):
        *_, index, summary = done.stdout.splitlines()
        assert index == "Index: out/predictions.json, out/predictions.csv"
        assert re.fullmatch(r"3 images, 3 masks in [\d.e-]+ s \([\d.e+]+ images/s\)\.", summary)
        assert "films/photo.jpg" in done.stdout


def test_a_long_table_is_printed_only_if_asked(tiny_bundle_path: Path, films: Path, tmp_path: Path) -> None:
    prompts = [part for n in range(8) for part in ("--prompt", f"rib {n}")]
    arguments = (
        "predict", tiny_bundle_path, films, *prompts, "-o", tmp_path / "out", "--threads", "1", "--outputs", "mask",
    )  # fmt: skip
    short, long = invoke(*arguments).stdout, invoke(*arguments, "-v").stdout
    assert "rib 7" not in short
    assert "3 images, 24 masks in " in short
    assert long.count("rib 7") == 3
    assert len(list((tmp_path / "out").glob("*.png"))) == 24


def test_outputs_and_the_index_are_chosen(tiny_bundle_path: Path, films: Path, tmp_path: Path) -> None:
    arguments = ("predict", tiny_bundle_path, films / "photo.jpg", "--prompt", "lung", "-o", tmp_path / "out")
    done = invoke(*arguments, "--outputs", "overlay, probability", "--index", "csv", "--threads", "1", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["index"] == [str(tmp_path / "out" / "predictions.csv")]
    assert sorted(told["predictions"][0]["files"]) == ["overlay", "probability"]
    assert len(os.listdir(tmp_path / "out")) == 3
    for option, value, said in (
        ("--outputs", "msk", "'msk' is not an output"), ("--outputs", ",", "No output"),
        ("--index", "xml", "'xml' is not a format"),
    ):  # fmt: skip
        refused = invoke(*arguments, option, value)
        assert refused.exit_code == 2
        assert said in refused.stderr
