"""`predict` writes masks at the size of the image files and reports unreadable images."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import EnvironmentIssue, ImageError, PromptError, UsageError
from cclip_deploy.imaging.preprocess import to_source
from cclip_deploy.imaging.reading import read_image
from cclip_deploy.inference import predict as pipeline
from cclip_deploy.inference.predict import READ_AHEAD, WRITE_BEHIND, PredictOptions, predict
from cclip_deploy.inference.prediction import refuse_failures
from cclip_deploy.inference.prompt_cache import CacheCounts
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from tests.conftest import THREADS
from tests.imaging.test_dicom import write_dicom

PROMPTS = ["left lung", "Two infected areas, upper right."]
RNG = np.random.default_rng(5)


class Brightness:
    """A network whose mask is where the picture is brighter than its prompt's number of words says; it counts runs."""

    name, precision = "brightness", "fp32"

    def __init__(self) -> None:
        self.runs: list[str] = []

    def load(self, graph: str) -> None: ...

    def unload(self, graph: str) -> None: ...

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.runs.append(graph)
        if graph == "image_encoder":
            return {"features": inputs["image"].mean(axis=1, keepdims=True)}
        if graph == "prompt_encoder":
            words = (inputs["tokens"] != 0).sum(axis=1).astype(np.float32)
            kernel, tap_bias = np.zeros((len(words), 9, 1), np.float32), np.zeros((len(words), 9), np.float32)
            return {"kernel": kernel, "tap_bias": tap_bias, "bias": words}
        return {"logits": 4 * inputs["features"] - 0.1 * inputs["bias"][None, :, None, None]}


@pytest.fixture
def fake() -> Brightness:
    return Brightness()


@pytest.fixture
def fast(tiny_bundle: Bundle, fake: Brightness) -> Segmenter:
    return Segmenter.of_bundle(tiny_bundle, fake)


@pytest.fixture
def real(tiny_bundle: Bundle) -> Segmenter:
    return Segmenter.of_bundle(tiny_bundle, OnnxRuntimeBackend(tiny_bundle, threads=THREADS))


def save_png(path: Path, shape: tuple[int, ...] = (50, 40), dtype: type = np.uint8) -> Path:
    Image.fromarray(RNG.integers(0, np.iinfo(dtype).max, shape).astype(dtype)).save(path)
    return path


