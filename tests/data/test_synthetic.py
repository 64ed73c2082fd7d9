"""Synthetic films: where lesions lie, what prompts name, and that the writer is whole or absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.data.confounders import Confounding
from cclip_deploy.data.layouts import read_flat, read_mask, writing
from cclip_deploy.data.synthetic import Asking, draw_film, make_film, make_samples, write_dataset
from cclip_deploy.data.template import SITES, parse
from cclip_deploy.errors import EnvironmentProblem, UsageError


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("image_hw", [(64, 64), (96, 96), (64, 160), (224, 224)])
def test_a_film_has_the_asked_size_type_and_range(image_hw: tuple[int, int]) -> None:
    sample = make_film(rng(0), image_hw)
    assert sample.image.shape == sample.mask.shape == image_hw
    assert (str(sample.image.dtype), str(sample.mask.dtype)) == ("float32", "bool")
    assert sample.image.min() >= 0
    assert sample.image.max() <= 1
    assert sample.image.max() - sample.image.min() > 0.5


def test_the_same_seed_gives_the_same_film_and_another_seed_another() -> None:
    one, same, other = (make_film(rng(seed), (64, 64)) for seed in (5, 5, 6))
    assert np.array_equal(one.image, same.image)
    assert np.array_equal(one.mask, same.mask)
    assert one.prompt == same.prompt
    assert not np.array_equal(one.image, other.image)


def test_prompts_name_some_but_not_all_of_two_to_four_lesions() -> None:
    for seed in range(60):
        sample = make_film(rng(seed), (32, 32))
        named, present = set(sample.zones.sites()), set(sample.present_zones.sites())
        assert 2 <= len(present) <= 4
        assert named < present
        assert named
        assert parse(sample.prompt) == sample.zones


@pytest.mark.parametrize("site", SITES)
def test_a_lesion_lies_on_its_side_and_in_its_third_of_the_lung(site: tuple[str, str]) -> None:
    side, zone = site
    for seed in range(12):
        mask = draw_film(rng(seed), (96, 96), [site]).lesions[site]
        rows, columns = np.nonzero(mask)
        assert 0.005 < mask.mean() < 0.06
        assert (columns.mean() > 48) == (side == "left"), "the patient's left is on the picture's right"
        low, high = {"upper": (0.12, 0.38), "middle": (0.36, 0.57), "lower": (0.54, 0.77)}[zone]
        assert low < rows.mean() / 96 < high


def test_a_lesion_is_brighter_than_the_same_place_without_it() -> None:
    """The same generator state draws the same chest, and only then the lesions."""
    site = ("right", "middle")
    brighter = 0.0
    for seed in range(8):
        film, healthy = draw_film(rng(seed), (96, 96), [site]), draw_film(rng(seed), (96, 96), [])
        inside = film.lesions[site]
        brighter += float((film.image - healthy.image)[inside].mean()) / 8
    assert brighter > 0.1


def test_the_mask_is_the_union_of_the_named_lesions_alone() -> None:
    asked = [samples for seed in range(6) for samples in [make_samples(rng(seed), (96, 96), 20)]]
    assert max(len(samples) for samples in asked) == 14, "four lesions have 14 proper subsets"
    for samples in asked:
        singles = {s.zones.sites()[0]: s.mask for s in samples if len(s.zones.sites()) == 1}
        assert set(singles) == set(samples[0].present_zones.sites())
        for sample in samples:
            expected = np.any([singles[site] for site in sample.zones.sites()], axis=0)
            assert np.array_equal(sample.mask, expected)
            assert sample.image is samples[0].image
        assert len({sample.prompt for sample in samples}) == len(samples)


def test_anatomy_does_not_depend_on_the_resolution() -> None:
    for seed in range(4):
        small, large = (make_film(rng(seed), (px, px)) for px in (64, 256))
        assert small.prompt == large.prompt
        shrunk = np.asarray(Image.fromarray(large.image).resize((64, 64), Image.Resampling.BOX))
        assert np.abs(shrunk - small.image).mean() < 0.03
        share = large.mask.reshape(64, 4, 64, 4).mean(axis=(1, 3))
        assert np.mean((share > 0.5) != small.mask) < 0.01


def test_lungs_are_dark_and_the_middle_is_bright() -> None:
    image = np.mean([draw_film(rng(seed), (96, 96), []).image for seed in range(10)], axis=0)
    right_lung, left_lung, heart = image[35:55, 22:36].mean(), image[30:45, 60:74].mean(), image[55:65, 44:56].mean()
    assert max(right_lung, left_lung) + 0.25 < heart


@pytest.mark.parametrize(("rho", "expected"), [(1.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_the_marker_follows_the_target_with_its_probability(rho: float, expected: float) -> None:
    follows, trials = 0, 80
    for seed in range(trials):
        sample = make_film(rng(seed), (32, 32), Asking(Confounding(frozenset({"marker"}), rho)))
        corners = {"right": sample.image[1:4, 1:4].max(), "left": sample.image[1:4, -4:-1].max()}
        follows += max(corners, key=lambda side: float(corners[side])) == sample.zones.sites()[0][0]
    assert abs(follows / trials - expected) < (0.2 if 0 < rho < 1 else 0.001)


def test_impossible_films_are_refused() -> None:
    with pytest.raises(UsageError, match="too small"):
        make_film(rng(0), (96, 16))
    with pytest.raises(UsageError, match="probability"):
        Confounding(frozenset({"marker"}), 1.5)
    with pytest.raises(UsageError, match="Unknown confounder 'hair'"):
        Confounding(frozenset({"hair"}), 0.5)
    for asked in ({"absent_share": 1.1}, {"typo_share": -0.1}):
        with pytest.raises(UsageError, match="is a share"):
            Asking(**asked)


def test_a_written_data_set_reads_back(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", {"train": 3, "val": 1, "test": 2}, (64, 96), seed=4, prompts_per_film=2)
    referrals = read_flat(tmp_path / "data")
    assert [r.split for r in referrals] == ["train"] * 6 + ["val"] * 2 + ["test"] * 4
    assert len({r.subject for r in referrals}) == 6
    first = make_samples(np.random.default_rng([4, 0, 0]), (64, 96), 2)
    assert [r.text for r in referrals[:2]] == [s.prompt for s in first]
    assert np.array_equal(read_mask(referrals[1].mask), first[1].mask)
    written = np.asarray(Image.open(referrals[0].image)) / 255
    assert np.abs(written - first[0].image).max() <= 0.5 / 255 + 1e-6


def test_a_larger_data_set_holds_the_smaller_one(tmp_path: Path) -> None:
    write_dataset(tmp_path / "small", {"train": 1, "test": 1}, (32, 32), seed=0)
    write_dataset(tmp_path / "large", {"train": 2, "val": 1, "test": 2}, (32, 32), seed=0)
    for name in ("images/train-00000.png", "images/test-00000.png", "masks/test-00000-0.png"):
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "large" / name).read_bytes()


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        write_dataset(tmp_path, {"train": 1}, (32, 32), seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_stopped_writer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(writing, "_save_mask", fail)
    with pytest.raises(EnvironmentProblem if isinstance(error, OSError) else KeyboardInterrupt):
        write_dataset(tmp_path / "data", {"train": 1}, (32, 32), seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("counts", [{}, {"train": 0}, {"train": -1}, {"training": 3}])
def test_counts_that_mean_nothing_are_refused(tmp_path: Path, counts: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        write_dataset(tmp_path / "data", counts, (32, 32), seed=0)
    assert list(tmp_path.iterdir()) == []
