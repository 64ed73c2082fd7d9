"""Synthetic images: position of lesions, prompts, confounders, and complete or no output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.datasets.flat import read_flat
from cclip_deploy.datasets.mask_file import read_mask
from cclip_deploy.datasets.synthetic.confounders import CONFOUNDERS, Confounding, choose_confounders, make_confounding
from cclip_deploy.datasets.synthetic.generator import (
    SyntheticOptions,
    SyntheticSample,
    draw_radiograph,
    image_rng,
    make_sample,
    make_samples,
    write_dataset,
)
from cclip_deploy.errors import EnvironmentIssue, UsageError
from cclip_deploy.prompts.reader import read_prompt
from cclip_deploy.prompts.template import SITES, parse_facts
from cclip_deploy.prompts.wordings import WORDINGS


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("image_hw", [(64, 64), (96, 96), (64, 160), (224, 224)])
def test_an_image_has_the_requested_size_type_and_range(image_hw: tuple[int, int]) -> None:
    sample = make_sample(rng(0), image_hw)
    assert sample.image.shape == sample.mask.shape == image_hw
    assert (str(sample.image.dtype), str(sample.mask.dtype)) == ("float32", "bool")
    assert sample.image.min() >= 0
    assert sample.image.max() <= 1
    assert sample.image.max() - sample.image.min() > 0.5


def test_the_same_seed_gives_the_same_image_and_another_seed_another() -> None:
    one, same, other = (make_sample(rng(seed), (64, 64)) for seed in (5, 5, 6))
    assert np.array_equal(one.image, same.image)
    assert np.array_equal(one.mask, same.mask)
    assert one.prompt == same.prompt
    assert not np.array_equal(one.image, other.image)


def test_prompts_name_some_but_not_all_of_two_to_four_lesions() -> None:
    for seed in range(60):
        sample = make_sample(rng(seed), (32, 32))
        named, present = set(sample.zones.sites()), set(sample.present_zones.sites())
        assert 2 <= len(present) <= 4
        assert named < present
        assert named
        assert parse_facts(sample.prompt).zones == sample.zones


@pytest.mark.parametrize("site", SITES)
def test_a_lesion_lies_on_its_side_and_in_its_third_of_the_lung(site: tuple[str, str]) -> None:
    side, zone = site
    for seed in range(12):
        mask = draw_radiograph(rng(seed), (96, 96), [site]).lesions[site]
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
        film, healthy = draw_radiograph(rng(seed), (96, 96), [site]), draw_radiograph(rng(seed), (96, 96), [])
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
        small, large = (make_sample(rng(seed), (px, px)) for px in (64, 256))
        assert small.prompt == large.prompt
        shrunk = np.asarray(Image.fromarray(large.image).resize((64, 64), Image.Resampling.BOX))
        assert np.abs(shrunk - small.image).mean() < 0.03
        share = large.mask.reshape(64, 4, 64, 4).mean(axis=(1, 3))
        assert np.mean((share > 0.5) != small.mask) < 0.01


def test_lungs_are_dark_and_the_middle_is_bright() -> None:
    image = np.mean([draw_radiograph(rng(seed), (96, 96), []).image for seed in range(10)], axis=0)
    right_lung, left_lung, heart = image[35:55, 22:36].mean(), image[30:45, 60:74].mean(), image[55:65, 44:56].mean()
    assert max(right_lung, left_lung) + 0.25 < heart


@pytest.mark.parametrize(("rho", "expected"), [(1.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_the_marker_follows_the_target_with_its_probability(rho: float, expected: float) -> None:
    follows, trials = 0, 80
    for seed in range(trials):
        sample = make_sample(rng(seed), (32, 32), SyntheticOptions(Confounding(frozenset({"marker"}), rho)))
        corners = {"right": sample.image[1:4, 1:4].max(), "left": sample.image[1:4, -4:-1].max()}
        follows += max(corners, key=lambda side: float(corners[side])) == sample.zones.sites()[0][0]
    assert abs(follows / trials - expected) < (0.2 if 0 < rho < 1 else 0.001)


SIGNS = ("marker", "text", "collimation", "gain", "blur")


def confounded(seed: int, *kinds: str, rho: float = 1.0) -> SyntheticSample:
    return make_sample(rng(seed), (96, 96), SyntheticOptions(Confounding(frozenset(kinds), rho)))


@pytest.mark.parametrize("kind", SIGNS)
def test_a_confounder_changes_the_image_alone_and_has_the_expected_place(kind: str) -> None:
    for seed in range(8):
        plain, sign = make_sample(rng(seed), (96, 96)), confounded(seed, kind)
        assert (sign.prompt, sign.present_zones) == (plain.prompt, plain.present_zones)
        assert np.array_equal(sign.mask, plain.mask)
        assert 0 <= sign.image.min() <= sign.image.max() <= 1
        changed = np.abs(sign.image - plain.image) > 0.03
        rows, columns = np.nonzero(changed)
        left = plain.zones.sites()[0][0] == "left"
        if kind in ("marker", "text", "collimation"):
            assert len(rows) > 20
            assert (columns.mean() > 48) == left, "the patient's left is on the picture's right"
            assert not (changed & plain.mask).any()
        if kind == "marker":
            assert rows.max() < 96 / 6
        if kind == "text":
            assert rows.min() > 96 * 3 / 4
        if kind == "collimation":
            assert sign.image[changed].mean() < plain.image[changed].mean() - 0.1
        if kind == "gain":
            assert (sign.image.mean() > plain.image.mean()) == left
        if kind == "blur":
            edges = [np.abs(np.diff(image, axis=1)).mean() for image in (sign.image, plain.image)]
            assert (edges[0] < 0.9 * edges[1]) == left


def test_a_confounder_that_is_switched_off_leaves_the_others_as_they_were() -> None:
    for seed in range(6):
        both, one = confounded(seed, "marker", "gain", rho=0.5), confounded(seed, "gain", rho=0.5)
        assert np.abs(both.image - one.image)[24:].max() < 1e-6, "the marker stands above"


@pytest.mark.parametrize("kind", SIGNS)
@pytest.mark.parametrize("rho", [0.95, 0.05])
def test_every_confounder_follows_the_target_with_its_own_chance(kind: str, rho: float) -> None:
    signs = [choose_confounders(rng(seed), "left", Confounding(frozenset(SIGNS), rho)) for seed in range(400)]
    assert abs(np.mean([sign[kind] == "left" for sign in signs]) - rho) < 0.04
    together = np.mean([len(set(sign.values())) == 1 for sign in signs])
    assert together < 0.9, "each has a chance of its own"


def test_command_line_options_make_a_confounding() -> None:
    assert make_confounding((), None) is None
    assert make_confounding((), 0.5) == Confounding(frozenset(SIGNS), 0.5)
    assert make_confounding(["text"], None) == Confounding(frozenset({"text"}), 0.95)


def test_absent_sites_are_named_with_empty_masks_and_the_image_stays() -> None:
    shares, prompts = [], []
    for seed in range(40):
        plain, asked = (
            make_samples(rng(seed), (32, 32), 4, SyntheticOptions(absent_share=share)) for share in (0.0, 0.4)
        )
        assert np.array_equal(plain[0].image, asked[0].image)
        assert len({sample.prompt for sample in asked}) == len(asked)
        for sample in asked:
            named, present = set(sample.zones.sites()), set(sample.present_zones.sites())
            absent = not named & present
            assert absent or named < present
            assert sample.mask.any() == (not absent)
            assert 1 <= len(named) <= (2 if absent else 3)
            shares.append(absent)
            prompts.append(sample.prompt)
    assert abs(np.mean(shares) - 0.4) < 0.1
    for sample in make_samples(rng(0), (32, 32), 2, SyntheticOptions(absent_share=1.0)):
        assert not sample.mask.any()


def test_the_test_split_has_its_own_rho(tmp_path: Path) -> None:
    asking = SyntheticOptions(Confounding(frozenset({"gain"}), 1.0))
    for name, rho in (("id", None), ("anti", 0.0)):
        counts = {"train": 2, "test": 2}
        write_dataset(tmp_path / name, counts, (32, 32), 0, options=asking, test_rho=rho)
    for film, same in (("train-00000", True), ("train-00001", True), ("test-00000", False), ("test-00001", False)):
        one, other = ((tmp_path / name / f"images/{film}.png").read_bytes() for name in ("id", "anti"))
        assert (one == other) == same
    with pytest.raises(UsageError, match="test_rho is given without confounders"):
        write_dataset(tmp_path / "x", {"train": 1}, (32, 32), 0, test_rho=0.5)


def test_a_writer_reports_progress(tmp_path: Path) -> None:
    said: list[tuple[int, int]] = []
    counts = {"train": 2, "test": 1}
    write_dataset(tmp_path / "x", counts, (32, 32), 0, on_progress=lambda *pair: said.append(pair))
    assert said == [(1, 3), (2, 3), (3, 3)]


def test_images_without_confounders_are_those_of_the_first_release() -> None:
    """The demo and every trained checkpoint rest on these pictures; the numbers are those of commit 14ac5f5."""
    image = 255 * make_samples(rng(0), (64, 64), 3)[0].image
    assert image.mean() == pytest.approx(123.28, abs=0.02)
    assert (image[20, 20], image[40, 30]) == pytest.approx((87, 202), abs=1)


def test_impossible_images_are_refused() -> None:
    with pytest.raises(UsageError, match="too small"):
        make_sample(rng(0), (96, 16))
    with pytest.raises(UsageError, match="probability"):
        Confounding(frozenset({"marker"}), 1.5)
    with pytest.raises(UsageError, match="Unknown confounder 'hair'"):
        Confounding(frozenset({"hair"}), 0.5)
    for asked in ({"absent_share": 1.1}, {"typo_share": -0.1}):
        with pytest.raises(UsageError, match="the allowed range is 0 to 1"):
            SyntheticOptions(**asked)


def test_a_written_data_set_reads_back(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", {"train": 3, "val": 1, "test": 2}, (64, 96), seed=4, prompts_per_image=2)
    samples = read_flat(tmp_path / "data")
    assert [r.split for r in samples] == ["train"] * 6 + ["val"] * 2 + ["test"] * 4
    assert len({r.subject for r in samples}) == 6
    first = make_samples(np.random.default_rng([4, 0, 0]), (64, 96), 2)
    assert [r.text for r in samples[:2]] == [s.prompt for s in first]
    assert np.array_equal(read_mask(samples[1].mask), first[1].mask)
    written = np.asarray(Image.open(samples[0].image)) / 255
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
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(EnvironmentIssue if isinstance(error, OSError) else KeyboardInterrupt):
        write_dataset(tmp_path / "data", {"train": 1}, (32, 32), seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("counts", [{}, {"train": 0}, {"train": -1}, {"training": 3}])
def test_invalid_counts_are_refused(tmp_path: Path, counts: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        write_dataset(tmp_path / "data", counts, (32, 32), seed=0)
    assert list(tmp_path.iterdir()) == []


def test_the_lungs_of_a_sample_hold_its_lesions_and_do_not_depend_on_confounders() -> None:
    plain, confounded = (
        make_samples(image_rng(3, "test", 0), (64, 64), 3, asking)
        for asking in (SyntheticOptions(), SyntheticOptions(Confounding(frozenset(CONFOUNDERS), 1.0)))
    )
    for sample, other in zip(plain, confounded, strict=True):
        assert 0.1 < sample.lungs.mean() < 0.6
        assert (sample.mask & ~sample.lungs).sum() <= 0.1 * sample.mask.sum()
        assert np.array_equal(sample.lungs, other.lungs)


def test_varied_wordings_name_the_same_zones_on_the_same_images() -> None:
    forms = set()
    for seed in range(25):
        plain, varied = (make_samples(rng(seed), (64, 64), 6, SyntheticOptions(wordings=w)) for w in WORDINGS)
        for one, other in zip(plain, varied, strict=True):
            assert np.array_equal(one.image, other.image)
            assert np.array_equal(one.mask, other.mask)
            reading = read_prompt(other.prompt)
            assert reading.complete
            assert reading.zones == one.zones == parse_facts(one.prompt).zones
            forms.add(other.prompt.split()[0] + str("with involvement" in other.prompt))
    assert len(forms) >= 6
    with pytest.raises(UsageError, match="qata or varied"):
        SyntheticOptions(wordings="latin")


def test_a_typing_error_is_left_out_where_no_word_of_a_wording_has_one() -> None:
    prompts = [
        s.prompt
        for n in range(40)
        for s in make_samples(rng(n), (32, 32), 3, SyntheticOptions(typo_share=1, wordings="varied"))
    ]
    assert all(prompts)
