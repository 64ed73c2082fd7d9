"""Consistent augmentation of image, mask and texts."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from cclip_deploy.datasets.augmentation import Augmentation, Change, apply_change, draw_change
from cclip_deploy.datasets.synthetic.generator import make_samples
from cclip_deploy.prompts.template import parse_facts

STILL = Change(flip=False, rotation_degrees=0.0, scale=1.0, gain=1.0, gamma=1.0)
LEFT = "Unilateral pulmonary infection, one infected area, lower left lung."


def changed(**values: object) -> Change:
    return Change(**{**vars(STILL), **values})  # type: ignore[arg-type]


@pytest.fixture
def film() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    samples = make_samples(np.random.default_rng(1), (64, 96), 3)
    return samples[0].image, np.stack([s.mask for s in samples]), tuple(s.prompt for s in samples)


def test_nothing_is_changed_by_default(film: tuple[np.ndarray, np.ndarray, tuple[str, ...]]) -> None:
    assert draw_change(np.random.default_rng(0), Augmentation()) == STILL
    pixels, masks, texts = apply_change(STILL, *film)
    assert np.array_equal(pixels, film[0])
    assert np.array_equal(masks, film[1])
    assert texts == film[2]


def test_a_flip_swaps_image_mask_and_words(film: tuple[np.ndarray, np.ndarray, tuple[str, ...]]) -> None:
    pixels, masks, texts = apply_change(changed(flip=True), *film)
    assert np.array_equal(pixels, film[0][:, ::-1])
    assert np.array_equal(masks, film[1][:, :, ::-1])
    assert [parse_facts(text).zones for text in texts] == [parse_facts(text).zones.mirrored() for text in film[2]]
    back = apply_change(changed(flip=True), pixels, masks, texts)
    assert back[2] == film[2]
    assert np.array_equal(back[0], film[0])


def test_an_image_is_not_flipped_where_one_of_its_texts_cannot_be() -> None:
    pixels, masks = np.arange(6, dtype=np.float32).reshape(2, 3) / 6, np.eye(2, 3, dtype=bool)[None].repeat(2, axis=0)
    kept = apply_change(changed(flip=True), pixels, masks, (LEFT, "leftmost nodule"))
    assert np.array_equal(kept[0], pixels)
    assert np.array_equal(kept[1], masks)
    assert kept[2] == (LEFT, "leftmost nodule")


def test_a_quarter_turn_is_that_of_numpy() -> None:
    rng = np.random.default_rng(0)
    pixels, masks = rng.random((33, 33, 3), np.float32), rng.random((2, 33, 33)) > 0.5
    turned = apply_change(changed(rotation_degrees=90.0), pixels, masks, ("a", "b"))
    assert np.allclose(turned[0], np.rot90(pixels), atol=1e-4)
    assert np.array_equal(turned[1], np.rot90(masks, axes=(1, 2)))


def test_enlarging_by_two_shows_the_middle() -> None:
    masks = np.zeros((1, 64, 64), bool)
    masks[0, 24:40, 20:44] = True
    pixels = masks[0].astype(np.float32)
    large = apply_change(changed(scale=2.0), pixels, masks, ("x",))
    expected = np.zeros((64, 64), bool)
    expected[16:48, 8:56] = True
    assert np.array_equal(large[1][0], expected)
    small = apply_change(changed(scale=0.5), np.ones_like(pixels), masks, ("x",))
    assert small[0][:15].max() == 0, "black comes in from outside"
    assert small[0][20:44, 20:44].min() == 1


def test_gain_and_gamma_leave_mask_and_range() -> None:
    pixels = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    bright = apply_change(changed(gain=1.5, gamma=2.0), pixels, np.ones((1, 3, 4), bool), ("x",))
    assert np.allclose(bright[0], np.minimum(1.5 * pixels**2, 1), atol=1e-6)
    assert bright[1].all()


def test_draws_stay_in_their_ranges_and_repeat_themselves() -> None:
    wide = Augmentation(flip_share=0.3, rotation_degrees=10, scale=0.1, gain=0.2, gamma=0.3)
    draws = [draw_change(np.random.default_rng(seed), wide) for seed in range(500)]
    assert draws[7] == draw_change(np.random.default_rng(7), wide)
    assert abs(np.mean([draw.flip for draw in draws]) - 0.3) < 0.07
    for name, low, high in (
        ("rotation_degrees", -10, 10),
        ("scale", 0.9, 1.1),
        ("gain", 0.8, 1.2),
        ("gamma", 0.7, 1.3),
    ):
        values = [getattr(draw, name) for draw in draws]
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(values) <= high
    alone = draw_change(np.random.default_rng(7), Augmentation(gain=0.2))
    assert alone == changed(gain=draws[7].gain)


@pytest.mark.parametrize("values", [{"flip_share": 1.5}, {"rotation_degrees": 60}, {"scale": 1.0}, {"shear": 0.1}])
def test_invalid_settings_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Augmentation(**values)


def test_what_is_drawn_can_be_applied(film: tuple[np.ndarray, np.ndarray, tuple[str, ...]]) -> None:
    change = draw_change(np.random.default_rng(3), Augmentation(rotation_degrees=5, scale=0.1, gain=0.1, gamma=0.2))
    pixels, masks, _ = apply_change(change, *film)
    assert (pixels.shape, masks.shape) == (film[0].shape, film[1].shape)
    assert (pixels.dtype, masks.dtype) == (np.float32, np.bool_)
    assert masks.sum() == pytest.approx(film[1].sum() * change.scale**2, rel=0.1)
