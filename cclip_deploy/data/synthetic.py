"""Synthetic referring data: chest-film-like pictures with lesions in named zones, and prompts that name some of them.

Everything is drawn in relative coordinates, so one seed gives the same anatomy at every picture size; only the grain
differs. The picture adds up attenuation along the beam (tissue, bone, heart; air taken away), as a radiograph does.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cclip_deploy.data.layouts import FLAT_COLUMNS, SPLITS, TABLE_NAME
from cclip_deploy.data.radiograph import OUTWARD, Chest, Plane, draw_chest, expose, lung_span, smooth_noise, step
from cclip_deploy.data.template import SITES, Zones, render
from cclip_deploy.errors import UsageError
from cclip_deploy.files import whole_folder

Mask = npt.NDArray[np.bool_]
Site = tuple[str, str]

MIN_SIDE_PX = 32
LESION_COUNTS, LESION_SHARES = (2, 3, 4), (0.15, 0.25, 0.6)
"""Four lesions are the rule: among them some differ in side alone and some in zone alone, so that every word counts."""
OTHER_SIDE = {"left": "right", "right": "left"}
ZONE_CENTRES = {"upper": (0.22, 0.31), "middle": (0.41, 0.50), "lower": (0.60, 0.67)}
"""Where a lesion's centre may lie, as shares of the film's height, before scale, shift and tilt."""


@dataclass(frozen=True)
class SyntheticSample:
    """One picture, one prompt, and the mask of what the prompt names."""

    image: npt.NDArray[np.float32]  # (H, W) in [0, 1]
    mask: Mask  # (H, W) bool
    prompt: str
    zones: Zones
    present_zones: Zones


@dataclass(frozen=True)
class Film:
    """A picture and the mask of each of its lesions, before anything is asked about it."""

    image: npt.NDArray[np.float32]  # (H, W) in [0, 1]
    lesions: Mapping[Site, Mask]


def make_film(
    rng: np.random.Generator, image_hw: tuple[int, int], *, marker_rho: float | None = None
) -> SyntheticSample:
    """A film with 2 to 4 lesions and a prompt that names some but not all of them.

    Args:
        rng: the only source of chance.
        image_hw: height and width in pixels, each at least 32.
        marker_rho: probability, in [0, 1], that a bright marker stands at the border on the target's side of the
            picture rather than on the other side: 0.95 makes it a confounder, 0.5 says nothing. None draws no marker.
    """
    return make_samples(rng, image_hw, 1, marker_rho=marker_rho)[0]


def make_samples(
    rng: np.random.Generator, image_hw: tuple[int, int], prompts: int, *, marker_rho: float | None = None
) -> list[SyntheticSample]:
    """One film asked up to `prompts` different questions (two lesions allow only two); a marker follows the first."""
    if min(image_hw) < MIN_SIDE_PX:
        raise UsageError(
            f"A synthetic film of {image_hw[0]}x{image_hw[1]} is too small. Use {MIN_SIDE_PX} or more a side."
        )
    if marker_rho is not None and not 0 <= marker_rho <= 1:
        raise UsageError(f"marker_rho is {marker_rho}. It is a probability: use a value from 0 to 1, or None.")
    count = int(rng.choice(LESION_COUNTS, p=LESION_SHARES))
    present = [SITES[i] for i in sorted(rng.permutation(len(SITES))[:count])]
    subsets = [[s for bit, s in enumerate(present) if code >> bit & 1] for code in range(1, 2 ** len(present) - 1)]
    targets = [subsets[i] for i in rng.permutation(len(subsets))[:prompts]]
    side = None if marker_rho is None else _choose_marker_side(rng, targets[0], marker_rho)
    film = draw_film(rng, image_hw, present, side)
    return [_ask(film, target) for target in targets]


def draw_film(
    rng: np.random.Generator, image_hw: tuple[int, int], sites: Sequence[Site], marker_side: str | None = None
) -> Film:
    """A film with one lesion at each of `sites`; `marker_side` is the patient's side that a border marker stands on."""
    chest = draw_chest(rng, image_hw)
    attenuation = chest.attenuation.copy()
    masks: dict[Site, Mask] = {}
    for site in sites:
        density, masks[site] = _draw_lesion(rng, chest, site)
        attenuation += density
    if marker_side is not None:
        attenuation += _draw_marker(chest.frame.hw, marker_side)
    return Film(expose(rng, attenuation), masks)


