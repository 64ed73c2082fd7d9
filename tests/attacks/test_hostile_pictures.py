"""Malicious images are refused with an ImageError that names the file, without warnings, in bounded time and memory."""

from __future__ import annotations

import io
import os
import re
import resource
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cclip_deploy.datasets.mask_file import read_mask
from cclip_deploy.errors import CclipError, ImageError
from cclip_deploy.imaging.dicom_frames import unpacked_bytes
from cclip_deploy.imaging.image import Picture, decoding
from cclip_deploy.imaging.reading import find_images, image_size, read_image
from cclip_deploy.imaging.segmentation import Segmentation
from cclip_deploy.imaging.writing import write_segmentation
from tests.attacks.memory import within


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, rows: bytes, *extra: bytes, bits: int = 8, color: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), *extra, png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encoded(kind: str, shape: tuple[int, ...] = (40, 30, 3)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    options = {"TIFF": {"compression": "tiff_lzw"}}.get(kind, {})
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def dicom(rows: int = 20, columns: int = 30) -> bytes:
    pydicom = pytest.importorskip("pydicom", reason="DICOM is an extra: pip install 'cclip-deploy[medical]'")
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = rows, columns, 1
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.WindowCenter, dataset.WindowWidth, dataset.RescaleSlope, dataset.RescaleIntercept = 700, 900, 2, -5
    dataset.add_new("PixelData", "OW", (np.arange(rows * columns) % 4096).astype("<u2").tobytes())
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
        picture = read_image(path)
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
def test_changed_bytes_give_an_image_or_an_error(
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
        assert "Reduce or crop the image" in str(error)
    assert peak_kilobytes() - before < 100_000


def test_bomb_in_the_text_of_a_png_is_refused(tmp_path: Path) -> None:
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000)))
    before = peak_kilobytes()
    read_bytes(tmp_path / "a.png", png(4, 4, bytes(20), text))
    assert peak_kilobytes() - before < 100_000


@pytest.mark.parametrize(("rows", "columns", "words"), [(30_000, 30, "cannot be decoded"), (60_000, 60_000, "Reduce")])
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


@pytest.mark.parametrize("tag", [b"\x02\0\x10\0", b"\x08\0\x16\0", b"\x28\0\x06\x30", b"\xe0\x7f\x10\0"])
@pytest.mark.parametrize("kind", [b"OB", b"UN", b"OW", b"UT"])
def test_a_dicom_element_that_says_4_gb_takes_no_memory(tmp_path: Path, tag: bytes, kind: bytes) -> None:
    """Before, Python set the 4 GB aside before it read the 30 bytes that are left."""
    path = tmp_path / "a.dcm"
    head = dicom()[: 132 if tag[0] == 2 else dicom().index(b"\x08\x00\x16\x00UI")]
    path.write_bytes(head + tag + kind + b"\0\0\xfe\xff\xff\xff" + bytes(30))
    for read in (read_image, image_size):
        said = within(50, lambda read=read: read(path))
        assert said.startswith("ImageError: ")
        assert "memory" not in said.lower()


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


RGB, RGBA = 2, 6
HUGE: dict[str, Callable[[], bytes]] = {
    # Before: six files of 0.4 MB like this took 8.8 GB.
    "RGB of 16 bits": lambda: png(8192, 8192, bytes(10**6), bits=16, color=RGB),
    "RGBA": lambda: png(8000, 6000, bytes(10**6), color=RGBA),
    # Before: a MemoryError, in the resize to the network's size and back.
    "a line": lambda: png(67_108_864, 1, bytes(67_108_865)),
    "a column": lambda: png(1, 67_108_864, bytes(10**6)),
    "a tile": lambda: tiff_of_one_tile(2**20, 2**10),
    "a palette": lambda: png(8000, 8000, bytes(10**6), png_chunk(b"PLTE", bytes(3)), color=3),
}


def tiff_of_one_tile(width: int, length: int) -> bytes:
    """16x16 pixels in one tile that says it is far larger, deflated."""
    data = zlib.compress(bytes(10**6))
    entries = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, width), (323, length), (324, 200)]
    entries.append((325, len(data)))
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + fields + struct.pack("<I", 0)
    return head.ljust(200, b"\0") + data


