"""Reading PNG, JPEG, TIFF and BMP files, and finding image files."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from cclip_deploy.common.limits import MAX_PIXELS
from cclip_deploy.errors import ImageError, UsageError
from cclip_deploy.imaging.reading import find_images, read_image

COLOUR = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [128, 64, 32], [255, 255, 255]]], np.uint8)


def write_png16(path: Path, values: np.ndarray, color_type: int) -> None:
    """A 16-bit PNG by the letter of the standard; Pillow cannot write those with several channels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def write_gray_tiff(path: Path, data: bytes, hw: tuple[int, int], bits: int, photometric: int, sample: int = 1) -> None:
    """An uncompressed gray TIFF of one strip; Pillow cannot write WhiteIsZero, 12 bits or unsigned 32."""
    entries = [(256, hw[1]), (257, hw[0]), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, hw[0])]
    entries += [(279, len(data)), (339, sample)]
    start = 8 + 2 + 12 * len(entries) + 4
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in entries)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(entries)) + fields + struct.pack("<I", 0) + data)


@pytest.mark.parametrize(("suffix", "kind"), [("png", "png"), ("tiff", "tiff"), ("bmp", "bmp")])
def test_eight_bit_color_is_read_exactly(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(COLOUR).save(path)
    picture = read_image(path)
    assert (picture.path, picture.kind, picture.bits) == (path, kind, 8)
    assert picture.pixels.dtype == np.float32
    np.testing.assert_array_equal(picture.pixels, COLOUR.astype(np.float32) / np.float32(255))


@given(values=hnp.arrays(np.uint16, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)))
@settings(deadline=None, max_examples=40)
def test_sixteen_bit_gray_png_keeps_every_level(tmp_path_factory: pytest.TempPathFactory, values: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("deep") / "a.png"
    write_png16(path, values, color_type=0)
    picture = read_image(path)
    assert picture.bits == 16
    np.testing.assert_array_equal(np.rint(picture.pixels.astype(np.float64) * 65535), values)


def test_sixteen_bit_color_png_is_reduced_to_eight_bits_and_says_so(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (4, 5, 3)).astype(np.uint16)
    write_png16(tmp_path / "a.png", values, color_type=2)
    picture = read_image(tmp_path / "a.png")
    assert picture.bits == 8
    np.testing.assert_allclose(picture.pixels, values / 65535, atol=1 / 255)


def test_jpeg_gray_is_close_and_two_dimensional(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    Image.fromarray(ramp).save(tmp_path / "a.jpg", quality=95)
    picture = read_image(tmp_path / "a.jpg")
    assert (picture.kind, picture.bits, picture.pixels.shape) == ("jpeg", 8, (64, 64))
    np.testing.assert_allclose(picture.pixels, ramp / 255, atol=0.02)


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg").pixels[4, 4], [1, 0, 0], atol=0.03)


def test_one_bit_image_is_black_and_white(tmp_path: Path) -> None:
    bits = np.array([[True, False], [False, True]])
    Image.fromarray(bits).save(tmp_path / "a.png")
    picture = read_image(tmp_path / "a.png")
    assert picture.bits == 1
    np.testing.assert_array_equal(picture.pixels, bits.astype(np.float32))


def test_palette_gives_its_colors(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putdata([1, 0])
    image.save(tmp_path / "a.png")
    np.testing.assert_allclose(read_image(tmp_path / "a.png").pixels * 255, [[[200, 100, 0], [10, 20, 30]]], atol=1e-4)


def test_transparent_palette_entry_becomes_black(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putdata([1, 0])
    image.save(tmp_path / "a.png", transparency=bytes([255, 0]))
    np.testing.assert_allclose(read_image(tmp_path / "a.png").pixels * 255, [[[0, 0, 0], [10, 20, 30]]], atol=1e-4)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_blended_with_black(tmp_path: Path, mode: str) -> None:
    value, alpha = 200, 51
    Image.new(mode, (3, 2), (*([value] * (len(mode) - 1)), alpha)).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png").pixels
    assert pixels.shape == ((2, 3) if mode == "LA" else (2, 3, 3))
    np.testing.assert_allclose(pixels, (200 / 255) * (51 / 255), rtol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("suffix", "deep"), [("png", False), ("png", True), ("tiff", False), ("tiff", True)])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str, deep: bool) -> None:
    upright = np.arange(6).reshape(2, 3)
    # EXIF 2.32, 4.6.4 A: which side of the scene the stored row 0 and column 0 are.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored).astype(np.uint16 if deep else np.uint8)).save(
        tmp_path / f"a.{suffix}", exif=exif
    )
    pixels = read_image(tmp_path / f"a.{suffix}").pixels
    np.testing.assert_allclose(pixels * (65535 if deep else 255), upright, atol=1e-3)


def test_sixteen_bit_tiff_where_white_is_zero_is_inverted(tmp_path: Path) -> None:
    values = np.array([[0, 65535], [1000, 30000]], "<u2")
    write_gray_tiff(tmp_path / "a.tif", values.tobytes(), (2, 2), bits=16, photometric=0)
    np.testing.assert_allclose(read_image(tmp_path / "a.tif").pixels, 1 - values / 65535, atol=1e-7)


def test_twelve_bit_tiff_is_divided_by_its_own_white(tmp_path: Path) -> None:
    packed = bytes([0xFF, 0xF0, 0x00, 0x80, 0x01, 0x00])  # 4095, 0 | 2048, 256
    write_gray_tiff(tmp_path / "a.tif", packed, (2, 2), bits=12, photometric=1)
    picture = read_image(tmp_path / "a.tif")
    assert picture.bits == 12
    np.testing.assert_allclose(picture.pixels, np.array([[4095, 0], [2048, 256]]) / 4095, atol=1e-7)


def test_whole_number_tiff_of_32_bits_is_read_on_the_16_bit_scale(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 65535, 100]], np.int32)).save(tmp_path / "a.tif")
    np.testing.assert_allclose(read_image(tmp_path / "a.tif").pixels, [[0, 1, 100 / 65535]], atol=1e-7)


