"""Files of a segmentation, their names, and the overlay."""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from cclip_deploy.errors import EnvironmentIssue, UsageError
from cclip_deploy.imaging.image import Picture
from cclip_deploy.imaging.naming import file_stem
from cclip_deploy.imaging.segmentation import Segmentation
from cclip_deploy.imaging.writing import OVERLAY_LONGEST_PX, WrittenMask, draw_overlay, write_segmentation

CYAN, AMBER = np.array([56, 199, 214]), np.array([255, 179, 71])


def picture_of(height: int, width: int) -> Picture:
    pixels = np.random.default_rng(0).random((height, width)).astype(np.float32)
    return Picture(path=Path("film.png"), pixels=pixels, kind="png", bits=8)


def write(picture: Picture, probability: np.ndarray, folder: Path, stem: str, threshold: float = 0.5) -> WrittenMask:
    """Write a mask of the prompt "left lung"."""
    return write_segmentation(picture, Segmentation("left lung", probability, threshold), folder, stem)


@given(
    probability=hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.floats(0, 1, width=32)
    ),
    threshold=st.floats(0.01, 1),
)
@settings(deadline=None, max_examples=30)
def test_mask_and_probability_are_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory, probability: np.ndarray, threshold: float
) -> None:
    folder = tmp_path_factory.mktemp("masks")
    written = write(picture_of(*probability.shape), probability, folder, "a", threshold)
    with Image.open(written.mask) as mask, Image.open(written.probability) as deep:
        assert (mask.mode, mask.format) == ("L", "PNG")
        np.testing.assert_array_equal(np.asarray(mask), np.where(probability >= threshold, 255, 0))
        assert (deep.mode, deep.format) == ("I;16", "PNG")
        np.testing.assert_allclose(np.asarray(deep) / 65535, probability, rtol=0, atol=0.5 / 65535 + 1e-12)


def test_probability_of_exactly_the_threshold_is_inside(tmp_path: Path) -> None:
    probability = np.array([[0.5, np.nextafter(np.float32(0.5), np.float32(0))]], np.float32)
    written = write(picture_of(1, 2), probability, tmp_path, "a")
    assert np.asarray(Image.open(written.mask)).tolist() == [[255, 0]]


def test_three_files_and_nothing_else_are_left(tmp_path: Path) -> None:
    written = write(picture_of(8, 9), np.zeros((8, 9), np.float32), tmp_path / "new" / "folder", "a")
    names = {written.mask.name, written.probability.name, written.overlay.name}
    assert names == {"a-mask.png", "a-probability.png", "a-overlay.png"}
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == names


def test_second_write_replaces_the_first(tmp_path: Path) -> None:
    for value in (0.0, 1.0):
        written = write(picture_of(4, 4), np.full((4, 4), value), tmp_path, "a")
    assert np.asarray(Image.open(written.mask)).min() == 255