@pytest.mark.parametrize("kind", HUGE)
def test_an_image_too_large_for_its_channels_sides_or_tiles_is_refused_in_50_mib(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(HUGE[kind]())
    for read in (read_image, read_mask, image_size):
        said = within(50, lambda read=read: read(path))
        assert said.startswith("ImageError: ")
        assert "Reduce or crop the image" in said


def test_the_largest_images_take_little_more_than_their_own_pixels(tmp_path: Path) -> None:
    """Before, 16-bit gray was made float64 and divided there: five times its float32 pixels.

    The pixels of 4096x4096 as float32 are 64 MiB; the decoder's own buffer is half of that.
    """
    path = tmp_path / "a.png"
    path.write_bytes(png(4096, 4096, bytes((2 * 4096 + 1) * 4096), bits=16))
    assert within(64 + 2 * 32 + 48, lambda: read_image(path).pixels.shape) == "tuple: (4096, 4096)"
    data = dicom(4096, 4096)
    (tmp_path / "a.dcm").write_bytes(data)
    assert within(64 + 3 * 32 + 96, lambda: read_image(tmp_path / "a.dcm").pixels.shape) == "tuple: (4096, 4096)"


def test_a_mask_of_the_largest_size_is_written_in_little_memory(tmp_path: Path) -> None:
    """Before, the probability was multiplied in float64, and the overlay in three float32 copies."""
    pixels = np.zeros((4096, 4096), np.float32)
    picture = Picture(tmp_path / "a.png", pixels, "png", 8)
    said = within(150, lambda: write_segmentation(picture, Segmentation("x", pixels, 0.5), tmp_path, "a"))
    assert said.startswith("WrittenMask: ")


def test_a_decoder_without_memory_is_the_pictures_failure(tmp_path: Path) -> None:
    """In a process of its own: one that has run many tests may have so much free memory already."""
    path = tmp_path / "a.png"
    path.write_bytes(png(6000, 6000, bytes(6001 * 6000)))
    code = (
        "import sys; from pathlib import Path\n"
        "from cclip_deploy.imaging.reading import read_image; from tests.attacks.memory import within\n"
        "print(within(20, lambda: read_image(Path(sys.argv[1]))))"
    )
    root = Path(__file__).parents[2]
    said = subprocess.run(
        [sys.executable, "-c", code, path], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert said.startswith("ImageError: ")
    assert "takes more memory to decode than there is" in said


CHUNKS = {
    "a compressed profile": png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(400_000_000), 9)),
    "compressed texts": png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(900_000), 9)) * 100,
    "an international text": png_chunk(b"iTXt", b"x\0\1\0\0\0" + zlib.compress(bytes(400_000_000), 9)),
    "an EXIF of many tags": png_chunk(b"eXIf", b"II*\0\x08\0\0\0" + struct.pack("<H", 65535) + bytes(12 * 65535)),
    "an EXIF of huge counts": png_chunk(
        b"eXIf",
        b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 274, 3, 2**31, 8) + struct.pack("<HHII", 282, 5, 2**30, 8),
    ),
    "a chunk that says 2 GB": struct.pack(">I", 2**31 - 1) + b"tEXt" + b"x" * 100,
}


@pytest.mark.parametrize("kind", CHUNKS)
def test_bombs_in_what_is_beside_the_pixels_take_no_memory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(4, 4, bytes(20), CHUNKS[kind]))
    said = within(150, lambda: read_bytes(path, path.read_bytes()))
    assert said.split(":")[0] in ("Picture", "ImageError")
    assert "MemoryError" not in said
    assert "more memory" not in said


def test_tags_of_huge_counts_take_no_memory(tmp_path: Path) -> None:
    data = bytearray(encoded("TIFF"))
    start = struct.unpack_from("<I", data, 4)[0]
    for entry in range(struct.unpack_from("<H", data, start)[0]):
        changed = bytearray(data)
        struct.pack_into("<I", changed, start + 2 + 12 * entry + 4, 2**31 - 1)
        (tmp_path / "a.tif").write_bytes(changed)
        said = within(100, lambda: read_bytes(tmp_path / "a.tif", (tmp_path / "a.tif").read_bytes()))
        assert said.split(":")[0] in ("Picture", "ImageError")
        assert "more memory" not in said


def test_a_chain_of_many_pages_is_refused_at_the_second(tmp_path: Path) -> None:
    """Before, all pages were counted; 100,000 empty ones in 600 kB are refused unread."""
    data = encoded("TIFF")
    start = struct.unpack_from("<I", data, 4)[0]
    end = start + 2 + 12 * struct.unpack_from("<H", data, start)[0]
    pages = b"".join(struct.pack("<HI", 0, len(data) + 6 * (n + 1)) for n in range(100_000))
    path = tmp_path / "a.tif"
    path.write_bytes(data[:end] + struct.pack("<I", len(data)) + data[end + 4 :] + pages + bytes(6))
    with counted_calls() as calls, pytest.raises(ImageError, match="several pages"):
        read_image(path)
    assert calls[0] < 5000


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """Counts calls of functions, in Python and in C."""
    calls = [0]

    def profile(frame: object, event: str, argument: object) -> None:
        calls[0] += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(None)


RLE, JPEG, JPEG_2000 = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90"


def compressed_dicom(syntax: str, frame: bytes, rows: int, columns: int, bits: int = 8) -> bytes:
    from pydicom.encaps import encapsulate

    pydicom = pytest.importorskip("pydicom", reason="DICOM is an extra: pip install 'cclip-deploy[medical]'")
    dataset = pydicom.dcmread(io.BytesIO(dicom()))
    dataset.Rows, dataset.Columns, dataset.BitsAllocated, dataset.BitsStored = rows, columns, bits, bits
    dataset.HighBit = bits - 1
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def rle(runs: bytes) -> bytes:
    return struct.pack("<16I", 1, 64, *[0] * 14) + runs


