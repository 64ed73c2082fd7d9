"""Generate synthetic data sets: chest radiographs with lesions in lung zones, and prompts that name some of the zones.

Everything is drawn in relative coordinates, so a seed gives the same anatomy at every image size, except for the grain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from cclip_deploy.common.files import whole_folder
from cclip_deploy.datasets.lvit import TRAIN_FRACTION
from cclip_deploy.datasets.sample import SPLITS
from cclip_deploy.datasets.synthetic.confounders import (
    Confounding,
    apply_confounders,
    choose_confounders,
    marker_attenuation,
)
from cclip_deploy.datasets.synthetic.radiograph import (
    OUTWARD,
    Chest,
    Plane,
    draw_chest,
    expose,
    lung_span,
    smooth_noise,
    step,
)
from cclip_deploy.datasets.writing import SyntheticImage, check_layout, write_layout
from cclip_deploy.errors import UsageError
from cclip_deploy.prompts.template import SITES, Zones, render
from cclip_deploy.prompts.wordings import WORDINGS, render_varied

Mask = npt.NDArray[np.bool_]
Site = tuple[str, str]

MIN_SIDE_PX = 32
LESION_COUNTS, LESION_PROBABILITIES = (2, 3, 4), (0.15, 0.25, 0.6)
"""Mostly four lesions: some then differ only in side and some only in zone, so every word of the prompt matters."""
NO_CONFOUNDERS: Mapping[str, str] = MappingProxyType({})
TYPOS = (
    ("middle", "mmiddle"), ("middle", "midlle"), ("upper", "uppper"), ("left", "leff"), ("right", "rught"),
    ("lower right", "lowerright"), ("lower", "llower"), ("all ", "aall "),
)  # fmt: skip
"""Typing errors from the published tables of QaTa-COV19."""
ZONE_CENTERS = {"upper": (0.22, 0.31), "middle": (0.41, 0.50), "lower": (0.60, 0.67)}
"""Range of a lesion's center, as fractions of the image height, before scale, shift and tilt."""


@dataclass(frozen=True)
class SyntheticSample:
    """One image, one prompt, and the mask of the prompt's target."""

    image: npt.NDArray[np.float32]  # (H, W) in [0, 1]
    mask: Mask  # (H, W) bool
    prompt: str
    zones: Zones
    present_zones: Zones
    lungs: Mask
    """(H, W) bool, the full area of both lungs, including what the heart covers."""


@dataclass(frozen=True)
class Radiograph:
    """A radiograph with masks of its lungs and of each lesion."""

    image: npt.NDArray[np.float32]  # (H, W) in [0, 1]
    lesions: Mapping[Site, Mask]
    lungs: Mask


@dataclass(frozen=True)
class SyntheticOptions:
    """Optional properties of synthetic images and prompts; none by default."""

    confounding: Confounding | None = None
    """Confounders that follow the side of an image's first prompt (left if it names both lungs)."""
    absent_share: float = 0.0
    """Fraction of prompts that name only sites without a lesion, with an empty mask."""
    typo_share: float = 0.0
    """Fraction of prompts with a typing error."""
    wordings: str = "qata"
    """`qata` writes QaTa-COV19's sentence form only, `varied` one of several wordings for each prompt."""

    def __post_init__(self) -> None:
        if self.wordings not in WORDINGS:
            raise UsageError(f"Unknown wordings {self.wordings!r}. Use {' or '.join(WORDINGS)}.")
        for name in ("absent_share", "typo_share"):
            fraction = getattr(self, name)
            if not 0 <= fraction <= 1:
                raise UsageError(f"{name} is {fraction}; the allowed range is 0 to 1.")


DEFAULT_OPTIONS = SyntheticOptions()


def make_sample(
    rng: np.random.Generator, image_hw: tuple[int, int], options: SyntheticOptions = DEFAULT_OPTIONS
) -> SyntheticSample:
    """Generate a radiograph with 2 to 4 lesions and a prompt that names some of them; see `make_samples`."""
    return make_samples(rng, image_hw, 1, options)[0]