@pytest.mark.parametrize(
    ("probability", "stem", "threshold", "words"),
    [
        (np.zeros((4, 5)), "a", 0.5, "to_source"),
        (np.full((4, 4), 2.0), "a", 0.5, "from 2 to 2"),
        (np.full((4, 4), np.nan), "a", 0.5, "from nan"),
        (np.zeros((4, 4)), "a", 0.0, "Threshold 0.0"),
        (np.zeros((4, 4)), "a", float("nan"), "Threshold nan"),
        (np.zeros((4, 4)), "../a", 0.5, "cannot begin a file name"),
        (np.zeros((4, 4)), "", 0.5, "cannot begin a file name"),
    ],
)
def test_invalid_calls_write_nothing(
    tmp_path: Path, probability: np.ndarray, stem: str, threshold: float, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        write(picture_of(4, 4), probability, tmp_path, stem, threshold)
    assert not list(tmp_path.iterdir())


def _write_and_fail(folder: Path) -> str:
    """Write over an old result, expect an EnvironmentIssue, check that the old is whole; the message."""
    with pytest.raises(EnvironmentIssue) as caught:
        write(picture_of(64, 64), np.ones((64, 64)), folder, "a")
    assert {path.name for path in folder.iterdir()} == {"a-mask.png", "a-probability.png", "a-overlay.png"}
    assert np.asarray(Image.open(folder / "a-mask.png")).max() == 0
    return str(caught.value)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_full_disk_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    write(picture_of(64, 64), np.zeros((64, 64)), tmp_path, "a")
    calls = 0
    write_bytes = Path.write_bytes

    def write_until_full(path: Path, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            write_bytes(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_until_full)
    message = _write_and_fail(tmp_path)
    assert re.search(r"No room for masks in .*No space left on device.*Free space", message)


@contextmanager
def file_size_limit() -> Iterator[None]:
    """No file of this process may grow over 512 bytes: the kernel says EFBIG. Pytest's own output must come after."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_kernel_that_refuses_to_write_leaves_the_old_files(tmp_path: Path) -> None:
    write(picture_of(64, 64), np.zeros((64, 64)), tmp_path, "a")
    with file_size_limit():
        message = _write_and_fail(tmp_path)
    assert "No room for masks" in message


def test_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(EnvironmentIssue, match=r"Masks cannot be written to .*taken"):
        write(picture_of(4, 4), np.zeros((4, 4)), tmp_path / "taken", "a")


def test_interrupt_leaves_no_part_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes = Path.write_bytes

    def interrupt(path: Path, data: bytes) -> int:
        write_bytes(path, data[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(picture_of(4, 4), np.zeros((4, 4)), tmp_path, "a")
    assert not list(tmp_path.iterdir())


def test_short_names_are_kept_readable() -> None:
    used: set[str] = set()
    assert file_stem(Path("in/IM 01.png"), "Left lung, upper.", used) == "IM-01-left-lung-upper"
    assert file_stem(Path("1.2.840.5"), "lésion", used) == "1.2.840.5-lesion"


def test_long_prompts_are_cut_and_told_apart() -> None:
    prompt = "Bilateral pulmonary infection, two infected areas, upper left lung and "
    stems = [file_stem(Path("a.png"), prompt + side, set()) for side in ("lower right lung.", "upper right lung.")]
    assert stems[0] != stems[1]
    for stem in stems:
        assert re.fullmatch(r"a-bilateral-pulmonary-infection-two-infect-[0-9a-f]{8}", stem)


def test_equal_names_in_other_folders_and_cases_get_different_stems() -> None:
    used: set[str] = set()
    stems = [file_stem(Path(name), "p", used) for name in ("x/a.png", "y/a.png", "z/A.PNG", "x/a.png", "x/a.png")]
    assert len({stem.casefold() for stem in stems}) == 5
    assert stems[0] == "a-p"
    used_again: set[str] = set()
    again = [file_stem(Path(name), "p", used_again) for name in ("x/a.png", "y/a.png", "z/A.PNG", "x/a.png", "x/a.png")]
    assert again == stems


@given(st.lists(st.tuples(st.text(min_size=1, max_size=90), st.text(max_size=60)), max_size=4))
@settings(deadline=None, max_examples=60)
def test_any_name_and_prompt_give_safe_unique_stems(pairs: list[tuple[str, str]]) -> None:
    used: set[str] = set()
    stems = [file_stem(Path(name), prompt, used) for name, prompt in pairs]
    assert len({stem.casefold() for stem in stems}) == len(stems)
    for stem in stems:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", stem)
        assert len(stem) <= 130
        assert not stem.endswith(".")


def _square(side: int, low: int, high: int) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[low:high, low:high] = True
    return mask


def _distance(pixel: np.ndarray, color: np.ndarray) -> float:
    return float(np.abs(pixel.astype(int) - color).max())


def test_overlay_tints_inside_draws_the_edge_and_leaves_the_rest() -> None:
    pixels = np.full((600, 600), 0.5, np.float32)
    drawn = np.asarray(draw_overlay(pixels, _square(600, 200, 400), "left lung"))
    assert drawn.shape[1] == 600
    assert drawn.shape[0] > 600
    np.testing.assert_array_equal(drawn[100, 100], [128, 128, 128])
    np.testing.assert_array_equal(drawn[500, 300], [128, 128, 128])
    inside = drawn[300, 300].astype(int)
    assert inside[0] < 128 < inside[1] <= inside[2]
    assert min(_distance(drawn[300, column], CYAN) for column in range(196, 205)) < 10
    np.testing.assert_array_equal(drawn[300, 190], [128, 128, 128])


def test_overlay_outlines_the_truth_in_its_own_color_and_names_it() -> None:
    pixels, mask = np.full((600, 600), 0.5, np.float32), _square(600, 200, 400)
    plain = draw_overlay(pixels, mask, "left lung")
    drawn_image = draw_overlay(pixels, mask, "left lung", truth=_square(600, 100, 500))
    drawn = np.asarray(drawn_image)
    assert min(_distance(drawn[300, column], AMBER) for column in range(96, 105)) < 10
    np.testing.assert_array_equal(drawn[300, 150], [128, 128, 128])
    assert drawn_image.height > plain.height


def test_mask_that_touches_the_border_has_no_line_along_it() -> None:
    drawn = np.asarray(draw_overlay(np.zeros((600, 600), np.float32), np.ones((600, 600), bool), "all"))
    assert np.ptp(drawn[:600].reshape(-1, 3), axis=0).max() == 0


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2048, 1024), (512, 1024)),
        ((1955, 1841), (964, 1024)),
        ((1024, 1024), (1024, 1024)),
        ((600, 700), (700, 600)),
        ((224, 224), (672, 672)),
        ((64, 64), (512, 512)),
    ],
)
def test_overlay_is_large_enough_to_read_and_never_huge(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image = draw_overlay(np.zeros((*shape, 3), np.float32), np.zeros(shape, bool), "one line")
    assert image.width == size[0]
    assert size[1] < image.height < size[1] + 80
    assert max(size) <= OVERLAY_LONGEST_PX


def test_strip_shows_the_prompt_and_grows_with_it() -> None:
    pixels, mask = np.zeros((512, 512), np.float32), np.zeros((512, 512), bool)
    short, other = (draw_overlay(pixels, mask, text) for text in ("left lung", "left lunq"))
    assert np.asarray(short).tolist() != np.asarray(other).tolist()
    strip = np.asarray(short)[512:]
    assert strip.max(axis=(0, 1)).min() > 200
    assert strip[:, :, 0].min() < 40
    heights = [draw_overlay(pixels, mask, "infected area " * count).height for count in (1, 12, 24, 1000, 100_000)]
    assert heights[0] < heights[1] < heights[2] <= heights[3] == heights[4]


@pytest.mark.parametrize("prompt", ["", "x" * 5000, "a\nb\x00\x1b[31m\u202ec", "左上肺", "\ud800"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (3000, 2), (5, 4, 3)])
def test_overlay_stands_odd_prompts_and_shapes(prompt: str, shape: tuple[int, ...]) -> None:
    image = draw_overlay(np.zeros(shape, np.float32), np.ones(shape[:2], bool), prompt)
    assert image.mode == "RGB"
    assert image.width <= 1024
    assert image.height <= 1024 + 300


def test_text_stays_inside_the_strip() -> None:
    prompt = "Bilateral pulmonary infection, two infected areas, upper left lung and lower right lung. " * 2 + "w" * 200
    drawn = np.asarray(draw_overlay(np.zeros((224, 224), np.float32), np.zeros((224, 224), bool), prompt))
    strip = drawn[672:].astype(int)
    background = np.abs(strip - strip[0, 0]).max(axis=2) == 0
    assert background[:, -8:].all()
    assert background[:4].all()
    assert background[-4:].all()


def test_masks_of_another_size_are_refused() -> None:
    pixels = np.zeros((8, 8), np.float32)
    with pytest.raises(UsageError, match=r"The mask has shape \(8, 9\)"):
        draw_overlay(pixels, np.zeros((8, 9), bool), "p")
    with pytest.raises(UsageError, match=r"The truth has shape \(9, 8\)"):
        draw_overlay(pixels, np.zeros((8, 8), bool), "p", truth=np.zeros((9, 8), bool))