def coded(kind: str, side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (side, side), 77).save(buffer, kind)
    return buffer.getvalue()


FRAMES: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "RLE": (RLE, lambda side: rle(b"".join(bytes([257 - n, 77]) for n in [64] * (side * side // 64)))),
    "JPEG": (JPEG, lambda side: coded("JPEG", side)),
    "JPEG 2000": (JPEG_2000, lambda side: coded("JPEG2000", side)),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_a_compressed_dicom_is_read_where_its_size_is_the_headers_and_refused_where_not(
    tmp_path: Path, kind: str
) -> None:
    """Before, a JPEG of 13,000x13,000 in a file of 10x10 was unpacked, and then found to be too long."""
    syntax, make = FRAMES[kind]
    path = tmp_path / "a.dcm"
    picture = read_bytes(path, compressed_dicom(syntax, make(64), 64, 64))
    assert isinstance(picture, Picture), picture
    assert picture.pixels.shape == (64, 64)
    if kind != "RLE":
        path.write_bytes(compressed_dicom(syntax, make(6000), 64, 64))
        said = within(30, lambda: read_image(path))
        assert said.startswith("ImageError: ")
        assert "the compressed image inside is 6000x6000" in said


def test_runs_that_unpack_to_far_more_than_the_image_are_counted_first(tmp_path: Path) -> None:
    """Before, 4 MB of runs unpacked to 256 MB, and each further one to 64."""
    path = tmp_path / "a.dcm"
    path.write_bytes(compressed_dicom(RLE, rle(b"\x81\x07" * 2_000_000), 64, 64))
    said = within(60, lambda: read_image(path))
    assert said.startswith("ImageError: ")
    assert "unpack to far more" in said


@given(st.binary(max_size=300))
def test_runs_are_counted_as_pydicom_unpacks_them(segment: bytes) -> None:
    decoder = pytest.importorskip("pydicom.pixels.decoders.rle")
    counted = unpacked_bytes(segment)
    assert (
        len(decoder._rle_decode_segment(segment)) <= counted <= len(decoder._rle_decode_segment(segment + bytes(129)))
    )


@pytest.mark.parametrize(
    "element", [b"\x28\0\x02\0US\x02\0", b"\x28\0\x10\0US\x02\0", b"\x28\0\x11\0US\x02\0", b"\x28\0\x00\x01US\x02\0"]
)
@pytest.mark.parametrize("value", [0, 1, 7, 64, 32_000, 65_535])
def test_dicom_headers_of_any_size_take_no_memory(tmp_path: Path, element: bytes, value: int) -> None:
    """Samples, rows, columns and bits, each in turn."""
    data = dicom()
    at = data.index(element) + len(element)
    path = tmp_path / "a.dcm"
    path.write_bytes(data[:at] + struct.pack("<H", value) + data[at + 2 :])
    said = within(100, lambda: read_bytes(path, path.read_bytes()))
    assert said.split(":")[0] in ("Picture", "ImageError")
    assert "more memory" not in said


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
        read_image(tmp_path / "a.png")
    with pytest.raises(ImageError, match="has no image"):
        find_images([tmp_path])


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no /dev/zero")
def test_endless_device_is_refused() -> None:
    with pytest.raises(ImageError, match="not a regular file"):
        read_image(Path("/dev/zero"))


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 5000 + ".png", "-rf", "nowhere/../../a.png"])
def test_odd_paths_are_errors(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError):
        read_image(tmp_path / name)


def test_circular_links_end(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    assert [path.name for path in find_images([tmp_path])] == ["a.png"]
    with pytest.raises(ImageError, match=r"self\.png"):
        read_image(tmp_path / "self.png")


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
    thread = threading.Thread(target=read_image, args=(tmp_path / "a.png",))
    before = warnings.filters
    with decoding(tmp_path / "b.png"):
        thread.start()
        thread.join(timeout=0.3)
        assert thread.is_alive()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert warnings.filters is before


def test_images_are_opened_in_one_place_with_a_list_of_formats() -> None:
    """Before, masks were opened with every format that Pillow knows, one of which starts Ghostscript."""
    root = Path(__file__).parents[2]
    sources = [
        path
        for name in ("cclip_deploy", "benchmarks", "engines", "export", "training")
        for path in (root / name).rglob("*.py")
    ]
    opening = re.compile(r"\bImage\.open\(|\bimread\(|\bdcmread\(|(?<!def )\bpixel_array\(")
    found = {path.parent.name + "/" + path.name: opening.findall(path.read_text()) for path in sources}
    assert {name: len(calls) for name, calls in found.items() if calls} == {
        "imaging/reading.py": 1, "imaging/dicom.py": 4,
    }  # fmt: skip
    assert "Image.open(file, formats=_FORMATS)" in (root / "cclip_deploy/imaging/reading.py").read_text()


def test_reading_loads_no_torch() -> None:
    code = (
        "import sys; import cclip_deploy.imaging.writing, cclip_deploy.imaging.preprocess, cclip_deploy.imaging.dicom;"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'tensorrt', 'pydicom'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
