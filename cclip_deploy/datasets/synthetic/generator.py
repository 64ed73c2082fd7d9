"""Synthetic referring data: chest-film-like pictures with lesions in named zones, and prompts that name some of them.

Everything is drawn in relative coordinates, so one seed gives the same anatomy at every picture size; only the grain
differs. The picture adds up attenuation along the beam (tissue, bone, heart; air taken away), as a radiograph does.
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
from cclip_deploy.datasets.lvit import TRAIN_SHARE
from cclip_deploy.datasets.sample import SPLITS
from cclip_deploy.datasets.synthetic.confounders import Confounding, choose_signs, finish_film, marker_attenuation
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
from cclip_deploy.datasets.writing import WrittenFilm, check_layout, write_layout
from cclip_deploy.errors import UsageError
from cclip_deploy.prompts.template import SITES, Zones, render
from cclip_deploy.prompts.wordings import WORDINGS, render_varied

Mask = npt.NDArray[np.bool_]
Site = tuple[str, str]

MIN_SIDE_PX = 32
LESION_COUNTS, LESION_SHARES = (2, 3, 4), (0.15, 0.25, 0.6)
"""Four lesions are the rule: among them some differ in side alone and some in zone alone, so that every word counts."""
NO_SIGNS: Mapping[str, str] = MappingProxyType({})
TYPOS = (
    ("middle", "mmiddle"), ("middle", "midlle"), ("upper", "uppper"), ("left", "leff"), ("right", "rught"),
    ("lower right", "lowerright"), ("lower", "llower"), ("all ", "aall "),
)  # fmt: skip
"""Typing errors of the published tables of QaTa-COV19."""
ZONE_CENTRES = {"upper": (0.22, 0.31), "middle": (0.41, 0.50), "lower": (0.60, 0.67)}
"""Where a lesion's center may lie, as shares of the film's height, before scale, shift and tilt."""


@dataclass(frozen=True)
class SyntheticSample:
    """One picture, one prompt, and the mask of what the prompt names."""

    image: npt.NDArray[np.float32]  # (H, W) in [0, 1]
    mask: Mask  # (H, W) bool
    prompt: str
    zones: Zones
    present_zones: Zones
    lungs: Mask
    """(H, W) bool, both lungs as they lie behind everything else."""


@dataclass(frozen=True)
class Film:
    """A picture, its lungs, and the mask of each of its lesions, before anything is asked about it."""

    image: npt.NDArray[np.float32]  # (H, W) in [0, 1]
    lesions: Mapping[Site, Mask]
    lungs: Mask


@dataclass(frozen=True)
class Asking:
    """What besides lesions is put on films and into prompts; the defaults put nothing."""

    confounding: Confounding | None = None
    """Signs that follow the side of a film's first prompt; that is the left one where it names both lungs."""
    absent_share: float = 0.0
    """Share of prompts that name sites without a lesion, so that their mask is empty."""
    typo_share: float = 0.0
    """Share of prompts that are written with a typing error, as real tables have them."""
    wordings: str = "qata"
    """`qata` writes QaTa-COV19's form alone, `varied` one of several wordings for each prompt."""

    def __post_init__(self) -> None:
        if self.wordings not in WORDINGS:
            raise UsageError(f"Unknown wordings {self.wordings!r}. Use {' or '.join(WORDINGS)}.")
        for name in ("absent_share", "typo_share"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise UsageError(f"{name} is {share}. It is a share: use a value from 0 to 1.")


DEFAULT_FILMS = Asking()


def make_film(rng: np.random.Generator, image_hw: tuple[int, int], asking: Asking = DEFAULT_FILMS) -> SyntheticSample:
    """A film with 2 to 4 lesions and a prompt that names some but not all of them; `make_samples` says the rest."""
    return make_samples(rng, image_hw, 1, asking)[0]


def make_samples(
    rng: np.random.Generator, image_hw: tuple[int, int], prompts: int, asking: Asking = DEFAULT_FILMS
) -> list[SyntheticSample]:
    """One film asked up to `prompts` different questions (two lesions allow only two).

    Signs, absent sites, typing errors and wordings come from generators of their own that `rng` spawns: the film under
    them, and which present sites are named, do not depend on `asking`, so two data sets of one seed can be compared in
    pairs.

    Args:
        rng: the only source of chance.
        image_hw: height and width in pixels, each at least 32.
        prompts: how many at most, each with its own mask.
        asking: what is put on the film and into the prompts.
    """
    if min(image_hw) < MIN_SIDE_PX:
        raise UsageError(
            f"A synthetic film of {image_hw[0]}x{image_hw[1]} is too small. Use {MIN_SIDE_PX} or more a side."
        )
    count = int(rng.choice(LESION_COUNTS, p=LESION_SHARES))
    present = [SITES[i] for i in sorted(rng.permutation(len(SITES))[:count])]
    subsets = [[s for bit, s in enumerate(present) if code >> bit & 1] for code in range(1, 2 ** len(present) - 1)]
    targets = [subsets[i] for i in rng.permutation(len(subsets))[:prompts]]
    signs_rng, absent_rng, typo_rng, words_rng = rng.spawn(4)
    targets = _name_absent_sites(absent_rng, targets, present, asking.absent_share)
    signs = choose_signs(signs_rng, targets[0][0][0], asking.confounding)
    film = draw_film(rng, image_hw, present, signs)
    samples = [_ask(film, target) for target in targets]
    if asking.wordings == "varied":
        samples = [replace(sample, prompt=render_varied(sample.zones, words_rng)) for sample in samples]
    return [replace(s, prompt=_mistype(typo_rng, s.prompt, asking.typo_share)) for s in samples]


def draw_film(
    rng: np.random.Generator, image_hw: tuple[int, int], sites: Sequence[Site], signs: Mapping[str, str] = NO_SIGNS
) -> Film:
    """A film with one lesion at each of `sites`, and signs (kind -> the patient's side that it tells)."""
    chest = draw_chest(rng, image_hw)
    attenuation = chest.attenuation.copy()
    masks: dict[Site, Mask] = {}
    for site in sites:
        density, masks[site] = _draw_lesion(rng, chest, site)
        attenuation += density
    if "marker" in signs:
        attenuation += marker_attenuation(image_hw, signs)
    lungs = np.maximum(chest.lungs["left"], chest.lungs["right"]) > 0.5
    return Film(finish_film(expose(rng, attenuation), signs), masks, lungs)


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


def _ask(film: Film, target: Sequence[Site]) -> SyntheticSample:
    zones = Zones.of_sites(target)
    mask = np.zeros(film.image.shape, np.bool_)
    for site in target:
        if site in film.lesions:
            mask |= film.lesions[site]
    return SyntheticSample(film.image, mask, render(zones), zones, Zones.of_sites(tuple(film.lesions)), film.lungs)


def _name_absent_sites(
    rng: np.random.Generator, targets: Sequence[list[Site]], present: Sequence[Site], share: float
) -> list[list[Site]]:
    """The targets, some of them exchanged for one or two sites without a lesion; no two are the same."""
    absent = [site for site in SITES if site not in present]
    choices = [[site] for site in absent] + [list(pair) for pair in combinations(absent, 2)]
    left = [choices[i] for i in rng.permutation(len(choices))]
    exchanged = rng.random(len(targets)) < share
    return [left.pop() if swap and left else target for target, swap in zip(targets, exchanged, strict=True)]


def _mistype(rng: np.random.Generator, prompt: str, share: float) -> str:
    """The prompt with one of TYPOS that fits it, or as it is."""
    chance, which = rng.random(2)
    fitting = [(right, wrong) for right, wrong in TYPOS if right in prompt]
    if chance >= share or not fitting:
        return prompt
    right, wrong = fitting[int(which * len(fitting))]
    return prompt.replace(right, wrong, 1)


def write_dataset(
    folder: Path,
    counts: Mapping[str, int],
    image_hw: tuple[int, int],
    seed: int,
    *,
    prompts_per_film: int = 1,
    layout: str = "flat",
    asking: Asking = DEFAULT_FILMS,
    test_rho: float | None = None,
    on_film: Callable[[int, int], None] = lambda done, films: None,
) -> None:
    """Write films, masks and prompts in a layout that `layouts.read_data_set` reads: whole, or not at all.

    A film depends on `seed`, its split and its number alone, so a larger data set holds the smaller one. Every film is
    a subject of its own.

    Args:
        folder: must not exist.
        counts: films of each split ("train", "val", "test").
        image_hw: height and width in pixels.
        seed: any whole number from 0.
        prompts_per_film: rows that share one film (fewer where the film has only two lesions).
        layout: one of `layouts.writing.WRITERS`.
        asking: signs, absent sites and typing errors.
        test_rho: the test split's own rho; that of `asking` unless given.
        on_film: told how many films of how many are drawn.

    Raises:
        UsageError: the folder exists, a split or a count means nothing, or the layout cannot hold what is asked.
        TargetInUse: another run is writing the folder.
        EnvironmentIssue: the disk did not take it, or an Excel table without openpyxl.
    """
    _check_counts(counts, prompts_per_film)
    check_layout(layout, counts, prompts_per_film)
    asking_of = dict.fromkeys(SPLITS, asking)
    if test_rho is not None:
        if asking.confounding is None:
            raise UsageError("test_rho is given without confounders. Name some, or leave it out.")
        asking_of["test"] = replace(asking, confounding=replace(asking.confounding, rho=test_rho))

    def draw() -> Iterator[WrittenFilm]:
        done, films = 0, sum(counts.values())
        for split in SPLITS:
            for number in range(counts.get(split, 0)):
                samples = make_samples(film_rng(seed, split, number), image_hw, prompts_per_film, asking_of[split])
                yield WrittenFilm(split, number, samples[0].image, tuple((s.mask, s.prompt) for s in samples))
                done += 1
                on_film(done, films)

    with whole_folder(folder) as unfinished:
        if folder.exists():
            raise UsageError(f"{folder} exists already. Choose another folder, or delete this one first.")
        write_layout(unfinished, layout, draw())


def film_rng(seed: int, split: str, number: int) -> np.random.Generator:
    """The chance that `write_dataset` draws a film from."""
    return np.random.default_rng([seed, SPLITS.index(split), number])


def share_out_films(films: int) -> dict[str, int]:
    """A fifth of the films for testing, a fifth of the rest for validation, in numbers that every layout takes."""
    test = round(films / 5)
    train = int(TRAIN_SHARE * (films - test))
    return {"train": train, "val": films - test - train, "test": test}


def _check_counts(counts: Mapping[str, int], prompts_per_film: int) -> None:
    for split, count in counts.items():
        if split not in SPLITS or count < 0:
            raise UsageError(f"{count} films of split {split!r} make no sense. Splits are {', '.join(SPLITS)}.")
    if sum(counts.values()) < 1 or prompts_per_film < 1:
        raise UsageError("A data set needs at least one film and one prompt for each film. Raise the count.")