def read_png(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_each_image_is_encoded_once_for_all_prompts(fast: Segmenter, fake: Brightness, tmp_path: Path) -> None:
    pictures = [save_png(tmp_path / f"{n}.png") for n in range(3)]
    found = predict(fast, pictures, [*PROMPTS, "heart"], tmp_path / "out")
    assert fake.runs.count("image_encoder") == 3
    assert fake.runs.count("mask_decoder") == 3
    assert fake.runs.count("prompt_encoder") == 1
    assert [(row.image, row.prompt) for row in found.done] == [(p, q) for p in pictures for q in (*PROMPTS, "heart")]


def kinds(folder: Path) -> list[tuple[Path, tuple[int, int]]]:
    """A picture of every kind that is read, with its height and width."""
    film = RNG.integers(0, 4096, (48, 36)).astype(np.uint16)
    return [
        (save_png(folder / "gray8.png"), (50, 40)),
        (save_png(folder / "deep.png", (33, 70), np.uint16), (33, 70)),
        (save_png(folder / "color.png", (20, 30, 3)), (20, 30)),
        (save_png(folder / "alpha.png", (20, 31, 4)), (20, 31)),
        (save_png(folder / "photo.jpg", (64, 96, 3)), (64, 96)),
        (write_dicom(folder / "film.dcm", film, bits=12, WindowCenter=2048, WindowWidth=3000), (48, 36)),
        (write_dicom(folder / "negative.dcm", film, bits=12, PhotometricInterpretation="MONOCHROME1"), (48, 36)),
    ]


def test_masks_and_probabilities_have_the_size_of_the_source(fast: Segmenter, tmp_path: Path) -> None:
    pictures = kinds(tmp_path)
    found = predict(fast, [path for path, _ in pictures], ["lung"], tmp_path / "out")
    assert found.failed == ()
    for row, (path, (height, width)) in zip(found.done, pictures, strict=True):
        assert row.image == path
        mask, probability = (read_png(p) for p in (row.written.mask, row.written.probability))
        assert mask.shape == probability.shape == (height, width)
        assert mask.dtype == np.uint8
        assert probability.dtype == np.uint16
        assert set(np.unique(mask)) <= {0, 255}
        assert read_png(row.written.overlay).ndim == 3


def test_files_and_numbers_are_those_of_the_segmenter(real: Segmenter, tmp_path: Path) -> None:
    pictures = [path for path, _ in kinds(tmp_path)]
    found = predict(real, pictures, PROMPTS, tmp_path / "out")
    rows = iter(found.done)
    for path in pictures:
        for probability in real.probabilities(read_image(path).pixels, PROMPTS):
            row = next(rows)
            inside = probability >= 0.5
            np.testing.assert_array_equal(read_png(row.written.mask) == 255, inside)
            deep = read_png(row.written.probability).astype(np.float64) / 65535
            np.testing.assert_allclose(deep, probability, atol=0.6 / 65535)
            assert row.area_share == pytest.approx(float(inside.mean()))
            assert row.mean_probability == pytest.approx(float(probability.astype(np.float64).mean()), rel=1e-5)
            if inside.any():
                assert row.mean_probability_inside == pytest.approx(float(probability[inside].mean()), rel=1e-5)


def test_a_negative_film_gives_the_mask_of_its_positive(real: Segmenter, tmp_path: Path) -> None:
    film = RNG.integers(0, 4096, (64, 96)).astype(np.uint16)
    positive = write_dicom(tmp_path / "a.dcm", film, bits=12)
    negative = write_dicom(tmp_path / "b.dcm", 4095 - film, bits=12, PhotometricInterpretation="MONOCHROME1")
    one, two = predict(real, [positive, negative], PROMPTS[:1], tmp_path / "out").done
    assert one.mean_probability == pytest.approx(two.mean_probability, abs=1e-4)
    assert one.area_share == pytest.approx(two.area_share, abs=1e-3)


def test_answers_do_not_depend_on_the_order_or_number_of_prompts(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = save_png(tmp_path / "a.png", (64, 96))
    prompts = [*PROMPTS, "heart", "spine", "rib"]

    def means(asked: list[str], folder: str) -> dict[str, float]:
        fresh = Segmenter.of_bundle(tiny_bundle, OnnxRuntimeBackend(tiny_bundle, threads=THREADS))
        return {row.prompt: row.mean_probability for row in predict(fresh, [path], asked, tmp_path / folder).done}

    together = means(prompts, "a")
    assert means(prompts[::-1], "b") == pytest.approx(together, abs=1e-5)
    assert means([prompts[2]], "c") == pytest.approx({prompts[2]: together[prompts[2]]}, abs=1e-5)
    assert len({round(value, 4) for value in together.values()}) > 1


def test_json_names_the_files_and_numbers(fast: Segmenter, tmp_path: Path) -> None:
    path = save_png(tmp_path / "a.png")
    row = predict(fast, [path], ["lung"], tmp_path / "out").done[0]
    told = row.to_dict()
    assert told.keys() == {
        "image", "prompt", "files", "area_share", "area_px", "area_mm2", "mean_probability",
        "mean_probability_inside", "box", "region_count", "warnings",
    }  # fmt: skip
    assert told["image"] == str(path)
    files = told["files"]
    assert isinstance(files, dict)
    assert files.keys() == {"mask", "probability", "overlay"}
    assert sorted(files.values()) == sorted(str(tmp_path / "out" / name) for name in os.listdir(tmp_path / "out"))


def test_an_empty_mask_has_no_probability_inside(fast: Segmenter, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((30, 30), np.uint8)).save(tmp_path / "dark.png")
    row = predict(fast, [tmp_path / "dark.png"], ["lung"], tmp_path / "out").done[0]
    assert (row.area_share, row.mean_probability_inside) == (0, None)
    assert 0 < row.mean_probability < 0.5


def test_the_threshold_is_the_bundles_unless_one_is_given(fast: Segmenter, tmp_path: Path) -> None:
    path = save_png(tmp_path / "a.png", (64, 96))
    own = predict(fast, [path], ["lung"], tmp_path / "a").done[0]
    assert predict(fast, [path], ["lung"], tmp_path / "b", PredictOptions(0.5)).done[0].area_share == own.area_share
    shares = [
        predict(fast, [path], ["lung"], tmp_path / "c", PredictOptions(t)).done[0].area_share for t in (0.2, 0.5, 0.9)
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[2]
    for threshold in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="is not between 0 and 1"):
            predict(fast, [path], ["lung"], tmp_path / "d", PredictOptions(threshold))
    assert not (tmp_path / "d").exists()


def test_an_unreadable_image_is_reported_and_the_others_are_segmented(fast: Segmenter, tmp_path: Path) -> None:
    folder = tmp_path / "films"
    folder.mkdir()
    for name in ("a.png", "c.png", "e.png"):
        save_png(folder / name)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "d.dcm").write_bytes(b"no film")
    seen: list[tuple[str, int, int]] = []
    found = predict(fast, [folder], PROMPTS, tmp_path / "out", on_picture=lambda p, n, of: seen.append((p.name, n, of)))
    assert [row.image.name for row in found.done] == [name for name in ("a.png", "c.png", "e.png") for _ in PROMPTS]
    assert [path.name for path, _ in found.failed] == ["b.png", "d.dcm"]
    assert all(str(path) in reason for path, reason in found.failed)
    assert len(os.listdir(tmp_path / "out")) == 3 * 2 * 3
    assert seen == [("a.png", 1, 5), ("b.png", 2, 5), ("c.png", 3, 5), ("d.dcm", 4, 5), ("e.png", 5, 5)]
    with pytest.raises(ImageError, match=r"2 of 5 images could not be used \(the others are done\); first: .*b\.png"):
        refuse_failures(found)


def test_a_single_unreadable_image_raises_its_own_error(fast: Segmenter, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    found = predict(fast, [tmp_path / "a.png"], ["lung"], tmp_path / "out")
    with pytest.raises(ImageError, match=r"a\.png is not a complete PNG") as caught:
        refuse_failures(found)
    assert caught.value.exit_code == 6
    refuse_failures(predict(fast, [save_png(tmp_path / "b.png")], ["lung"], tmp_path / "out"))


@pytest.mark.parametrize(
    ("prompts", "error"), [([], UsageError), (["lung", ""], PromptError), (["heart " * 30], PromptError)]
)
def test_prompts_are_refused_before_anything_is_written(
    fast: Segmenter, fake: Brightness, tmp_path: Path, prompts: list[str], error: type[Exception]
) -> None:
    path = save_png(tmp_path / "a.png")
    with pytest.raises(error) as caught:
        predict(fast, [path], prompts, tmp_path / "out")
    assert getattr(caught.value, "exit_code", None) == 2
    assert not (tmp_path / "out").exists()
    assert fake.runs == []


def test_a_missing_image_raises_before_anything_is_written(fast: Segmenter, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        predict(fast, [save_png(tmp_path / "a.png"), tmp_path / "b.png"], ["lung"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_not_a_writable_folder_raises(fast: Segmenter, tmp_path: Path) -> None:
    path = save_png(tmp_path / "a.png")
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="is a file, where a folder"):
        predict(fast, [path], ["lung"], tmp_path / "out")
    with pytest.raises(EnvironmentIssue, match="could not be written"):
        predict(fast, [path], ["lung"], tmp_path / "out" / "deeper")
    assert (tmp_path / "out").read_text() == "mine"


def test_similar_names_of_images_and_prompts_do_not_collide(fast: Segmenter, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_png(tmp_path / folder / "film.png")
    prompts = ["Left lung!", "left lung?", "左肺", "右肺"]
    found = predict(fast, [tmp_path / "a", tmp_path / "b"], prompts, tmp_path / "out")
    assert len({row.written.mask for row in found.done}) == 8
    assert len(os.listdir(tmp_path / "out")) == 24


def test_ten_thousand_prompts_run_in_batches_of_sixteen(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Writing thirty thousand files is not the point, so the segmenter is asked as `predict` asks it."""
    fake = Brightness()
    probabilities = Segmenter.of_bundle(tiny_bundle, fake).probabilities(
        np.zeros((8, 8), np.float32), [f"x {n}" for n in range(10**4)]
    )
    assert sum(p.shape == (8, 8) for p in probabilities) == 10**4
    assert fake.runs.count("image_encoder") == 1
    assert fake.runs.count("mask_decoder") == 625


def test_files_contain_the_output_of_the_network(fast: Segmenter, tmp_path: Path) -> None:
    """Closed form: logits 4 mean(normalized) - 0.1 words, of a picture that is not resized."""
    path = save_png(tmp_path / "a.png", (64, 96))
    row = predict(fast, [path], ["lung"], tmp_path / "out").done[0]
    gray = read_image(path).pixels.astype(np.float64)
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    features = ((gray[..., None] - mean) / std).mean(axis=-1)
    expected = 1 / (1 + np.exp(-(4 * features - 0.3)))  # start, lung, end: three tokens
    deep = read_png(row.written.probability).astype(np.float64) / 65535
    np.testing.assert_allclose(deep, to_source(expected.astype(np.float32), (64, 96)), atol=2e-5)


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cclip-")]


@pytest.mark.parametrize("error", [EnvironmentIssue("No room for masks"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_a_writer_that_fails_stops_the_run_and_leaves_no_thread(
    fast: Segmenter, fake: Brightness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    pictures = [save_png(tmp_path / f"{n:02}.png") for n in range(30)]
    real, calls = pipeline.write_segmentation, []

    def fails_at_the_third(*args: object) -> object:
        calls.append(args)
        if len(calls) == 3:
            raise error
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "write_segmentation", fails_at_the_third)
    with pytest.raises(type(error)):
        predict(fast, pictures, ["lung"], tmp_path / "out")
    assert our_threads() == []
    assert fake.runs.count("image_encoder") <= 3 + WRITE_BEHIND + 1
    names = os.listdir(tmp_path / "out")
    assert len(names) % 3 == 0
    assert not [name for name in names if name.startswith(".")]


def test_a_network_that_fails_leaves_no_thread(
    fast: Segmenter, fake: Brightness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(pixels: np.ndarray, prompts: Sequence[str], *_: object) -> Iterator[np.ndarray]:
        raise KeyboardInterrupt

    monkeypatch.setattr(fast, "probabilities", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(fast, [save_png(tmp_path / f"{n}.png") for n in range(9)], ["lung"], tmp_path / "out")
    assert our_threads() == []


def test_ten_thousand_prompts_hold_few_arrays_in_memory(
    fast: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[np.ndarray] = weakref.WeakSet()
    most = 0
    real = fast.probabilities

    def counted(pixels: np.ndarray, prompts: Sequence[str], *_: object) -> Iterator[np.ndarray]:
        nonlocal most
        for probability in real(pixels, prompts):
            handed = probability.view(Tracked)
            alive.add(handed)
            most = max(most, len(alive))
            yield handed

    class Tracked(np.ndarray):
        __hash__ = object.__hash__  # type: ignore[assignment]
        __eq__ = object.__eq__  # type: ignore[assignment]

    monkeypatch.setattr(fast, "probabilities", counted)
    monkeypatch.setattr(pipeline, "write_segmentation", lambda *args: None)
    prompts = [f"rib {n}" for n in range(10_000)]
    found = predict(fast, [save_png(tmp_path / "a.png", (8, 8))], prompts, tmp_path / "out")
    assert [row.prompt for row in found.done] == prompts
    assert 1 <= most <= WRITE_BEHIND + 3
    assert sum(found.prompt_counts.to_dict().values()) == 10_000


def test_only_a_few_images_are_read_ahead(fast: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [save_png(tmp_path / f"{n:02}.png") for n in range(20)]
    read: list[Path] = []
    distance: list[int] = []
    monkeypatch.setattr(pipeline, "read_image", lambda path: (read.append(path), read_image(path))[1])
    predict(
        fast,
        pictures,
        ["lung"],
        tmp_path / "out",
        on_picture=lambda path, number, total: distance.append(len(read) - number),
    )
    assert max(distance) <= READ_AHEAD
    assert read == pictures


def test_counts_are_those_of_this_run(tiny_bundle: Bundle, tmp_path: Path) -> None:
    film = save_png(tmp_path / "a.png")
    segmenter = Segmenter.of_bundle(tiny_bundle, OnnxRuntimeBackend(tiny_bundle, threads=THREADS), tmp_path / "cache")
    first = predict(segmenter, [film, film], PROMPTS, tmp_path / "out").prompt_counts
    assert (first.misses, first.disk_hits, first.rebuilt) == (2, 0, 0)
    assert predict(segmenter, [film], PROMPTS, tmp_path / "out").prompt_counts.misses == 0
    again = Segmenter.of_bundle(tiny_bundle, OnnxRuntimeBackend(tiny_bundle, threads=THREADS), tmp_path / "cache")
    assert predict(again, [film], PROMPTS, tmp_path / "out").prompt_counts == CacheCounts(memory_hits=2, disk_hits=2)
