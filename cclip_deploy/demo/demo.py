"""The demo: every stage on a tiny network and synthetic films, and a report of what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cclip_deploy.benchmark.plan import BenchOptions
from cclip_deploy.benchmark.run import bench_bundle
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.common.files import restore_folder, whole_folder
from cclip_deploy.common.paths import check_writable
from cclip_deploy.datasets.reading import read_data_set
from cclip_deploy.datasets.sample import Sample, of_split
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.demo.report import DemoFacts, save_report
from cclip_deploy.engines.build import BuildOptions, build_engines
from cclip_deploy.environment.packages import require_export_packages, require_training_packages
from cclip_deploy.errors import EnvironmentIssue, ParityError, UsageError
from cclip_deploy.evaluation.models import BundleModel
from cclip_deploy.evaluation.scores import evaluate_dice
from cclip_deploy.export.export import ExportOptions, export_bundle
from cclip_deploy.inference.predict import Prediction, predict
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.runtime.registry import BackendConfig, opened
from cclip_deploy.train.config import Devices, TrainConfig
from cclip_deploy.train.run import RunOptions, train
from cclip_deploy.verify.verify import VerifyOptions, verify_bundle

if TYPE_CHECKING:
    from cclip_deploy.train.loop import TrainProgress

Progress = Callable[[str], None]

BUNDLE, REPORT, FACTS = "demo.cclip", "report.html", "report.json"
RECIPE = TrainConfig(
    image_size=96, epochs=6, images_per_batch=4, prompts_per_image=8, learning_rate=4e-3, tower_rate=0.3, threads=2,
    devices=Devices(accelerator="cpu"),
)  # fmt: skip
FILM_PROMPTS = (
    "Unilateral pulmonary infection, one infected area, lower left lung.",
    "Bilateral pulmonary infection, two infected areas, upper left lung and upper right lung.",
)
FILM_NAME = "RG1_UNCR.dcm"


@dataclass(frozen=True)
class DemoOptions:
    """How large the demo is; the defaults take minutes on two cores."""

    recipe: TrainConfig = RECIPE
    train_films: int = 400
    test_films: int = 60
    bench_rounds: int = 20
    bench_budget_seconds: float = 60.0
    threads: int = 2


def run_demo(output: Path, options: DemoOptions, command: str, on_progress: Progress = lambda _: None) -> DemoFacts:
    """Train, export, build, verify, bench and predict into a folder that an earlier demo may stand at.

    Raises:
        UsageError: something else than a demo is at `output`.
        ParityError: the exported bundle does not verify.
        EnvironmentIssue: `output` cannot be written.
    """
    restore_folder(output)
    if output.exists() and not (output / FACTS).is_file():
        raise UsageError(f"{output} exists and is no earlier demo. Choose another output.")
    check_writable(output)
    require_export_packages()
    require_training_packages()
    started = time.perf_counter()
    with whole_folder(output) as folder:
        folder.mkdir()
        facts = _run_stages(folder, options, command, on_progress)
        facts = facts.finished(time.perf_counter() - started)
        save_report(folder, facts, FACTS, REPORT)
    return facts


def _run_stages(folder: Path, options: DemoOptions, command: str, tell: Progress) -> DemoFacts:
    recipe, data = options.recipe, folder / "data"
    tell(f"Drawing {options.train_films + options.test_films} synthetic films")
    counts = {"train": options.train_films, "test": options.test_films}
    write_dataset(data, counts, recipe.image_hw, recipe.seed, prompts_per_image=recipe.prompts_per_image)
    running = RunOptions(tensorboard=False)
    trained = train(recipe, data, folder / "training", lambda p: _tell_step(tell, p), running)
    checkpoint = trained.checkpoint
    held_out = of_split(read_data_set(data).samples, "test")
    film = find_real_film()
    pictures = _first_pictures(held_out, 2) + ([film] if film else [])
    exporting = ExportOptions(
        recipe.image_hw, recipe.prompt_length, with_masks=True, threads=options.threads,
        reference_images=tuple(pictures),
    )  # fmt: skip
    bundle = export_bundle(checkpoint, folder / BUNDLE, exporting, command, tell).bundle
    engines, no_engine = _build(bundle, options, tell)
    bundle = Bundle.open(bundle.path)
    verified = verify_bundle(bundle, VerifyOptions(threads=options.threads), tell)
    if not verified.passed:
        raise ParityError("The demo's bundle does not verify; nothing of it was kept. Please report this.")
    with opened(BackendConfig(threads=options.threads), bundle, "fp32") as runs:
        network = BundleModel(bundle, runs)
        tell(f"Scoring {len(held_out)} held-out prompts, each against all others")
        scores = evaluate_dice(network, held_out)
        benched = bench_bundle(bundle, _bench_options(checkpoint, options), tell)
        shown = _predict(network.segmenter, held_out, film, folder / "predictions", tell)
    return DemoFacts(trained, scores, verified, engines, no_engine, benched, shown, film is not None, folder)


def find_real_film() -> Path | None:
    """The frontal chest film of the package pydicom-data, where it is installed; never fetched."""
    import importlib.util

    spec = importlib.util.find_spec("data_store")
    for place in (spec.submodule_search_locations or []) if spec else []:
        found = next(Path(place).rglob(FILM_NAME), None)
        if found:
            return found
    return None


def _tell_step(tell: Progress, progress: TrainProgress) -> None:
    if progress.step % 10 == 0 or progress.step == progress.steps:
        tell(f"Training, step {progress.step} of {progress.steps}, loss {progress.loss:.3f}")


def _first_pictures(samples: Sequence[Sample], count: int) -> list[Path]:
    return list(dict.fromkeys(sample.image for sample in samples))[:count]


def _build(bundle: Bundle, options: DemoOptions, tell: Progress) -> tuple[list[dict[str, Any]], str | None]:
    """The FP16 engines, or why there are none: TensorRT-RTX is an extra, and the demo says when it is missing."""
    try:
        entries = build_engines(bundle, BuildOptions(threads=options.threads), tell)
    except EnvironmentIssue as error:
        return [], str(error)
    sizes = [(bundle.path / entry.file).stat().st_size for entry in entries]
    return [{**e.model_dump(mode="json"), "bytes": size} for e, size in zip(entries, sizes, strict=True)], None


def _bench_options(checkpoint: Path, options: DemoOptions) -> BenchOptions:
    return BenchOptions(
        checkpoint, compile=False, threads=options.threads, rounds=options.bench_rounds,
        budget_seconds=options.bench_budget_seconds,
    )  # fmt: skip


def _predict(
    segmenter: Segmenter, held_out: Sequence[Sample], film: Path | None, output: Path, tell: Progress
) -> list[Prediction]:
    """Three held-out films with their own first two prompts, and the real film with two."""
    done: list[Prediction] = []
    for picture in _first_pictures(held_out, 3):
        tell(f"Segmenting {picture.name}")
        prompts = [sample.text for sample in held_out if sample.image == picture][:2]
        done += predict(segmenter, [picture], prompts, output).done
    if film is not None:
        tell(f"Segmenting {film.name}")
        done += predict(segmenter, [film], FILM_PROMPTS, output).done
    return done
