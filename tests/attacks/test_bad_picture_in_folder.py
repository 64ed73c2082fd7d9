"""One unusable image in a folder or data set is reported with the reason, and the others are processed.

Before, `ImageError` alone was caught: a JPEG-LS DICOM file without a decoder (EnvironmentIssue) or a picture that
takes all memory (MemoryError) ended the command with no mask, no JSON and no report; `evaluate`, `data` and the
calibration ended at any bad picture.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.common.limits import MOST_PICTURE_BYTES
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.errors import EnvironmentIssue, ImageError
from cclip_deploy.imaging import reading as images_module
from cclip_deploy.inference import predict as pipeline
from cclip_deploy.inference.predict import predict
from cclip_deploy.inference.prediction import refuse_failures
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.quantization.agreement import evaluation_images
from cclip_deploy.quantization.calibrate import CalibrationOptions, choose_pictures
from tests.attacks.test_hostile_pictures import compressed_dicom, png
from tests.cli.run import invoke
from tests.inference.test_predict import Brightness, read_png

JPEG_LS = "1.2.840.10008.1.2.4.80"
GOOD = ["a.png", "c.png", "f.png"]
RNG = np.random.default_rng(7)

BAD: dict[str, Callable[[], bytes]] = {
    "JPEG-LS without a decoder": lambda: compressed_dicom(JPEG_LS, b"\xff\xd8\xff\xf7", 64, 64),
    "a bomb": lambda: png(60_000, 60_000, bytes(100)),
    "torn": lambda: png(64, 64, RNG.bytes(65 * 64))[:900],
    "another type": lambda: b"%!PS-Adobe-3.0\n" * 9,
    "nothing": lambda: b"",
}
RAISED = [MemoryError(), RecursionError("too deep"), ValueError("odd bytes"), OSError(errno.EIO, "Input/output error")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good pictures, and room for bad ones between them."""
    place = tmp_path / "pictures"
    place.mkdir()
    for name in GOOD:
        Image.fromarray(RNG.integers(0, 256, (50, 40)).astype(np.uint8)).save(place / name)
    return place


@pytest.fixture
def segmenter(tiny_bundle: Bundle) -> Segmenter:
    return Segmenter.of_bundle(tiny_bundle, Brightness())


def masks_alone(segmenter: Segmenter, folder: Path, output: Path) -> dict[str, bytes]:
    """The masks of each good picture when it is segmented alone."""
    for name in GOOD:
        predict(segmenter, [folder / name], ["left lung"], output)
    return {path.name: path.read_bytes() for path in output.iterdir()}


def check_the_others(segmenter: Segmenter, folder: Path, tmp_path: Path, bad: str) -> str:
    """Predict the folder; the masks of the good ones must be right. Returns the reason of the bad one."""
    found = predict(segmenter, [folder], ["left lung"], tmp_path / "out")
    assert [row.image.name for row in found.done] == GOOD
    ((path, reason),) = found.failed
    assert path.name == bad
    assert reason.startswith(str(path))
    alone = masks_alone(segmenter, folder, tmp_path / "alone")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == alone
    assert len(alone) == 3 * len(GOOD)
    with pytest.raises(ImageError, match=r"1 of 4 images could not be used \(the others are done\)"):
        refuse_failures(found)
    return reason


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", ["a-first.png", "d.png", "z-last.png"])
def test_predict_names_a_bad_image_and_does_the_others(
    segmenter: Segmenter, folder: Path, tmp_path: Path, kind: str, name: str
) -> None:
    (folder / name).write_bytes(BAD[kind]())
    check_the_others(segmenter, folder, tmp_path, name)


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_predict_continues_whatever_reading_an_image_raises(
    segmenter: Segmenter, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Errors that come out of `read_image` as they are, as if a decoder had been forgotten there."""
    shutil.copy(folder / "a.png", folder / "b.png")

    def read(path: Path) -> images_module.Picture:
        if path.name == "b.png":
            raise error
        return images_module.read_image(path)

    monkeypatch.setattr(pipeline, "read_image", read)
    reason = check_the_others(segmenter, folder, tmp_path, "b.png")
    assert (str(error) or "takes more memory than there is") in reason


@pytest.mark.parametrize("stage", ["to_input", "to_source", "write_segmentation"])
def test_predict_continues_where_memory_ends_after_reading(
    segmenter: Segmenter, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """In the resize to the network, the one back, or the mask's files."""
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "b.png")
    module = (
        pipeline if stage == "write_segmentation" else __import__("cclip_deploy.inference.graph_chain", fromlist=["x"])
    )
    real = getattr(module, stage)

    def fail(first: object, *rest: object, **more: object) -> object:
        shape = {"to_source": lambda: rest[0], "to_input": lambda: first.shape}.get(stage, lambda: first.pixels.shape)()  # type: ignore[attr-defined]
        if tuple(shape) == (9, 9):  # type: ignore[call-overload]
            raise MemoryError
        return real(first, *rest, **more)

    monkeypatch.setattr(module, stage, fail)
    assert "takes more memory than there is" in check_the_others(segmenter, folder, tmp_path, "b.png")


