"""Calibration: choice of images, overlap with the evaluation set, records and the cache."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.datasets.reading import read_data_set
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.datasets.writing import WRITERS
from cclip_deploy.errors import DataError, ImageError, UsageError
from cclip_deploy.imaging.preprocess import to_input
from cclip_deploy.quantization.calibrate import CalibrationOptions, calibrate, choose_pictures, default_cache
from cclip_deploy.quantization.record import CalibrationRecord
from tests.conftest import THREADS, TINY_HW


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of ten training images and three test images."""
    folder = tmp_path_factory.mktemp("data-set") / "data"
    write_dataset(folder, {"train": 10, "test": 3}, TINY_HW, 5)
    return folder


def calibrated(bundle: Bundle, options: CalibrationOptions, lines: list[str] | None = None) -> CalibrationRecord:
    model = onnx.load(bundle.path / "graphs/image_encoder.onnx")
    on_progress = (lambda line: None) if lines is None else lines.append
    return calibrate(bundle, "image_encoder", model, choose_pictures(options), options, THREADS, on_progress)


def test_a_data_set_is_calibrated_on_its_training_split(films: Path) -> None:
    chosen = choose_pictures(CalibrationOptions((films,), evaluation_set=(films,)))
    assert sorted(path.name for path in chosen.paths) == [f"train-{n:05d}.png" for n in range(10)]
    assert chosen.evaluation_pictures == 3
    for path, picture in zip(chosen.paths, chosen.pictures, strict=True):
        assert picture.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert picture.name == path.name


