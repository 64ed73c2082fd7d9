"""Reading DICOM: LUTs, windows, polarity, depth, padding, and refused files."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cclip_deploy.errors import EnvironmentIssue, ImageError
from cclip_deploy.imaging.dicom import read_dicom
from cclip_deploy.imaging.reading import read_image

pydicom = pytest.importorskip("pydicom", reason="DICOM is an extra: pip install 'cclip-deploy[medical]'")

IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED, JPEG_LOSSLESS, MPEG2 = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.100"


def real_file(name: str) -> Path:
    """A file of the installed package pydicom-data; never from the network."""
    spec = importlib.util.find_spec("data_store")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("pydicom-data is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / "data" / name


def write_dicom(
    path: Path, stored: np.ndarray, syntax: str = EXPLICIT, bits: int | None = None, **elements: Any
) -> Path:
    """A secondary capture with the pixels `stored`, (H, W) or (H, W, 3), and any further elements by keyword."""
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    dataset.Rows, dataset.Columns = stored.shape[:2]
    dataset.SamplesPerPixel = 1 if stored.ndim == 2 else 3
    if stored.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = "MONOCHROME2" if stored.ndim == 2 else "RGB"
    dataset.BitsAllocated = 8 * stored.dtype.itemsize
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = 1 if stored.dtype.kind == "i" else 0
    swapped = stored.byteswap() if syntax == BIG_ENDIAN else stored
    data = swapped.tobytes()
    dataset.add_new("PixelData", "OB" if stored.dtype.itemsize == 1 else "OW", data + bytes(len(data) % 2))
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path, enforce_file_format=True)
    return path


def lut_item(first: int, bits: int, entries: list[int], vr: str = "US") -> Any:
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries) % 2**16, first, bits])
    item.add_new("LUTData", vr, np.array(entries, "<u2").tobytes() if vr == "OW" else entries)
    return item


RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def test_linear_window_follows_the_standard(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP, bits=12, WindowCenter=2048, WindowWidth=1000)
    x = RAMP.astype(np.float64)
    # PS3.3 C.11.2.1.2.1, with y from 0 to 1.
    expected = ((x - (2048 - 0.5)) / (1000 - 1) + 0.5) * 1.0
    expected = np.where(x <= 2048 - 0.5 - 999 / 2, 0, np.where(x > 2048 - 0.5 + 999 / 2, 1, expected))
    picture = read_dicom(path)
    assert (picture.kind, picture.bits, picture.pixels.dtype.name) == ("dicom", 12, "float32")
    np.testing.assert_allclose(picture.pixels, expected, atol=1e-6)


def test_linear_exact_and_sigmoid_windows_follow_the_standard(tmp_path: Path) -> None:
    x = RAMP.astype(np.float64)
    shared: dict[str, Any] = {"bits": 12, "WindowCenter": 2000, "WindowWidth": 800}
    exact = read_dicom(write_dicom(tmp_path / "a.dcm", RAMP, VOILUTFunction="LINEAR_EXACT", **shared))
    np.testing.assert_allclose(exact.pixels, np.clip((x - 2000) / 800 + 0.5, 0, 1), atol=1e-6)
    sigmoid = read_dicom(write_dicom(tmp_path / "b.dcm", RAMP, VOILUTFunction="SIGMOID", **shared))
    np.testing.assert_allclose(sigmoid.pixels, 1 / (1 + np.exp(-4 * (x - 2000) / 800)), atol=1e-6)


@pytest.mark.parametrize("center", [100, 100.5])
def test_window_of_width_one_is_a_threshold(tmp_path: Path, center: float) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP, bits=12, WindowCenter=center, WindowWidth=1)
    np.testing.assert_array_equal(read_dicom(path).pixels, np.greater(RAMP, center - 0.5).astype(np.float32))


def test_first_of_several_windows_is_used(tmp_path: Path) -> None:
    one = write_dicom(tmp_path / "a.dcm", RAMP, bits=12, WindowCenter=500, WindowWidth=400)
    two = write_dicom(tmp_path / "b.dcm", RAMP, bits=12, WindowCenter=[500, 3000], WindowWidth=[400, 100])
    np.testing.assert_array_equal(read_dicom(one).pixels, read_dicom(two).pixels)


def test_rescale_comes_before_the_window(tmp_path: Path) -> None:
    elements: dict[str, Any] = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 401}
    path = write_dicom(tmp_path / "a.dcm", RAMP, bits=12, **elements)
    hounsfield = RAMP.astype(np.float64) - 1024
    np.testing.assert_allclose(read_dicom(path).pixels, np.clip((hounsfield - 39.5) / 400 + 0.5, 0, 1), atol=1e-6)


@pytest.mark.parametrize("slope", [2.5, -2.5])
def test_rescale_without_window_is_stretched(tmp_path: Path, slope: float) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP[:2] + 100, bits=12, RescaleSlope=slope, RescaleIntercept=7)
    ramp = np.arange(128).reshape(2, 64) / 127
    np.testing.assert_allclose(read_dicom(path).pixels, ramp if slope > 0 else 1 - ramp, atol=1e-6)


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN])
@pytest.mark.parametrize(
    ("dtype", "bits"),
    [(np.uint8, 8), (np.uint16, 12), (np.uint16, 15), (np.uint16, 16), (np.int16, 12), (np.int16, 16)],
)
def test_every_depth_and_sign_is_stretched_to_unit_range(tmp_path: Path, syntax: str, dtype: Any, bits: int) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype is np.int16 else (0, 2**bits - 1)
    stored = np.linspace(low, high, 35).astype(np.int64).reshape(5, 7).astype(dtype)
    picture = read_dicom(write_dicom(tmp_path / "a.dcm", stored, syntax=syntax, bits=bits))
    assert picture.bits == bits
    np.testing.assert_allclose(picture.pixels, (stored.astype(np.float64) - low) / (high - low), atol=1e-6)


def test_unused_high_bits_are_no_part_of_the_value(tmp_path: Path) -> None:
    clean = write_dicom(tmp_path / "a.dcm", RAMP, bits=12)
    dirty = write_dicom(tmp_path / "b.dcm", RAMP | 0xA000, bits=12)
    np.testing.assert_array_equal(read_dicom(clean).pixels, read_dicom(dirty).pixels)


@pytest.mark.parametrize("window", [{}, {"WindowCenter": 2048, "WindowWidth": 1000}])
def test_monochrome1_is_the_inverse_of_monochrome2(tmp_path: Path, window: dict[str, Any]) -> None:
    two = read_dicom(write_dicom(tmp_path / "two.dcm", RAMP, bits=12, **window))
    one = read_dicom(
        write_dicom(tmp_path / "one.dcm", RAMP, bits=12, PhotometricInterpretation="MONOCHROME1", **window)
    )
    np.testing.assert_allclose(one.pixels, 1 - two.pixels.astype(np.float64), atol=1e-6)
    assert two.pixels[0, 0] == 0


@pytest.mark.parametrize("vr", ["US", "OW"])
def test_voi_lut_is_preferred_to_the_window(tmp_path: Path, vr: str) -> None:
    entries = [int(65535 * (i / 4095) ** 2) for i in range(4096)]
    elements: dict[str, Any] = {"VOILUTSequence": [lut_item(0, 16, entries, vr)], "WindowCenter": 1, "WindowWidth": 2}
    path = write_dicom(tmp_path / "a.dcm", RAMP, bits=12, **elements)
    np.testing.assert_allclose(read_dicom(path).pixels, np.array(entries)[RAMP] / 65535, atol=1e-6)


def test_voi_lut_of_8_bit_entries_does_not_wrap(tmp_path: Path) -> None:
    entries = [i * 255 // 4095 for i in range(4096)]
    path = write_dicom(tmp_path / "a.dcm", RAMP, bits=12, VOILUTSequence=[lut_item(0, 8, entries)])
    np.testing.assert_allclose(read_dicom(path).pixels, (RAMP.astype(int) * 255 // 4095) / 255, atol=1e-6)


def test_voi_lut_of_packed_bytes_is_read(tmp_path: Path) -> None:
    item = lut_item(0, 8, list(range(256)))
    item.add_new("LUTData", "OW", bytes(range(256)))
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = write_dicom(tmp_path / "a.dcm", stored, VOILUTSequence=[item])
    np.testing.assert_allclose(read_dicom(path).pixels, stored / 255, atol=1e-6)


def test_voi_lut_ends_hold_beyond_its_range(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP, bits=12, VOILUTSequence=[lut_item(100, 10, [23, 500, 1023])])
    expected = np.select([RAMP <= 100, RAMP == 101], [23, 500], 1023) / 1023
    np.testing.assert_allclose(read_dicom(path).pixels, expected, atol=1e-6)


def test_voi_lut_may_start_below_zero_after_a_rescale(tmp_path: Path) -> None:
    elements: dict[str, Any] = {
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "VOILUTSequence": [lut_item(2**16 - 1024, 12, [*range(4096)])],
    }
    path = write_dicom(tmp_path / "a.dcm", RAMP, bits=12, **elements)
    np.testing.assert_allclose(read_dicom(path).pixels, RAMP / 4095, atol=1e-6)


def test_modality_lut_comes_before_the_window(tmp_path: Path) -> None:
    entries = [65535 - 16 * i for i in range(4096)]
    sequence = [lut_item(0, 16, entries)]
    sequence[0].ModalityLUTType = "US"
    path = write_dicom(
        tmp_path / "a.dcm", RAMP, bits=12, ModalityLUTSequence=sequence, WindowCenter=32768, WindowWidth=65536
    )
    values = np.array(entries, np.float64)[RAMP]
    np.testing.assert_allclose(read_dicom(path).pixels, np.clip((values - 32767.5) / 65535 + 0.5, 0, 1), atol=1e-6)


def test_padding_takes_no_part_in_the_stretch_and_is_black(tmp_path: Path) -> None:
    stored = np.array([[-2000, -2000, 10], [20, 30, 40]], np.int16)
    for name, photometric in (("a", "MONOCHROME2"), ("b", "MONOCHROME1")):
        path = write_dicom(
            tmp_path / f"{name}.dcm", stored, PhotometricInterpretation=photometric, PixelPaddingValue=-2000
        )
        seen = np.array([0, 1 / 3, 2 / 3, 1])
        expected = seen if photometric == "MONOCHROME2" else 1 - seen
        np.testing.assert_allclose(read_dicom(path).pixels.ravel(), [0, 0, *expected], atol=1e-6)


def test_padding_range_is_left_out_whole(tmp_path: Path) -> None:
    stored = np.array([[0, 5, 9, 10, 20]], np.uint16)
    path = write_dicom(tmp_path / "a.dcm", stored, PixelPaddingValue=9, PixelPaddingRangeLimit=0)
    np.testing.assert_allclose(read_dicom(path).pixels, [[0, 0, 0, 0, 1]], atol=1e-6)


@pytest.mark.parametrize("padding", [{}, {"PixelPaddingValue": 7}])
def test_flat_image_is_black(tmp_path: Path, padding: dict[str, Any]) -> None:
    path = write_dicom(tmp_path / "a.dcm", np.full((3, 4), 7, np.uint16), **padding)
    np.testing.assert_array_equal(read_dicom(path).pixels, np.zeros((3, 4)))


def test_empty_window_elements_count_as_absent(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP, bits=12, WindowCenter=None, WindowWidth=None)
    np.testing.assert_allclose(read_dicom(path).pixels, RAMP / 4095, atol=1e-6)


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535)])
def test_rgb_is_divided_by_its_white(tmp_path: Path, dtype: Any, white: int) -> None:
    stored = np.random.default_rng(0).integers(0, white + 1, (4, 6, 3)).astype(dtype)
    np.testing.assert_allclose(read_dicom(write_dicom(tmp_path / "a.dcm", stored)).pixels, stored / white, atol=1e-6)


def test_ybr_becomes_rgb(tmp_path: Path) -> None:
    red = np.tile(np.array([76, 85, 255], np.uint8), (2, 2, 1))  # ITU-T T.871: red is Y 76, Cb 85, Cr 255
    path = write_dicom(tmp_path / "a.dcm", red, PhotometricInterpretation="YBR_FULL")
    np.testing.assert_allclose(read_dicom(path).pixels, np.broadcast_to([1, 0, 0], (2, 2, 3)), atol=2 / 255)


@pytest.mark.parametrize("syntax", [EXPLICIT, BIG_ENDIAN])
def test_palette_gives_its_colors(tmp_path: Path, syntax: str) -> None:
    elements: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    tables = np.array([[0, 65535, 300], [10000, 0, 65535], [1, 2, 3]])
    for color, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        elements[f"{color}PaletteColorLookupTableDescriptor"] = [3, 0, 16]
        order = ">u2" if syntax == BIG_ENDIAN else "<u2"
        elements[f"{color}PaletteColorLookupTableData"] = table.astype(order).tobytes()
    stored = np.array([[0, 1], [2, 2]], np.uint8)
    picture = read_dicom(write_dicom(tmp_path / "a.dcm", stored, syntax=syntax, **elements))
    assert picture.bits == 16
    np.testing.assert_allclose(picture.pixels, np.moveaxis(tables[:, stored], 0, -1) / 65535, atol=1e-6)


def _assert_refused(path: Path, error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        read_image(path)
    for word in (path.name, *words):
        assert word in str(caught.value)


def test_several_frames_are_refused_with_advice(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP, NumberOfFrames=2)
    _assert_refused(path, ImageError, "2 frames", "Save the frame as a separate file")


def test_report_without_image_is_named(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    dataset = pydicom.dcmread(path)
    for name in ("Rows", "Columns", "PixelData"):
        delattr(dataset, name)
    dataset.save_as(path)
    _assert_refused(path, ImageError, "Basic Text SR Storage", "has no image", "Rows, Columns")


def test_missing_pixel_data_is_refused(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(write_dicom(tmp_path / "a.dcm", RAMP))
    del dataset.PixelData
    dataset.save_as(tmp_path / "a.dcm")
    _assert_refused(tmp_path / "a.dcm", ImageError, "cannot be decoded")


@pytest.mark.parametrize(
    "elements",
    [
        {"WindowCenter": 5, "WindowWidth": 0},
        {"WindowCenter": 5, "WindowWidth": -10, "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowCenter": 5, "WindowWidth": 10, "VOILUTFunction": "CUBIC"},
    ],
)
def test_windows_that_the_standard_forbids_are_refused(tmp_path: Path, elements: dict[str, Any]) -> None:
    _assert_refused(write_dicom(tmp_path / "a.dcm", RAMP, **elements), ImageError, "window", "DICOM does not allow")


def test_lut_that_contradicts_its_descriptor_is_refused(tmp_path: Path) -> None:
    short, high = lut_item(0, 16, [1, 2, 3]), lut_item(0, 8, [1, 2, 300])
    short.LUTDescriptor = [4096, 0, 16]
    for item in (short, high):
        path = write_dicom(tmp_path / "a.dcm", RAMP, VOILUTSequence=[item])
        _assert_refused(path, ImageError, "lookup table of 3 entries")


def test_overflowing_rescale_is_refused(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP, RescaleSlope="1e308", RescaleIntercept="1e308")
    _assert_refused(path, ImageError, "overflows")


def test_missing_decoder_names_the_package(tmp_path: Path) -> None:
    pixel_data = pydicom.encaps.encapsulate([bytes(10)])
    dataset = pydicom.dcmread(write_dicom(tmp_path / "a.dcm", RAMP))
    dataset.PixelData = pixel_data
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = JPEG_LOSSLESS
    dataset.save_as(tmp_path / "a.dcm")
    if pydicom.pixels.get_decoder(JPEG_LOSSLESS).is_available:
        pytest.skip("a decoder for JPEG Lossless is installed here")
    _assert_refused(tmp_path / "a.dcm", EnvironmentIssue, "JPEG Lossless", "pip install", "pylibjpeg-libjpeg")


@pytest.mark.parametrize("syntax", [MPEG2, DEFLATED, "1.2.3.4"])
def test_syntaxes_that_cannot_be_read_are_named(tmp_path: Path, syntax: str) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP)
    element, uid = b"\x02\x00\x10\x00UI", syntax.encode() + bytes(len(syntax) % 2)
    before, after = path.read_bytes().split(element + b"\x14\x00" + EXPLICIT.encode() + b"\0")
    path.write_bytes(before + element + len(uid).to_bytes(2, "little") + uid + after)
    _assert_refused(path, ImageError, "which is not supported", "Convert it")


def test_missing_pydicom_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(EnvironmentIssue, match=r"pip install 'cclip-deploy\[medical\]'"):
        read_image(path)


def test_real_chest_radiograph_has_dark_lungs_and_dark_air() -> None:
    picture = read_image(real_file("RG1_UNCR.dcm"))
    assert (picture.pixels.shape, picture.bits, picture.kind) == ((1955, 1841), 15, "dicom")
    lung, spine = picture.pixels[200:260, 570:640].mean(), picture.pixels[600:1300, 860:960].mean()
    air = picture.pixels[120:180, 10:60].mean()
    assert air < lung < spine
    assert spine - lung > 0.3


@pytest.mark.parametrize(
    ("plain", "packed"),
    [
        ("RG3_UNCR.dcm", "RG3_J2KR.dcm"),
        ("693_UNCR.dcm", "693_J2KR.dcm"),
        ("US1_UNCR.dcm", "US1_J2KR.dcm"),
        ("OBXXXX1A.dcm", "OBXXXX1A_rle.dcm"),
        ("OBXXXX1A.dcm", "OBXXXX1A_expb.dcm"),
        ("SC_rgb.dcm", "SC_rgb_expb.dcm"),
    ],
)
def test_real_files_are_the_same_in_every_lossless_encoding(plain: str, packed: str) -> None:
    np.testing.assert_array_equal(read_image(real_file(plain)).pixels, read_image(real_file(packed)).pixels)


@pytest.mark.parametrize("name", ["mlut_18.dcm", "vlut_04.dcm", "MR-SIEMENS-DICOM-WithOverlays.dcm", "RG1_UNCI.dcm"])
def test_real_files_agree_with_pydicom_s_own_chain(name: str) -> None:
    dataset = pydicom.dcmread(real_file(name))
    values = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
    values = pydicom.pixels.apply_voi_lut(values, dataset).astype(np.float64)
    if "WindowCenter" in dataset:
        low, high = 0, 2**dataset.BitsStored - 1
    elif "VOILUTSequence" in dataset:
        low, high = 0, 2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
    else:
        low, high = values.min(), values.max()
    expected = (values - low) / (high - low)
    expected = 1 - expected if dataset.PhotometricInterpretation == "MONOCHROME1" else expected
    np.testing.assert_allclose(read_image(real_file(name)).pixels, expected, atol=1e-6)