def test_a_full_disk_is_not_an_error_of_one_image(
    segmenter: Segmenter, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> object:
        raise EnvironmentIssue("No room for masks")

    monkeypatch.setattr(pipeline, "write_segmentation", full)
    with pytest.raises(EnvironmentIssue, match="No room"):
        predict(segmenter, [folder], ["left lung"], tmp_path / "out")


def test_large_images_go_one_at_a_time(
    segmenter: Segmenter, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, three pictures and five masks were in memory whatever their size."""
    for name in GOOD:
        for copy in range(4):
            shutil.copy(folder / name, folder / f"{copy}{name}")
    size = 50 * 40 * 4
    held: list[int] = []

    class Watched(pipeline.Room):
        def take(self, count: int) -> None:
            super().take(count)
            held.append(self._taken)

    monkeypatch.setattr(pipeline, "Room", lambda: Watched(2 * size))
    found = predict(segmenter, [folder], ["left lung"], tmp_path / "out")
    assert len(found.done) == 15
    assert max(held) == 2 * size
    monkeypatch.setattr(pipeline, "Room", lambda: Watched(1))
    held.clear()
    writing, most = [0], [0]

    def write(*arguments: object) -> object:
        writing[0] += 1
        most[0] = max(most[0], writing[0])
        try:
            return real(*arguments)  # type: ignore[arg-type]
        finally:
            writing[0] -= 1

    real = pipeline.write_segmentation
    monkeypatch.setattr(pipeline, "write_segmentation", write)
    assert len(predict(segmenter, [folder], ["left lung", "right lung"], tmp_path / "out").done) == 30
    assert set(held) == {size}
    assert most == [1]
    assert MOST_PICTURE_BYTES <= 2**30


def test_the_command_writes_its_json_and_ends_with_6(tiny_bundle_path: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "b.dcm").write_bytes(BAD["JPEG-LS without a decoder"]())
    done = invoke(
        "predict", tiny_bundle_path, folder, "--prompt", "left lung", "-o", tmp_path / "out", "--threads", "1", "--json"
    )
    assert done.exit_code == 6
    document = json.loads(done.stdout)
    assert [Path(row["image"]).name for row in document["predictions"]] == GOOD
    ((failed,),) = [document["failed"]]
    assert Path(failed["image"]).name == "b.dcm"
    assert "no decoder for it is installed" in failed["error"]
    assert read_png(Path(document["predictions"][0]["files"]["mask"])).shape == (50, 40)
    alone = invoke("predict", tiny_bundle_path, folder / "b.dcm", "--prompt", "left lung", "-o", tmp_path / "out")
    assert alone.exit_code == 6
    assert "pip install" in alone.stderr


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """A flat data set of the test split, of which one image is torn behind its header."""
    write_dataset(tmp_path / "set", {"train": 1, "test": 4}, (64, 96), 3)
    whole = tmp_path / "set" / "images" / "test-00001.png"
    whole.write_bytes(whole.read_bytes()[:200])
    return tmp_path / "set"


def test_evaluate_leaves_out_a_bad_image_and_says_so(tiny_bundle_path: Path, data_set: Path, tmp_path: Path) -> None:
    """The scores are those of the set without that row."""
    pytest.importorskip("matplotlib")
    done = invoke("evaluate", tiny_bundle_path, data_set, "-o", tmp_path / "report", "--threads", "1", "--json")
    assert done.exit_code == 6, done.stderr
    assert "test-00001.png" in done.stderr
    document = json.loads(done.stdout)
    assert document["data"]["rows"] == 3
    ((failed,),) = [document["failed"]]
    assert "test-00001.png cannot be decoded" in failed["error"]
    assert any("1 of 4" in warning for warning in document["warnings"])
    assert json.loads((tmp_path / "report" / "evaluation.json").read_text())["failed"] == document["failed"]
    assert len((tmp_path / "report" / "rows.csv").read_text().splitlines()) == 4
    assert "test-00001.png" in (tmp_path / "report" / "index.html").read_text()
    table = data_set / "table.csv"
    table.write_text("".join(line for line in table.read_text().splitlines(True) if "test-00001" not in line))
    again = invoke("evaluate", tiny_bundle_path, data_set, "--threads", "1", "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["scores"] == document["scores"]


def test_evaluate_of_bad_images_alone_is_an_error(tiny_bundle_path: Path, data_set: Path) -> None:
    for image in (data_set / "images").glob("test-*"):
        image.write_bytes(image.read_bytes()[:200])
    done = invoke("evaluate", tiny_bundle_path, data_set, "--threads", "1")
    assert done.exit_code == 6
    assert "cannot be decoded" in done.stderr


def test_data_reports_the_rest_of_a_set_with_bad_masks(tiny_bundle_path: Path, data_set: Path) -> None:
    torn = data_set / "masks" / "test-00002-0.png"
    torn.write_bytes(torn.read_bytes()[:60])
    Image.fromarray(np.arange(64 * 96, dtype=np.uint8).reshape(64, 96)).save(data_set / "masks" / "test-00003-0.png")
    done = invoke("data", data_set, "--bundle", tiny_bundle_path, "--json")
    assert done.exit_code == 6
    document = json.loads(done.stdout)
    names = ["test-00002-0.png", "test-00003-0.png", "test-00001.png"]
    assert [Path(path).name for path, _ in document["failed"]] == names
    assert document["splits"]["test"]["masks"] == 4
    shown = invoke("data", data_set, "--bundle", tiny_bundle_path)
    assert shown.exit_code == 6
    assert "255 values besides 0" in " ".join(shown.stdout.split())
    assert "3 images or masks cannot be read" in shown.stderr


@pytest.mark.parametrize("kind", BAD)
def test_calibration_and_evaluation_images_leave_out_a_bad_image(folder: Path, tmp_path: Path, kind: str) -> None:
    (folder / "b.png").write_bytes(BAD[kind]())
    if kind == "nothing":
        (folder / "b.png").write_bytes(b"\0")
    chosen = choose_pictures(CalibrationOptions((folder,), allow_few=True))
    assert sorted(path.name for path in chosen.paths) == GOOD
    ((reason,),) = [chosen.failed]
    assert reason.startswith("b.png")
    assert str(tmp_path) not in reason
    told: list[str] = []
    judged = evaluation_images(CalibrationOptions((), evaluation_set=(folder,)), told.append)
    assert sorted(image.path.name for image in judged.images) == GOOD
    assert told[0].startswith(f"Left out: {folder / 'b.png'}")
    for name in GOOD:
        (folder / name).unlink()
    with pytest.raises(ImageError, match=r"b\.png"):
        evaluation_images(CalibrationOptions((), evaluation_set=(folder,)))
