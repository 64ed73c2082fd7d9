"""Data of an ablation: an existing data set, or synthetic images generated per seed with three test sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cclip_deploy.ablation.plan import AblationPlan, Films, Signs
from cclip_deploy.datasets.options import DataSetOptions
from cclip_deploy.datasets.reading import read_data_set
from cclip_deploy.datasets.sample import Sample, of_split
from cclip_deploy.datasets.synthetic.confounders import Confounding
from cclip_deploy.datasets.synthetic.generator import (
    DEFAULT_OPTIONS,
    SyntheticOptions,
    image_rng,
    make_samples,
    write_dataset,
)
from cclip_deploy.evaluation.causal import ToggledImage

OnMessage = Callable[[str], None]

TEST_SETS: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {"id": lambda rho: rho, "neutral": lambda rho: 0.5, "anti": lambda rho: 1 - rho}
)
"""The rho of each test set as a function of the training's."""
ON_FOLDER = "test"
"""Name of the test set of an existing data set."""


@dataclass(frozen=True)
class TrialData:
    """Training and test data of one trial."""

    training: Path
    options: DataSetOptions
    tests: Mapping[str, Path]
    """Folders whose test splits show the same patients; the first has the training's confounders."""
    films: Films | None
    image_hw: tuple[int, int]
    seed: int

    def test_rows(self, name: str) -> list[Sample]:
        """Return the rows of a test set."""
        return of_split(self.read(self.tests[name]), "test")

    def read(self, folder: Path) -> tuple[Sample, ...]:
        """Return the rows of one of the folders."""
        return read_data_set(folder, self.options).samples

    def toggled_images(self) -> Iterator[ToggledImage]:
        """Yield the synthetic test images with all confounders on the target's side and on the other side."""
        assert self.films is not None
        for number in range(self.films.test):
            forms = [
                make_samples(image_rng(self.seed, "test", number), self.image_hw, self.films.prompts_per_film, options)
                for options in (_test_options(self.films, 1.0), _test_options(self.films, 0.0))
            ]
            one, other = forms
            prompts = tuple(sample.prompt for sample in one)
            yield ToggledImage(one[0].image, other[0].image, one[0].lungs, prompts)


def prepare_data(
    plan: AblationPlan, folder: Path, arm: str, seed: int, tested: bool, on_message: OnMessage
) -> TrialData:
    """Return the data of one trial, with test sets if it is `tested`; generate missing synthetic sets atomically.

    Raises:
        UsageError: the synthetic images are too small.
        EnvironmentIssue: the disk is full.
    """
    config = plan.recipe_of(plan.reference, 0, seed)
    hw, source = config.image_hw, config.data
    if plan.films is None:
        assert source.folder is not None
        tests = {ON_FOLDER: source.folder}
        return TrialData(source.folder, source.options(), tests, None, hw, seed)
    films, signs, place = plan.films, plan.arms[arm].signs, folder / f"seed{seed}"

    def draw(name: str, counts: Mapping[str, int], options: SyntheticOptions) -> Path:
        target = place / name
        if not target.exists():
            on_message(f"Generating {sum(counts.values())} images in {target}")
            write_dataset(target, counts, hw, seed, prompts_per_image=films.prompts_per_film, options=options)
        return target

    training = draw(f"train-{signs}", {"train": films.train, "val": films.val}, _training_options(films, signs))
    rho_of = {name: rho(films.rho) for name, rho in TEST_SETS.items()} if tested else {}
    tests = {name: draw(name, {"test": films.test}, _test_options(films, rho)) for name, rho in rho_of.items()}
    return TrialData(training, DataSetOptions("flat"), tests, films, hw, seed)


def _training_options(films: Films, signs: Signs) -> SyntheticOptions:
    if signs == "none":
        return DEFAULT_OPTIONS
    return _test_options(films, films.rho if signs == "follow" else 0.5)


def _test_options(films: Films, rho: float) -> SyntheticOptions:
    return SyntheticOptions(Confounding(frozenset(films.confounders), rho))