@pytest.mark.parametrize("values", [np.array([[-1, 5]], np.int32), np.array([[0, 70000]], np.int32)])
def test_whole_numbers_off_the_16_bit_scale_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a\.tif has values from .* the allowed range is 0 to 65535"):
        read_image(tmp_path / "a.tif")


def test_float_tiff_in_unit_range_is_read_as_it_is(tmp_path: Path) -> None:
    values = np.array([[0, 0.25, 1]], np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels, values)


@pytest.mark.parametrize("worst", [np.nan, np.inf, 1.5, -0.1])
def test_float_tiff_out_of_unit_range_is_refused(tmp_path: Path, worst: float) -> None:
    Image.fromarray(np.array([[0, worst]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="the allowed range is 0 to 1"):
        read_image(tmp_path / "a.tif")


def test_content_decides_not_the_suffix(tmp_path: Path) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "a.jpg", "PNG")
    assert read_image(tmp_path / "a.jpg").kind == "png"


def test_several_pages_are_refused(tmp_path: Path) -> None:
    page = Image.fromarray(COLOUR)
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page])
    page.save(tmp_path / "a.png", save_all=True, append_images=[page.transpose(Image.Transpose.ROTATE_180)])
    for name in ("a.tif", "a.png"):
        with pytest.raises(ImageError, match=rf"{name} has several pages or frames\. Save the one you want"):
            read_image(tmp_path / name)


def test_phone_jpeg_with_a_second_image_gives_the_first(tmp_path: Path) -> None:
    first, second = Image.new("L", (16, 16), 200), Image.new("L", (16, 16), 10)
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    picture = read_image(tmp_path / "a.jpg")
    assert picture.kind == "jpeg"
    np.testing.assert_allclose(picture.pixels, 200 / 255, atol=0.01)


def test_missing_empty_and_folder_say_so(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    for name, words in (("nowhere.png", "does not exist"), ("empty.png", "is empty"), (".", "is a folder")):
        with pytest.raises(ImageError, match=words):
            read_image(tmp_path / name)


def test_limit_on_pixels_leaves_room_for_the_largest_detectors() -> None:
    assert MAX_PIXELS > 2 * 4800 * 6000


def _touch_picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (2, 2)).save(path, "PNG")
    return path


def test_folders_are_searched_to_the_bottom_in_sorted_order(tmp_path: Path) -> None:
    names = ["b.PNG", "a/z.jpeg", "a/c/y.tif", "c.bmp"]
    for name in names:
        _touch_picture(tmp_path / name)
    for name in ("notes.txt", ".hidden.png", ".cache/x.png", "._b.png"):
        _touch_picture(tmp_path / name)
    found = find_images([tmp_path])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a/c/y.tif", "a/z.jpeg", "b.PNG", "c.bmp"]


def test_dicom_is_found_under_any_name_but_dicomdir_is_not(tmp_path: Path) -> None:
    for name in ("IM000001", "1.2.840.113619.2", "DICOMDIR"):
        (tmp_path / name).write_bytes(bytes(128) + b"DICM")
    (tmp_path / "README").write_text("x" * 200)
    assert [path.name for path in find_images([tmp_path])] == ["1.2.840.113619.2", "IM000001"]


def test_files_keep_the_order_given_and_come_once(tmp_path: Path) -> None:
    b, a = _touch_picture(tmp_path / "b.png"), _touch_picture(tmp_path / "a.png")
    odd = tmp_path / "picture.dat"
    odd.write_bytes(a.read_bytes())
    (tmp_path / "link.png").symlink_to(a)
    assert find_images([b, odd, tmp_path / "." / "b.png", a, tmp_path, tmp_path / "link.png"]) == [b, odd, a]


def test_finding_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none here")
    with pytest.raises(ImageError, match="has no image"):
        find_images([tmp_path])
    with pytest.raises(ImageError, match=r"nowhere\.png does not exist"):
        find_images([tmp_path / "nowhere.png"])
    with pytest.raises(UsageError, match="No image was given"):
        find_images([])


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["PNG", "JPEG", "TIFF", "BMP"]), st.booleans())
@settings(deadline=None, max_examples=40)
def test_any_image_comes_out_in_unit_range_with_its_own_size(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, kind: str, color: bool
) -> None:
    shape = (height, width, 3) if color else (height, width)
    path = tmp_path_factory.mktemp("any") / "a"
    Image.fromarray(np.random.default_rng(height).integers(0, 256, shape).astype(np.uint8)).save(path, kind)
    pixels = read_image(path).pixels
    assert pixels.shape == shape
    assert pixels.dtype == np.float32
    assert pixels.min() >= 0
    assert pixels.max() <= 1
