"""Pictures made to break the reader: each ends in an ImageError that names the file, quietly, quickly and small."""

from __future__ import annotations

import io
import os
import resource
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cclip_deploy.data.images import Picture, decoding, find_pictures, read_picture
from cclip_deploy.errors import CclipError, ImageError


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, rows: bytes, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), *extra, png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encoded(kind: str, shape: tuple[int, ...] = (40, 30, 3)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    options = {"TIFF": {"compression": "tiff_lzw"}}.get(kind, {})
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def dicom() -> bytes:
    pydicom = pytest.importorskip("pydicom", reason="DICOM is an extra: pip install 'cclip-deploy[medical]'")
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 20, 30, 1
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.WindowCenter, dataset.WindowWidth, dataset.RescaleSlope, dataset.RescaleIntercept = 700, 900, 2, -5
    dataset.add_new("PixelData", "OW", np.arange(600, dtype="<u2").tobytes())
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


MAKERS: dict[str, Callable[[], bytes]] = {
    "png": lambda: encoded("PNG"),
    "jpeg": lambda: encoded("JPEG"),
    "tiff": lambda: encoded("TIFF"),
    "bmp": lambda: encoded("BMP"),
    "dicom": dicom,
}


def read_bytes(path: Path, data: bytes) -> Picture | CclipError:
    """What comes of the bytes: a sound picture, or an error that names the file; anything else fails the test."""
    path.write_bytes(data)
    try:
        picture = read_picture(path)
    except CclipError as error:
        return error if str(path) in str(error) else pytest.fail(f"the message does not name the file: {error}")
    assert picture.pixels.dtype == np.float32
    assert picture.pixels.min() >= 0
    assert picture.pixels.max() <= 1
    return picture


@pytest.mark.parametrize("kind", MAKERS)
def test_every_truncation_before_the_pixels_end_is_an_error(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = MAKERS[kind]()
    for part in (1, 8, 20, 60, 140, 200, len(data) // 4, len(data) // 2, len(data) * 3 // 4, len(data) - 40):
        assert isinstance(read_bytes(tmp_path / "a", data[:part]), ImageError), part
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", MAKERS)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_changed_bytes_give_a_picture_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    changed = bytearray(MAKERS[kind]())
    # Headers lie in the first hundreds of bytes, for DICOM after its preamble; most pixels do no harm.
    start = 132 if kind == "dicom" else 0
    places = st.integers(start, min(len(changed), start + 400) - 1) | st.integers(0, len(changed) - 1)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=6)):
        changed[place] = value
    read_bytes(tmp_path_factory.mktemp("changed") / "a", bytes(changed))


@given(
    st.binary(max_size=400),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"BM", bytes(128) + b"DICM"]),
)
@settings(deadline=None, max_examples=150)
def test_noise_behind_any_signature_is_an_error(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, signature: bytes
) -> None:
    assert isinstance(read_bytes(tmp_path_factory.mktemp("noise") / "a.png", signature + noise), CclipError)


def peak_kilobytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("side", [10_000, 60_000, 2**31 - 1])
def test_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, side: int) -> None:
    before = peak_kilobytes()
    error = read_bytes(tmp_path / "bomb.png", png(side, side, bytes(10_000_000)))
    assert isinstance(error, ImageError)
    if side < 2**31 - 1:
        assert "Reduce or crop the picture" in str(error)
    assert peak_kilobytes() - before < 100_000


def test_bomb_in_the_text_of_a_png_is_refused(tmp_path: Path) -> None:
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000)))
    before = peak_kilobytes()
    read_bytes(tmp_path / "a.png", png(4, 4, bytes(20), text))
    assert peak_kilobytes() - before < 100_000


@pytest.mark.parametrize(("rows", "columns", "words"), [(60_000, 30, "cannot be decoded"), (60_000, 60_000, "Reduce")])
def test_dicom_that_claims_more_pixels_than_it_has_is_an_error(
    tmp_path: Path, rows: int, columns: int, words: str
) -> None:
    data = dicom()
    for element, value in ((b"\x28\x00\x10\x00US\x02\x00", rows), (b"\x28\x00\x11\x00US\x02\x00", columns)):
        at = data.index(element) + len(element)
        data = data[:at] + struct.pack("<H", value) + data[at + 2 :]
    error = read_bytes(tmp_path / "a.dcm", data)
    assert isinstance(error, ImageError)
    assert words in str(error)


