"""The Python API: `Segmenter.load` and `segment`, with one result per image and prompt, from many threads."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from cclip_deploy import BackendConfig, Bundle, CclipError, Segmentation, Segmenter
from cclip_deploy.errors import BundleError, EnvironmentIssue, ImageError, PromptError, UsageError
from cclip_deploy.imaging.reading import read_image
from cclip_deploy.inference import segmenter as segmenter_module
from cclip_deploy.inference.predict import predict
from cclip_deploy.inference.segmenter import IMAGES_AT_ONCE
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from tests.conftest import THREADS
from tests.gpu.machine import provider_reason
from tests.imaging.test_dicom import write_dicom
from tests.inference.test_segmenter import Recording

RNG = np.random.default_rng(4)
FILM = RNG.integers(0, 256, (50, 40)).astype(np.uint8)
PROMPTS = ["left lung", "Two infected areas, upper right."]


@pytest.fixture(scope="module")
def segmenter(tiny_bundle_path: Path) -> Iterator[Segmenter]:
    with Segmenter.load(tiny_bundle_path, threads=THREADS) as loaded:
        yield loaded


@pytest.fixture
def recording(tiny_bundle: Bundle) -> Recording:
    return Recording(OnnxRuntimeBackend(tiny_bundle, threads=THREADS))


def test_one_image_and_a_string_give_one_result(segmenter: Segmenter) -> None:
    """Before, `prompts="left lung"` was nine prompts, one for each letter."""
    result = segmenter.segment(FILM, "left lung")
    assert isinstance(result, Segmentation)
    assert (result.prompt, result.mask.shape, result.mask.dtype) == ("left lung", (50, 40), bool)
    assert result.probability.dtype == np.float32
    (expected,) = segmenter.probabilities(FILM / np.float32(255), "left lung")
    np.testing.assert_array_equal(result.probability, expected)
    np.testing.assert_array_equal(result.mask, expected >= 0.5)
    assert result.area_px == int((expected >= 0.5).sum())


def test_lists_of_images_and_prompts_give_lists(segmenter: Segmenter) -> None:
    one_image = segmenter.segment(FILM, PROMPTS)
    assert [result.prompt for result in one_image] == PROMPTS
    one_prompt = segmenter.segment([FILM, FILM[::-1]], "left lung")
    assert [result.prompt for result in one_prompt] == ["left lung"] * 2
    both = segmenter.segment((FILM, FILM[::-1]), PROMPTS)
    assert [[result.prompt for result in of_image] for of_image in both] == [PROMPTS, PROMPTS]
    assert len(segmenter.segment([FILM], PROMPTS[:1])) == 1
    assert len(segmenter.segment([FILM], PROMPTS[:1])[0]) == 1


def test_a_batch_gives_what_each_image_gives_alone(segmenter: Segmenter) -> None:
    images = [RNG.integers(0, 256, (30 + n, 60 - n)).astype(np.uint8) for n in range(5)]
    prompts = [f"rib {n}" for n in range(18)]
    for image, together in zip(images, segmenter.segment(images, prompts), strict=True):
        for alone, result in zip(segmenter.segment(image, prompts), together, strict=True):
            assert (result.prompt, result.mask.shape) == (alone.prompt, image.shape)
            np.testing.assert_allclose(result.probability, alone.probability, atol=1e-5)


def test_a_batch_takes_one_image_pass_for_eight_images(tiny_bundle: Bundle, recording: Recording) -> None:
    Segmenter.of_bundle(tiny_bundle, recording).segment([FILM] * (2 * IMAGES_AT_ONCE + 3), PROMPTS)
    assert [run for run in recording.runs if run[0] == "image_encoder"] == [
        ("image_encoder", IMAGES_AT_ONCE), ("image_encoder", IMAGES_AT_ONCE), ("image_encoder", 3),
    ]  # fmt: skip
    assert recording.runs.count(("prompt_encoder", 2)) == 1


def test_large_images_pass_in_smaller_groups(
    tiny_bundle: Bundle, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmenter_module, "MOST_PICTURE_BYTES", 2 * FILM.size * 4)
    Segmenter.of_bundle(tiny_bundle, recording).segment([FILM] * 5, "left lung")
    assert [rows for graph, rows in recording.runs if graph == "image_encoder"] == [2, 2, 1]


def _dataset(path: Path) -> object:
    return pydicom.dcmread(path)


@pytest.mark.parametrize(
    "how", [Path, str, Path.read_bytes, lambda p: io.BytesIO(p.read_bytes()), read_image, _dataset]
)
def test_every_kind_of_image_gives_the_mask_of_its_file(
    segmenter: Segmenter, tmp_path: Path, how: Callable[[Path], object]
) -> None:
    film = RNG.integers(0, 4096, (48, 36)).astype(np.uint16)
    path = write_dicom(tmp_path / "film.dcm", film, bits=12, PixelSpacing=[0.5, 0.25])
    expected = predict(segmenter, [path], "left lung", tmp_path / "out").done[0]
    result = segmenter.segment(how(path), "left lung")  # type: ignore[call-overload]
    with Image.open(expected.written.mask) as mask:
        np.testing.assert_array_equal(np.asarray(mask) == 255, result.mask)
    assert (result.area_share, result.mean_probability) == (expected.area_share, expected.mean_probability)
    assert result.area_mm2 == result.area_px * 0.125


def test_a_spacing_can_be_given(segmenter: Segmenter) -> None:
    result = segmenter.segment(FILM, "left lung", spacing_mm=(0.5, 2.0), threshold=0.01)
    assert result.area_px > 0
    assert result.area_mm2 == result.area_px
    assert segmenter.segment(FILM, "left lung").area_mm2 is None
    with pytest.raises(UsageError, match="is not two positive numbers"):
        segmenter.segment(FILM, "left lung", spacing_mm=(0.0, 1.0))


def test_prompts_are_repaired_as_in_predict_and_doubts_are_told(segmenter: Segmenter) -> None:
    right, typed = (segmenter.segment(FILM, text) for text in ("upper left lung", "uppper lefft lung"))
    assert typed.prompt == "upper left lung"
    np.testing.assert_array_equal(typed.probability, right.probability)
    assert right.warnings == ()
    assert typed.warnings == ("Repaired prompt 'uppper lefft lung': 'uppper' to 'upper', 'lefft' to 'left'",)
    left_alone = segmenter.segment(FILM, "uppper lefft lung", repair=False)
    assert (left_alone.prompt, left_alone.warnings) == ("uppper lefft lung", ())
    (warning,) = segmenter.segment(FILM, "no infection in the left lung").warnings
    assert warning.startswith("The prompt 'no infection in the left lung' may not be understood: no.")
    assert "array / 4095" in segmenter.segment(FILM.astype(np.uint16), "heart").warnings[0]


def test_the_threshold_is_the_bundles_unless_one_is_given(segmenter: Segmenter) -> None:
    assert segmenter.segment(FILM, "left lung").threshold == segmenter.spec.threshold
    areas = [segmenter.segment(FILM, "left lung", threshold=limit).area_px for limit in (0.01, 0.5, 0.99)]
    assert areas == sorted(areas, reverse=True)
    assert areas[0] > areas[2]
    with pytest.raises(UsageError, match="is not between 0 and 1"):
        segmenter.segment(FILM, "left lung", threshold=1.5)


@pytest.mark.parametrize(
    ("image", "prompts", "error", "words"),
    [
        (FILM, [], UsageError, "There is no prompt"),
        (FILM, "", PromptError, "The prompt is empty"),
        (FILM, ["left lung", "heart " * 30], PromptError, "room for 24"),
        (FILM, ["left lung", 3], UsageError, "The prompt 3 is of type int"),
        ([], "left lung", UsageError, "There is no image"),
        ([FILM, None], "left lung", UsageError, "Image 2 is of type NoneType"),
        ([FILM, b"nothing"], "left lung", ImageError, "^Image 2 is not a complete PNG"),
        ("none.png", "left lung", ImageError, r"none\.png does not exist"),
    ],
)
def test_wrong_calls_are_refused(
    segmenter: Segmenter, image: object, prompts: object, error: type[CclipError], words: str
) -> None:
    with pytest.raises(error, match=words):
        segmenter.segment(image, prompts)  # type: ignore[call-overload]


def test_a_wrong_prompt_is_refused_before_an_image_is_read(segmenter: Segmenter) -> None:
    file = io.BytesIO(b"nothing")
    with pytest.raises(PromptError):
        segmenter.segment(file, ["left lung", ""])
    assert file.tell() == 0


def test_loading_says_what_ran_and_closing_ends_it(tiny_bundle_path: Path) -> None:
    with Segmenter.load(str(tiny_bundle_path), "openvino", threads=THREADS) as loaded:
        assert (loaded.opened.ran, loaded.backend.precision) == ("openvino on cpu", "fp32")
        assert repr(loaded) == f"<Segmenter {str(tiny_bundle_path)!r}, openvino on cpu, fp32>"
        by_openvino = loaded.segment(FILM, "left lung").probability
    for use in (lambda: loaded.segment(FILM, "left lung"), loaded.warm_up):
        with pytest.raises(UsageError, match=r"was closed. Load it again: Segmenter\.load\(PATH\)"):
            use()
    loaded.close()
    again = Segmenter.load(Bundle.open(tiny_bundle_path), BackendConfig(threads=THREADS))
    np.testing.assert_allclose(again.segment(FILM, "left lung").probability, by_openvino, atol=1e-4)
    again.close()


def test_a_segmenter_on_an_open_backend_leaves_it_open(tiny_bundle: Bundle, recording: Recording) -> None:
    with Segmenter.of_bundle(tiny_bundle, recording) as borrowed:
        borrowed.segment(FILM, "left lung")
    assert recording.unloads == []
    assert Segmenter.of_bundle(tiny_bundle, recording).segment(FILM, "left lung").mask.shape == (50, 40)


def test_loading_what_is_not_there_is_refused(tiny_bundle_path: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="There is no bundle at"):
        Segmenter.load(tmp_path / "none.cclip")
    with pytest.raises(UsageError, match=r"There is no backend 'onnx'\. Use one of onnxruntime, openvino"):
        Segmenter.load(tiny_bundle_path, "onnx")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"Build it: cclip-deploy build-engine BUNDLE --fp16"):
        Segmenter.load(tiny_bundle_path, precision="fp16")
    with pytest.raises(UsageError, match="threads are out of range"):
        Segmenter.load(tiny_bundle_path, threads=0)


def test_a_prompt_cache_keeps_kernels_between_segmenters(tiny_bundle_path: Path, tmp_path: Path) -> None:
    for misses, disk_hits in ((1, 0), (0, 1)):
        with Segmenter.load(tiny_bundle_path, threads=THREADS, prompt_cache=str(tmp_path / "cache")) as loaded:
            loaded.segment(FILM, "left lung")
            assert (loaded.prompt_counts.misses, loaded.prompt_counts.disk_hits) == (misses, disk_hits)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_eight_threads_get_what_one_gets(tiny_bundle_path: Path, tmp_path: Path, backend: str) -> None:
    """Threads start together on a cold segmenter, share images and prompts, and load each graph once."""
    images: list[object] = [RNG.integers(0, 256, (40, 30 + n)).astype(np.uint8) for n in range(4)]
    Image.fromarray(images[0]).save(tmp_path / "a.png")  # type: ignore[arg-type]
    images += [tmp_path / "a.png", (tmp_path / "a.png").read_bytes()]
    prompts = [f"rib {n}" for n in range(5)]
    jobs = [(image, prompt) for image in images for prompt in prompts] * 2
    with Segmenter.load(tiny_bundle_path, backend, threads=1) as alone:  # type: ignore[arg-type]
        expected = [alone.segment(image, prompt).probability for image, prompt in jobs]  # type: ignore[call-overload]
    start = threading.Barrier(8)
    with Segmenter.load(tiny_bundle_path, backend, threads=1) as shared:  # type: ignore[arg-type]

        def work(first: int) -> list[tuple[int, np.ndarray]]:
            start.wait()
            mine = range(first, len(jobs), 8)
            return [(n, shared.segment(*jobs[n]).probability) for n in mine]  # type: ignore[call-overload]

        with ThreadPoolExecutor(8) as pool:
            for n, probability in (pair for pairs in pool.map(work, range(8)) for pair in pairs):
                np.testing.assert_allclose(probability, expected[n], atol=1e-6)
        assert shared.prompt_counts.misses == len(prompts)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_threads_that_start_together_load_a_graph_once(
    tiny_bundle_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = Bundle.read

    def slow(bundle: Bundle, name: str, *rest: int) -> bytes:
        read.append(name)
        threading.Event().wait(0.05)  # so that the others come meanwhile
        return real(bundle, name, *rest)

    monkeypatch.setattr(Bundle, "read", slow)
    with Segmenter.load(tiny_bundle_path, backend, threads=1) as shared, ThreadPoolExecutor(8) as pool:  # type: ignore[arg-type]
        list(pool.map(lambda _: shared.backend.load("mask_decoder"), range(8)))
    assert read.count("graphs/mask_decoder.onnx") == 1


def test_awaiting_in_a_thread(segmenter: Segmenter) -> None:
    async def both() -> list[Segmentation]:
        calls = (asyncio.to_thread(segmenter.segment, FILM, prompt) for prompt in PROMPTS)
        return await asyncio.gather(*calls)

    assert [result.prompt for result in asyncio.run(both())] == PROMPTS


def test_a_missing_backend_is_an_error_unless_a_fallback_is_allowed(tiny_bundle_path: Path) -> None:
    if provider_reason("cuda") is None:
        pytest.skip("this onnxruntime has CUDA's provider")
    with pytest.raises(EnvironmentIssue):
        Segmenter.load(tiny_bundle_path, BackendConfig(device="cuda"))
    with Segmenter.load(tiny_bundle_path, BackendConfig(device="cuda", threads=1, allow_fallback=True)) as loaded:
        assert (loaded.opened.requested, loaded.opened.ran) == ("onnxruntime on cuda", "onnxruntime on cpu")
        assert loaded.opened.fallback_reason