def _draw_lesion(rng: np.random.Generator, chest: Chest, site: Site) -> tuple[Plane, Mask]:
    """Attenuation (H, W) of a patchy opacity inside one lung, and the mask (H, W) of its inner half of the edge."""
    side, zone = site
    frame = chest.frame
    radius_y, radius_x = rng.uniform(0.07, 0.10), rng.uniform(0.075, 0.115)
    y = rng.uniform(*ZONE_CENTRES[zone])
    medial, lateral = lung_span(side, y)
    margin = min(0.6 * radius_x, 0.45 * (lateral - medial))
    x = OUTWARD[side] * rng.uniform(medial + margin, lateral - margin)
    across, down = (frame.x - np.float32(x)) / radius_x, (frame.y - np.float32(y)) / radius_y
    edge = 1 + 0.11 * smooth_noise(rng, frame.hw, 13)
    share = step(edge - np.hypot(across, down), rng.uniform(0.14, 0.28)) * np.minimum(1.6 * chest.lungs[side], 1)
    patches = 1 + 0.07 * smooth_noise(rng, frame.hw, 50)
    return rng.uniform(0.20, 0.38) * share * patches, share > 0.5


def _draw_marker(image_hw: tuple[int, int], side: str) -> Plane:
    """A lead bar in the upper corner of the patient's `side`: attenuation (H, W)."""
    height, width = image_hw
    rows, columns = np.arange(height)[:, None] / height, np.arange(width)[None, :] / width
    centre = 0.5 + 0.43 * OUTWARD[side]
    bar = (np.abs(columns - centre) < 0.028) & (np.abs(rows - 0.07) < 0.028)
    return 2.0 * bar.astype(np.float32)


def _ask(film: Film, target: Sequence[Site]) -> SyntheticSample:
    zones = Zones.of_sites(target)
    mask = np.logical_or.reduce([film.lesions[site] for site in target])
    return SyntheticSample(film.image, mask, render(zones), zones, Zones.of_sites(tuple(film.lesions)))


def _choose_marker_side(rng: np.random.Generator, target: Sequence[Site], rho: float) -> str:
    """The side of the first site named, or by chance the other."""
    side = target[0][0]
    return side if rng.random() < rho else OTHER_SIDE[side]


def write_dataset(
    folder: Path, counts: Mapping[str, int], image_hw: tuple[int, int], seed: int, *, prompts_per_film: int = 1
) -> None:
    """Write films, masks and prompts in the flat layout (`layouts.read_flat`): whole, or not at all.

    A film depends on `seed`, its split and its number alone, so a larger data set holds the smaller one. Every film is
    a subject of its own.

    Args:
        folder: must not exist.
        counts: films of each split ("train", "val", "test").
        image_hw: height and width in pixels.
        seed: any whole number from 0.
        prompts_per_film: rows of the table that share one film (fewer where the film has only two lesions).

    Raises:
        UsageError: the folder exists, or a split or a count means nothing.
        EnvironmentProblem: the disk did not take it.
    """
    _check_counts(counts, prompts_per_film)
    if folder.exists():
        raise UsageError(f"{folder} exists already. Choose another folder, or delete this one first.")
    with whole_folder(folder) as unfinished:
        (unfinished / "images").mkdir(parents=True)
        (unfinished / "masks").mkdir()
        with (unfinished / TABLE_NAME).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(FLAT_COLUMNS)
            for split in SPLITS:
                for number in range(counts.get(split, 0)):
                    rng = np.random.default_rng([seed, SPLITS.index(split), number])
                    samples = make_samples(rng, image_hw, prompts_per_film)
                    table.writerows(_write_film(unfinished, split, f"{split}-{number:05d}", samples))


def _write_film(folder: Path, split: str, name: str, samples: Sequence[SyntheticSample]) -> list[tuple[str, ...]]:
    """Save one film and its masks as 8-bit PNG; returns its rows of the table."""
    image = f"images/{name}.png"
    Image.fromarray(np.rint(samples[0].image * 255).astype(np.uint8)).save(folder / image)
    rows: list[tuple[str, ...]] = []
    for index, sample in enumerate(samples):
        mask = f"masks/{name}-{index}.png"
        Image.fromarray(sample.mask.astype(np.uint8) * np.uint8(255)).save(folder / mask)
        rows.append((image, mask, sample.prompt, split, f"synthetic-{name}"))
    return rows


def _check_counts(counts: Mapping[str, int], prompts_per_film: int) -> None:
    for split, count in counts.items():
        if split not in SPLITS or count < 0:
            raise UsageError(f"{count} films of split {split!r} make no sense. Splits are {', '.join(SPLITS)}.")
    if sum(counts.values()) < 1 or prompts_per_film < 1:
        raise UsageError("A data set needs at least one film and one prompt for each film. Raise the count.")