def test_a_limit_takes_the_same_images_under_other_names(films: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number, path in enumerate(sorted((films / "images").glob("train-*"), reverse=True)):
        shutil.copy(path, renamed / f"{number}.png")
    first = choose_pictures(CalibrationOptions((films,), limit=8))
    second = choose_pictures(CalibrationOptions((renamed,), limit=8))
    assert len(first.pictures) == 8
    assert [p.sha256 for p in first.pictures] == [p.sha256 for p in second.pictures]


@pytest.mark.parametrize("copies", [0, 1, 20])
def test_copies_of_one_image_count_once(copies: int, films: Path, tmp_path: Path) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    for number in range(copies):
        shutil.copy(films / "images" / "train-00000.png", folder / f"{number}.png")
    options = CalibrationOptions((folder,))
    if copies == 0:
        with pytest.raises(ImageError, match="has no image"):
            choose_pictures(options)
        return
    with pytest.raises(UsageError, match="1 different image; with fewer than 8"):
        choose_pictures(options)
    assert len(choose_pictures(replace(options, allow_few=True)).paths) == 1


@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_an_image_of_the_evaluation_set_is_found_by_bytes_and_by_pixels(
    suffix: str, films: Path, tmp_path: Path
) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(films / "images", mixed, ignore=shutil.ignore_patterns("test-*"))
    Image.open(films / "images" / "test-00001.png").save(mixed / f"renamed.{suffix}")
    with pytest.raises(DataError, match=r"1 of 11 calibration images are in the evaluation set too .first renamed"):
        choose_pictures(CalibrationOptions((mixed,), evaluation_set=(films,)))
    assert choose_pictures(CalibrationOptions((mixed,))).evaluation_pictures == 0


@pytest.mark.parametrize("layout", WRITERS)
def test_in_every_format_the_training_images_are_used_and_the_test_images_are_not(layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_dataset(folder, {"train": 8, "val": 2, "test": 3}, (32, 48), 5, layout=layout)
    chosen = choose_pictures(CalibrationOptions((folder,), evaluation_set=(folder,)))
    rows = read_data_set(folder).samples
    assert set(chosen.paths) == {row.image for row in rows if row.split == "train"}
    assert chosen.evaluation_pictures == len({row.image for row in rows if row.split == "test"})
    with pytest.raises(DataError, match="in the evaluation set too"):
        choose_pictures(CalibrationOptions(chosen.paths, evaluation_set=chosen.paths))


@pytest.mark.parametrize("as_plain_images", [False, True])
def test_a_patient_of_the_evaluation_set_is_found_in_other_images(
    as_plain_images: bool, films: Path, tmp_path: Path
) -> None:
    """Two training images get the patient of a test image."""
    copy = tmp_path / "copy"
    shutil.copytree(films, copy)
    moved = {"train-00002": "sub-S07", "train-00005": "sub-S07", "test-00001": "sub-S07", "test-00000": "sub-S08"}
    text = (copy / "table.csv").read_text()
    for name, patient in moved.items():
        text = text.replace(f"synthetic-{name}", patient)
    (copy / "table.csv").write_text(text)
    evaluated = copy
    if as_plain_images:
        evaluated = tmp_path / "evaluated"
        evaluated.mkdir()
        shutil.copy(films / "images" / "test-00001.png", evaluated / "sub-S07_run-9.png")
    with pytest.raises(
        DataError,
        match=r"2 of 10 calibration images are of 1 patient in the evaluation set too .first sub-S07",
    ):
        choose_pictures(CalibrationOptions((copy,), evaluation_set=(evaluated,)))
    assert choose_pictures(CalibrationOptions((copy,))).patients == 9


def test_equal_file_names_do_not_imply_one_patient(films: Path, tmp_path: Path) -> None:
    """Two folders number their images alike; the report states that their patients are unknown."""
    for folder, kind in (("one", "train"), ("other", "test")):
        (tmp_path / folder).mkdir()
        for number, path in enumerate(sorted((films / "images").glob(f"{kind}-*"))):
            shutil.copy(path, tmp_path / folder / f"{number}.png")
    chosen = choose_pictures(CalibrationOptions((tmp_path / "one",), evaluation_set=(tmp_path / "other",)))
    assert chosen.describe() == [
        "Calibration: 10 images, from one (images without a layout): 10 images of unknown patients",
        "Evaluation set: other (images without a layout): 3 images of unknown patients",
        "13 of these images have no known patient, so only their files and pixels were compared. Give --subject, or a "
        "subject column.",
    ]


def test_a_set_with_one_split_cannot_be_both_calibration_and_evaluation_set(films: Path, tmp_path: Path) -> None:
    shutil.copytree(films, tmp_path / "set")
    table = tmp_path / "set" / "table.csv"
    table.write_text("".join(line for line in table.read_text().splitlines(True) if ",test," not in line))
    with pytest.raises(DataError, match="10 of 10 calibration images are in the evaluation set too"):
        choose_pictures(CalibrationOptions((tmp_path / "set",), evaluation_set=(tmp_path / "set",)))


def test_the_record_has_format_split_and_patients(tiny_bundle: Bundle, films: Path) -> None:
    record = calibrated(tiny_bundle, CalibrationOptions((films,), "min-max", evaluation_set=(films,)))
    (source,), (evaluated,) = record.sources, record.evaluation_sources
    assert (source.name, source.layout, source.split, source.images, source.patients) == (
        "data",
        "flat",
        "train",
        10,
        10,
    )
    assert (evaluated.split, evaluated.images, evaluated.patients) == ("test", 3, 3)
    assert {picture.patient for picture in record.pictures} == {f"synthetic-train-{n:05d}" for n in range(10)}
    assert CalibrationRecord.model_validate_json(record.model_dump_json()) == record


def test_a_record_of_an_earlier_version_still_loads() -> None:
    earlier = {
        "schema_version": 1, "graph": "image_encoder", "graph_sha256": "0" * 64, "method": "min-max",
        "percentile": None, "pictures": [{"name": "a.png", "sha256": "1" * 64, "pixels_sha256": "2" * 64}],
        "evaluation_pictures": 3, "ranges": {"image": 2.5},
    }  # fmt: skip
    record = CalibrationRecord.model_validate_json(json.dumps(earlier))
    assert (record.sources, record.evaluation_sources, record.patients) == ((), (), 0)
    assert record.describe() == ["Calibration: 1 image, from a version that did not record it"]


def test_an_unreadable_image_is_left_out_and_named(films: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(films / "images", folder)
    (folder / "torn.png").write_bytes((films / "images" / "train-00000.png").read_bytes()[:200])
    chosen, whole = (choose_pictures(CalibrationOptions((place,))) for place in (folder, films / "images"))
    assert chosen.paths == tuple(folder / path.name for path in whole.paths)
    ((reason,),) = [chosen.failed]
    assert reason.startswith("torn.png cannot be decoded")
    assert f"Left out: {reason}" in chosen.describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (CalibrationOptions(()), "give --calibration DIR"),
        (CalibrationOptions((Path("."),), "median"), "no calibration method 'median'"),  # type: ignore[arg-type]
        (CalibrationOptions((Path("."),), percentile=0.999), "must be above 50 and at most 100, got 0.999"),
        (CalibrationOptions((Path("."),), limit=0), "limit of 0"),
    ],
)
def test_invalid_options_are_refused(options: CalibrationOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_pictures(options)


def test_min_max_ranges_are_the_largest_values_of_the_graph(tiny_bundle: Bundle, films: Path) -> None:
    record = calibrated(tiny_bundle, CalibrationOptions((films,), "min-max"))
    assert record.graph_sha256 == tiny_bundle.graph("image_encoder").sha256
    assert (record.method, record.percentile, len(record.pictures)) == ("min-max", None, 10)
    model = onnx.load(tiny_bundle.path / "graphs/image_encoder.onnx")
    tensor = next(node.output[0] for node in model.graph.node if node.op_type == "Relu")
    model.graph.output.append(onnx.helper.make_tensor_value_info(tensor, 1, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = [np.asarray(Image.open(p), np.float32) / 255 for p in sorted((films / "images").glob("train-*"))]
    inputs = [to_input(pixels, TINY_HW, tiny_bundle.manifest.preprocessing) for pixels in images]
    largest = max(np.abs(session.run([tensor], {"image": image})[0]).max() for image in inputs)
    assert record.ranges[tensor] == pytest.approx(largest, rel=1e-5)
    assert record.ranges["image"] == pytest.approx(max(np.abs(i).max() for i in inputs), rel=1e-6)


def test_the_cache_is_used_only_for_the_same_images_and_method(
    tiny_bundle: Bundle, films: Path, tmp_path: Path
) -> None:
    def is_cached(options: CalibrationOptions) -> bool:
        lines: list[str] = []
        records.append(calibrated(tiny_bundle, options, lines))
        return any("are in" in line for line in lines)

    records: list[CalibrationRecord] = []
    options = CalibrationOptions((films,), "min-max", cache=tmp_path / "cache")
    assert not is_cached(options)
    assert is_cached(options)
    assert records[0] == records[1]
    assert not is_cached(replace(options, method="percentile"))
    assert not is_cached(replace(options, limit=9))
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("damage", ["range", "bytes", "shape"])
def test_an_altered_cache_entry_is_reported_and_recomputed(
    damage: str, tiny_bundle: Bundle, films: Path, tmp_path: Path
) -> None:
    options = CalibrationOptions((films,), "min-max", cache=tmp_path)
    first = calibrated(tiny_bundle, options)
    (entry,) = tmp_path.iterdir()
    content = json.loads(entry.read_text())
    content["ranges"]["image"] = 99.0
    entry.write_text({"range": json.dumps(content), "bytes": "{torn", "shape": "[1]"}[damage])
    lines: list[str] = []
    assert calibrated(tiny_bundle, options, lines) == first
    assert any("was altered; calibrating again" in line for line in lines)
    assert calibrated(tiny_bundle, options) == first


def test_the_cache_is_below_xdg_cache_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache() == Path("/somewhere/cclip-deploy/calibration")