def make_samples(
    rng: np.random.Generator, image_hw: tuple[int, int], prompts: int, options: SyntheticOptions = DEFAULT_OPTIONS
) -> list[SyntheticSample]:
    """Generate one radiograph with up to `prompts` different prompts (at most two if it has only two lesions).

    Confounders, absent sites, typing errors and wordings use generators spawned from `rng`. So the radiograph and the
    present sites that prompts name do not depend on `options`, and data sets of the same seed can be compared in pairs.

    Args:
        rng: source of all randomness.
        image_hw: height and width in pixels, each at least 32.
        prompts: maximum number of prompts; each has its own mask.
        options: confounders, absent sites, typing errors and wordings.
    """
    if min(image_hw) < MIN_SIDE_PX:
        raise UsageError(
            f"A synthetic radiograph of {image_hw[0]}x{image_hw[1]} is too small. Use {MIN_SIDE_PX} or more a side."
        )
    count = int(rng.choice(LESION_COUNTS, p=LESION_PROBABILITIES))
    present = [SITES[i] for i in sorted(rng.permutation(len(SITES))[:count])]
    subsets = [[s for bit, s in enumerate(present) if code >> bit & 1] for code in range(1, 2 ** len(present) - 1)]
    targets = [subsets[i] for i in rng.permutation(len(subsets))[:prompts]]
    confounder_rng, absent_rng, typo_rng, words_rng = rng.spawn(4)
    targets = _name_absent_sites(absent_rng, targets, present, options.absent_share)
    confounders = choose_confounders(confounder_rng, targets[0][0][0], options.confounding)
    radiograph = draw_radiograph(rng, image_hw, present, confounders)
    samples = [_to_sample(radiograph, target) for target in targets]
    if options.wordings == "varied":
        samples = [replace(sample, prompt=render_varied(sample.zones, words_rng)) for sample in samples]
    return [replace(s, prompt=_mistype(typo_rng, s.prompt, options.typo_share)) for s in samples]


def draw_radiograph(
    rng: np.random.Generator,
    image_hw: tuple[int, int],
    sites: Sequence[Site],
    confounders: Mapping[str, str] = NO_CONFOUNDERS,
) -> Radiograph:
    """Draw a radiograph with one lesion at each of `sites` and the given confounders (kind -> side of the patient)."""
    chest = draw_chest(rng, image_hw)
    attenuation = chest.attenuation.copy()
    masks: dict[Site, Mask] = {}
    for site in sites:
        density, masks[site] = _draw_lesion(rng, chest, site)
        attenuation += density
    if "marker" in confounders:
        attenuation += marker_attenuation(image_hw, confounders)
    lungs = np.maximum(chest.lungs["left"], chest.lungs["right"]) > 0.5
    return Radiograph(apply_confounders(expose(rng, attenuation), confounders), masks, lungs)


def _draw_lesion(rng: np.random.Generator, chest: Chest, site: Site) -> tuple[Plane, Mask]:
    """Return the attenuation (H, W) of a patchy opacity in one lung, and its mask (H, W) at half of the soft edge."""
    side, zone = site
    frame = chest.frame
    radius_y, radius_x = rng.uniform(0.07, 0.10), rng.uniform(0.075, 0.115)
    y = rng.uniform(*ZONE_CENTERS[zone])
    medial, lateral = lung_span(side, y)
    margin = min(0.6 * radius_x, 0.45 * (lateral - medial))
    x = OUTWARD[side] * rng.uniform(medial + margin, lateral - margin)
    across, down = (frame.x - np.float32(x)) / radius_x, (frame.y - np.float32(y)) / radius_y
    edge = 1 + 0.11 * smooth_noise(rng, frame.hw, 13)
    coverage = step(edge - np.hypot(across, down), rng.uniform(0.14, 0.28)) * np.minimum(1.6 * chest.lungs[side], 1)
    patches = 1 + 0.07 * smooth_noise(rng, frame.hw, 50)
    return rng.uniform(0.20, 0.38) * coverage * patches, coverage > 0.5


def _to_sample(radiograph: Radiograph, target: Sequence[Site]) -> SyntheticSample:
    zones = Zones.of_sites(target)
    mask = np.zeros(radiograph.image.shape, np.bool_)
    for site in target:
        if site in radiograph.lesions:
            mask |= radiograph.lesions[site]
    return SyntheticSample(
        radiograph.image, mask, render(zones), zones, Zones.of_sites(tuple(radiograph.lesions)), radiograph.lungs
    )