def test_dicom_of_nested_sequences_is_an_error(tmp_path: Path) -> None:
    head = dicom()
    head = head[: head.index(b"\x08\x00\x16\x00UI")]
    open_sequence = b"\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    assert isinstance(read_bytes(tmp_path / "a.dcm", head + open_sequence * 20_000), ImageError)


def test_deflated_dicom_bomb_is_refused_unopened(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="DICOM is an extra: pip install 'cclip-deploy[medical]'")
    uid = b"1.2.840.10008.1.2.1.99"
    element = b"\x02\x00\x10\x00UI" + struct.pack("<H", len(uid)) + uid
    group = b"\x02\x00\x00\x00UL\x04\x00" + struct.pack("<I", len(element))
    deflate = zlib.compressobj(wbits=-15)
    bomb = deflate.compress(bytes(200_000_000)) + deflate.flush()
    before = peak_kilobytes()
    error = read_bytes(tmp_path / "a.dcm", bytes(128) + b"DICM" + group + element + bomb)
    assert "Deflated" in str(error)
    assert peak_kilobytes() - before < 100_000


@pytest.mark.parametrize(
    "data",
    [
        b"GIF89a" + bytes(100),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/etc/passwd) run\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.",
        b"P5\n99999 99999\n255\n",
    ],
)
def test_other_formats_are_not_even_tried(tmp_path: Path, data: bytes) -> None:
    error = read_bytes(tmp_path / "a.png", data)
    assert isinstance(error, ImageError)
    assert "is not a complete PNG, JPEG, TIFF, BMP or DICOM file" in str(error)


def test_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ImageError, match="not a regular file"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(ImageError, match="has no picture"):
        find_pictures([tmp_path])


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no /dev/zero")
def test_endless_device_is_refused() -> None:
    with pytest.raises(ImageError, match="not a regular file"):
        read_picture(Path("/dev/zero"))


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 5000 + ".png", "-rf", "nowhere/../../a.png"])
def test_odd_paths_are_errors(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError):
        read_picture(tmp_path / name)


def test_circular_links_end(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    assert [path.name for path in find_pictures([tmp_path])] == ["a.png"]
    with pytest.raises(ImageError, match=r"self\.png"):
        read_picture(tmp_path / "self.png")


def test_damaged_exif_says_nothing_on_the_screen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0" + bytes(30), b"Exif\0\0II*\0\xff\xff\xff\xff"):
        buffer = io.BytesIO()
        Image.new("L", (8, 8), 99).save(buffer, "JPEG", exif=exif)
        read_bytes(tmp_path / "a.jpg", buffer.getvalue())
    assert capfd.readouterr() == ("", "")


def test_no_warning_leaks(tmp_path: Path) -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x09\0\0\0\xf0"
    Image.new("L", (8, 8), 99).save(tmp_path / "a.jpg", exif=exif)
    with warnings.catch_warnings(record=True) as from_pillow:
        warnings.simplefilter("always")
        with Image.open(tmp_path / "a.jpg") as image:
            image.getexif()
    assert from_pillow, "this file should make Pillow warn"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_bytes(tmp_path / "a.jpg", (tmp_path / "a.jpg").read_bytes())
    assert caught == []


def test_readers_in_several_threads_take_turns(tmp_path: Path) -> None:
    """`warnings.filters` is the process's own: interleaved readers would leave the wrong ones behind."""
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    thread = threading.Thread(target=read_picture, args=(tmp_path / "a.png",))
    before = warnings.filters
    with decoding(tmp_path / "b.png"):
        thread.start()
        thread.join(timeout=0.3)
        assert thread.is_alive()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert warnings.filters is before


def test_reading_loads_no_torch() -> None:
    code = (
        "import sys; import cclip_deploy.data.masks, cclip_deploy.data.preprocess, cclip_deploy.data.dicom;"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'tensorrt', 'pydicom'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
