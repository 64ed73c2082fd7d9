"""Images from paths, bytes, files, arrays, Pillow and pydicom: one result, one set of limits."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image

from cclip_deploy.common import limits
from cclip_deploy.errors import ImageError, UsageError
from cclip_deploy.imaging import image as image_module
from cclip_deploy.imaging import reading, sources
from cclip_deploy.imaging.reading import read_image
from cclip_deploy.imaging.sources import ImageSource, read_source
from tests.attacks.test_hostile_pictures import png
from tests.imaging.test_dicom import write_dicom

RNG = np.random.default_rng(11)
GRAY8 = RNG.integers(0, 256, (5, 7)).astype(np.uint8)
GRAY16 = RNG.integers(0, 65536, (5, 7)).astype(np.uint16)
COLOR = RNG.integers(0, 256, (5, 7, 3)).astype(np.uint8)
ENCODED: dict[str, Callable[[Path], ImageSource]] = {
    "path": lambda path: path,
    "str": str,
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "BytesIO": lambda path: io.BytesIO(path.read_bytes()),
    "file": lambda path: path.open("rb"),
    "spooled": lambda path: _spooled(path.read_bytes()),
}


def _spooled(content: bytes) -> Any:
    """What a web framework holds an upload in."""
    file = tempfile.SpooledTemporaryFile()  # noqa: SIM115
    file.write(content)
    file.seek(0)
    return file


@pytest.mark.parametrize("how", ENCODED)
@pytest.mark.parametrize("name", ["gray.png", "deep.png", "color.jpg", "color.tif", "film.dcm"])
def test_a_file_gives_the_same_pixels_however_it_is_given(tmp_path: Path, name: str, how: str) -> None:
    path = tmp_path / name
    if name == "film.dcm":
        write_dicom(path, GRAY16 // 16, bits=12, PixelSpacing=[0.2, 0.1])
    else:
        Image.fromarray({"gray.png": GRAY8, "deep.png": GRAY16}.get(name, COLOR)).save(path)
    expected, source = read_image(path), ENCODED[how](path)
    found = read_source(source)
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    assert (found.kind, found.bits, found.spacing_mm) == (expected.kind, expected.bits, expected.spacing_mm)
    getattr(source, "close", lambda: None)()


@pytest.mark.parametrize("values", [GRAY8, GRAY16, COLOR], ids=["gray8", "gray16", "color"])
def test_an_array_and_a_pillow_image_give_the_pixels_of_their_file(tmp_path: Path, values: np.ndarray) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(values).save(path)
    expected = read_image(path)
    for source in (values, Image.fromarray(values), values.astype(values.dtype.newbyteorder(">"))):
        found = read_source(source)
        np.testing.assert_array_equal(found.pixels, expected.pixels)
        assert (found.pixels.dtype, found.bits) == (np.float32, expected.bits)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(read_source(opened).pixels, expected.pixels)


def test_colors_of_many_values_stay_sixteen_bits_deep() -> None:
    deep = RNG.integers(0, 65536, (4, 5, 3)).astype(np.uint16)
    np.testing.assert_allclose(read_source(deep).pixels, deep / 65535, atol=1e-7)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_floats_in_unit_range_are_taken_as_they_are(kind: type) -> None:
    values = RNG.random((6, 4)).astype(kind)
    found = read_source(values)
    assert (found.pixels.dtype, found.bits) == (np.float32, 32)
    np.testing.assert_array_equal(found.pixels, values.astype(np.float32))


def test_a_picture_is_returned_as_it_is(tmp_path: Path) -> None:
    Image.fromarray(GRAY8).save(tmp_path / "a.png")
    picture = read_image(tmp_path / "a.png")
    assert read_source(picture) is picture


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_dataset_gives_the_pixels_of_its_file(tmp_path: Path, photometric: str) -> None:
    path = write_dicom(
        tmp_path / "a.dcm", GRAY16 // 16, bits=12, WindowCenter=2000, WindowWidth=3000, RescaleSlope=2,
        RescaleIntercept=-100, PhotometricInterpretation=photometric,
    )  # fmt: skip
    dataset = pydicom.dcmread(path)
    found = read_source(dataset)
    np.testing.assert_array_equal(found.pixels, read_image(path).pixels)
    assert found.kind == "dicom"


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [([0.25, 0.5], (0.25, 0.5)), ([0, 1], None), ([-1, 1], None), ("1", None), ([1, 2, 3], None), (None, None)],
)
def test_the_pixel_spacing_is_read_or_left_out(
    tmp_path: Path, spacing: Any, expected: tuple[float, float] | None
) -> None:
    path = write_dicom(tmp_path / "a.dcm", GRAY8, **({} if spacing is None else {"PixelSpacing": spacing}))
    assert read_image(path).spacing_mm == expected
    assert read_source(pydicom.dcmread(path)).spacing_mm == expected


def test_the_spacing_at_the_detector_is_not_that_of_the_body(tmp_path: Path) -> None:
    assert read_image(write_dicom(tmp_path / "a.dcm", GRAY8, ImagerPixelSpacing=[0.1, 0.1])).spacing_mm is None


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 5), np.int32), "an array of int32, for which white is not known"),
        (np.zeros((4, 5), bool), "an array of bool, for which white is not known"),
        (np.zeros((4, 5), complex), "complex128"),
        (np.full((4, 5), 200.0), r"from 200 to 200; floats must be from 0 .* array / 255"),
        (np.full((4, 5), np.nan), "from nan to nan"),
        (np.full((4, 5), np.inf), "from inf"),
        (np.full((4, 5), -0.1), "from -0.1"),
        (np.zeros((4, 5, 1), np.uint8), r"Use array\[\.\.\., 0\]"),
        (np.zeros((4, 5, 4), np.uint8), r"Blend the alpha channel, or use array\[\.\.\., :3\]"),
        (np.zeros((3, 40, 50), np.uint8), r"np\.moveaxis\(array, 0, -1\)"),
        (np.zeros((1, 40, 50), np.uint8), r"Use array\[0\]"),
        (np.zeros((8, 40, 50), np.uint8), r"give a list: list\(array\)"),
        (np.zeros((8, 40, 50, 3), np.uint8), r"give a list: list\(array\)"),
        (np.zeros(7, np.uint8), r"expected \(H, W\) or \(H, W, 3\)"),
        (np.zeros((0, 5), np.uint8), "declared as 5x0 pixels"),
        (np.zeros((2, 2**15 + 1), np.uint8), "declared as 32769x2 pixels"),
    ],
)
def test_an_unclear_array_is_refused_with_what_to_do(array: np.ndarray, words: str) -> None:
    with pytest.raises(ImageError, match=f"^The image .*{words}"):
        read_source(array)


def test_twelve_bits_in_sixteen_are_warned_of() -> None:
    """They would be almost black, and the mask wrong without a word."""
    (warning,) = read_source(GRAY16 // 16).warnings
    assert "array / 4095" in warning
    assert read_source(GRAY16).warnings == ()
    assert read_source(np.zeros((3, 3), np.uint16)).warnings == ()


@pytest.mark.parametrize("source", [None, 3, [GRAY8], {"a": 1}, object()])
def test_objects_of_other_types_are_refused(source: Any) -> None:
    with pytest.raises(UsageError, match=rf"^Image 3 is of type {type(source).__name__}\. Give a path, bytes"):
        read_source(source, "Image 3")


def test_a_text_file_and_an_asynchronous_one_are_refused() -> None:
    class Upload:
        async def read(self, size: int) -> bytes:
            return b""

    with pytest.raises(UsageError, match=r"gave str, not bytes\. Open the file in binary mode"):
        read_source(io.StringIO("image"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"of Upload gave coroutine, .* such as upload\.file"):
        read_source(Upload())  # type: ignore[arg-type]


def test_a_file_that_was_read_before_says_how_to_go_back() -> None:
    file = io.BytesIO(b"something")
    file.read()
    with pytest.raises(ImageError, match=r"is empty .* file\.seek\(0\)"):
        read_source(file)


def _as_dataset(path: Path) -> Any:
    return pydicom.dcmread(path)


def _as_pillow(path: Path) -> Any:
    return Image.open(path)


@pytest.mark.parametrize("how", [*ENCODED, "pillow"])
def test_a_bomb_is_refused_however_it_is_given(tmp_path: Path, how: str) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(30_000, 5_000, bytes(100)))
    assert limits.MAX_PIXELS < 30_000 * 5_000
    with pytest.warns(Image.DecompressionBombWarning) if how == "pillow" else _nothing():
        source = _as_pillow(path) if how == "pillow" else ENCODED[how](path)
    with pytest.raises(ImageError, match="declared as 30000x5000 pixels"):
        read_source(source)
    source.close() if hasattr(source, "close") else None


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_a_dataset_that_declares_too_much_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    dataset = _as_dataset(write_dicom(tmp_path / "a.dcm", GRAY8))
    dataset.Rows = dataset.Columns = 60_000
    with pytest.raises(ImageError, match=r"a\.dcm is declared as 60000x60000 pixels"):
        read_source(dataset)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.__delattr__("PixelData"), "has no pixel data. Read it without stop_before_pixels"),
        (lambda d: d.__delattr__("Rows"), "has no image: it lacks Rows"),
        (lambda d: setattr(d, "NumberOfFrames", 3), "has 3 frames"),
        (lambda d: d.__delattr__("file_meta"), r"Set dataset\.file_meta\.TransferSyntaxUID"),
        (lambda d: setattr(d, "PixelData", b"\0\0"), "cannot be decoded"),
    ],
)
def test_a_faulty_dataset_is_refused(tmp_path: Path, change: Callable[[Any], None], words: str) -> None:
    dataset = _as_dataset(write_dicom(tmp_path / "a.dcm", GRAY8))
    change(dataset)
    with pytest.raises(ImageError, match=words):
        read_source(dataset)


def test_content_over_the_limit_of_a_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reading, sources):
        monkeypatch.setattr(module, "LARGEST_PICTURE_FILE", 1000)
    asked: list[int] = []

    class Endless:
        def read(self, size: int) -> bytes:
            asked.append(size)
            return bytes(400)

    for source in (bytes(1001), io.BytesIO(bytes(5000)), Endless()):
        with pytest.raises(ImageError, match="has more than 1,000 bytes"):
            read_source(source)
    assert len(asked) == 3


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.ppm"])
def test_pillow_images_of_other_formats_are_refused_until_they_are_copied(tmp_path: Path, name: str) -> None:
    """Pillow runs external programs for some formats, when their pixels are first needed."""
    Image.fromarray(GRAY8).save(tmp_path / name, lossless=True)
    with Image.open(tmp_path / name) as opened:
        with pytest.raises(ImageError, match=r"is of the format \w+; supported are .* give image\.copy\(\)"):
            read_source(opened)
        assert read_source(opened.copy()).pixels.shape[:2] == (5, 7)


def test_a_rotated_tiff_that_pillow_misreads_is_refused(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.tif"
    Image.fromarray(GRAY8).save(path, exif=exif)
    with (
        Image.open(path) as opened,
        pytest.raises(ImageError, match=r"misreads such .* Give the path itself"),
    ):
        read_source(opened)
    with path.open("rb") as file, Image.open(file) as opened:
        np.testing.assert_array_equal(read_source(opened).pixels, read_image(path).pixels)


def test_errors_of_images_in_memory_name_them() -> None:
    with pytest.raises(ImageError, match=r"^Image 2 is not a complete PNG"):
        read_source(b"nothing", "Image 2")
    with pytest.raises(ImageError, match=r"^Image 2 cannot be decoded"):
        read_source(png(64, 64, bytes(65 * 64))[:60], "Image 2")


def test_the_size_check_of_every_kind_is_the_one_function(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With smaller limits, each kind is refused; before, only files were checked."""
    path, film = tmp_path / "a.png", write_dicom(tmp_path / "a.dcm", GRAY8)
    Image.fromarray(GRAY8).save(path)
    monkeypatch.setattr(image_module, "MAX_PIXELS", 34)
    for source in (path, path.read_bytes(), GRAY8, Image.fromarray(GRAY8), film, film.read_bytes(), _as_dataset(film)):
        with pytest.raises(ImageError, match="declared as 7x5 pixels"):
            read_source(source)