def _name_absent_sites(
    rng: np.random.Generator, targets: Sequence[list[Site]], present: Sequence[Site], fraction: float
) -> list[list[Site]]:
    """Replace a random fraction of the targets by distinct sets of one or two sites without a lesion."""
    absent = [site for site in SITES if site not in present]
    choices = [[site] for site in absent] + [list(pair) for pair in combinations(absent, 2)]
    unused = [choices[i] for i in rng.permutation(len(choices))]
    replaced = rng.random(len(targets)) < fraction
    return [unused.pop() if swap and unused else target for target, swap in zip(targets, replaced, strict=True)]


def _mistype(rng: np.random.Generator, prompt: str, fraction: float) -> str:
    """Apply one matching typing error of TYPOS with probability `fraction`."""
    chance, which = rng.random(2)
    fitting = [(right, wrong) for right, wrong in TYPOS if right in prompt]
    if chance >= fraction or not fitting:
        return prompt
    right, wrong = fitting[int(which * len(fitting))]
    return prompt.replace(right, wrong, 1)


def write_dataset(
    folder: Path,
    counts: Mapping[str, int],
    image_hw: tuple[int, int],
    seed: int,
    *,
    prompts_per_image: int = 1,
    layout: str = "flat",
    options: SyntheticOptions = DEFAULT_OPTIONS,
    test_rho: float | None = None,
    on_progress: Callable[[int, int], None] = lambda done, images: None,
) -> None:
    """Write a synthetic data set that `reading.read_data_set` reads; on failure nothing is left.

    An image depends only on `seed`, split and number, so a larger data set contains the smaller one. Every image is a
    separate subject.

    Args:
        folder: must not exist.
        counts: number of images in each split ("train", "val", "test").
        image_hw: height and width in pixels.
        seed: integer >= 0.
        prompts_per_image: rows per image (at most two if it has only two lesions).
        layout: one of `writing.WRITERS`.
        options: confounders, absent sites, typing errors and wordings.
        test_rho: rho of the test split; default: that of `options`.
        on_progress: called with the number of finished images and the total.

    Raises:
        UsageError: the folder exists, a split or count is invalid, or the layout cannot hold the data set.
        TargetInUse: another run is writing the folder.
        EnvironmentIssue: the disk cannot be written, or openpyxl is missing for an Excel table.
    """
    _check_counts(counts, prompts_per_image)
    check_layout(layout, counts, prompts_per_image)
    options_of = dict.fromkeys(SPLITS, options)
    if test_rho is not None:
        if options.confounding is None:
            raise UsageError("test_rho is given without confounders. Name some, or leave it out.")
        options_of["test"] = replace(options, confounding=replace(options.confounding, rho=test_rho))

    def draw() -> Iterator[SyntheticImage]:
        done, images = 0, sum(counts.values())
        for split in SPLITS:
            for number in range(counts.get(split, 0)):
                samples = make_samples(image_rng(seed, split, number), image_hw, prompts_per_image, options_of[split])
                yield SyntheticImage(split, number, samples[0].image, tuple((s.mask, s.prompt) for s in samples))
                done += 1
                on_progress(done, images)

    with whole_folder(folder) as unfinished:
        if folder.exists():
            raise UsageError(f"{folder} exists already. Choose another folder, or delete this one first.")
        write_layout(unfinished, layout, draw())


def image_rng(seed: int, split: str, number: int) -> np.random.Generator:
    """Return the random generator that `write_dataset` uses for an image."""
    return np.random.default_rng([seed, SPLITS.index(split), number])


def split_counts(images: int) -> dict[str, int]:
    """Split images into 1/5 test, 1/5 of the rest validation, and training, in numbers that every layout supports."""
    test = round(images / 5)
    train = int(TRAIN_FRACTION * (images - test))
    return {"train": train, "val": images - test - train, "test": test}


def _check_counts(counts: Mapping[str, int], prompts_per_image: int) -> None:
    for split, count in counts.items():
        if split not in SPLITS or count < 0:
            raise UsageError(f"{split!r}: {count} images; splits are {', '.join(SPLITS)}, with 0 or more images.")
    if sum(counts.values()) < 1 or prompts_per_image < 1:
        raise UsageError("A data set needs at least one image and one prompt per image. Raise the count.")
